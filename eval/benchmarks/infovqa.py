"""InfographicVQA (validation: 2,801 questions; the test split is scored by a server). ANLS, as DocVQA."""

from llava_jax.eval.benchmarks.docvqa import DocVQA


class InfoVQA(DocVQA):
    name = "infovqa"
    data_files = "infographicsVQA_val_v1.0_withQT.json with images/, or parquet of lmms-lab/DocVQA"
    files = (
        "*val*.json",
        "InfographicVQA/validation*.parquet",
        "validation*.parquet",
        "*.parquet",
        "*.jsonl",
        "*test*.json",
    )
    image_key = "image_local_name"
    other = ("ucsf_document_id", "docId")


TASK = InfoVQA()
