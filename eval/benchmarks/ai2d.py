"""AI2D (test: 3,088 questions on diagrams of school books, four options).

AI2 gave out no scorer; read by VLMEvalKit's exact rule (rules.read_letter). The truth is the index of an
option, from 0, as a number or its text.
"""

from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.simple import Item, SimpleTask, choices


class AI2D(SimpleTask):
    name = "ai2d"
    rule = "letter"
    data_files = "parquet files of lmms-lab/ai2d (images inside)"
    files = ("test*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        options = truths.options(row["options"])
        truth = truths.index(row["answer"], options)
        return Item(str(number), choices(row["question"], options), truth, (row["image"],), options)
