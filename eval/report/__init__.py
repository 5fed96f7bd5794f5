"""The report: our numbers beside the paper's, with their noise, as one HTML and one Markdown page."""
