"""OCRBench (1,000 questions: text recognition, scene and document questions, key information, formulae).

Owner's rule: Yuliang-Liu/MultimodalOCR OCRBench (as lmms-eval@75571cf tasks/ocrbench has it): right if a truth
stands anywhere in the answer, both in lower case with line ends as blanks; formulae (HME100k) as they
are written, without blanks. An empty truth is in every answer. The published score is the count of
right answers of 1,000: ten times ours, which is in percent.
"""

from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import SHORT
from llava_jax.eval.simple import Item, SimpleTask


class OCRBench(SimpleTask):
    name = "ocrbench"
    data_files = "OCRBench.json and its images, or parquet of echo840/OCRBench"
    files = ("OCRBench.json", "test*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        kind = row.get("type") or row["question_type"]
        source = row.get("dataset_name") or row["dataset"]
        truth = row["answers"] if "answers" in row else row["answer"]
        image = row["image_path"] if "image_path" in row else row["image"]
        groups = {"type": kind, "dataset": source}
        truth = truths.texts([truth] if isinstance(truth, str) else truth)
        if truth and "" in truth:
            raise ValueError("one of its truths is empty, and in every answer")
        key = str(row.get("id", number))
        return Item(f"{source}/{key}", row["question"] + SHORT, truth, (image,), groups=groups)

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        blank = "" if item.groups["dataset"] == "HME100k" else " "

        def plain(t: str) -> str:
            t = t.strip().replace("\n", " ")
            return t.replace(" ", "") if not blank else t.lower()

        read = plain(text)
        return float(any(plain(t) in read for t in item.truth)), read
