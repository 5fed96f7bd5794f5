"""The sets of LLaVA-1.5 and ScienceQA, one file each; a file's SOURCE is what a recipe names."""
