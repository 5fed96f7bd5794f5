"""BLINK (val: 1,901 questions of 14 parts, up to four pictures, two to five options).

Owner's number: zeyofu/BLINK_Benchmark@2d6a779 eval/evaluate.py, the mean of the parts' accuracies. The
owner has GPT-3.5 match free answers; without it the letter is read as lmms-eval@75571cf
tasks/blink/utils.py does (rules.first_letter). `mean_over_questions` is lmms-eval's number.
"""

from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import LETTER
from llava_jax.eval.rules import LETTERS
from llava_jax.eval.simple import Item, SimpleTask


class Blink(SimpleTask):
    name = "blink"
    macro, rule = "sub_task", "first_letter"
    parts = ("sub_task", 14)
    data_files = "val-*.parquet of each part of BLINK-Benchmark/BLINK (images inside)"
    files = ("**/val*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        images = tuple(i for n in range(1, 5) if (i := row.get(f"image_{n}")) is not None)
        if not images:
            raise ValueError("it has no picture")
        options = truths.options(row["choices"])
        truth = truths.letter(row["answer"], LETTERS[: len(options)])
        groups = {"sub_task": row["sub_task"]}
        return Item(str(row["idx"]), row["prompt"] + LETTER, truth, images, options, groups)
