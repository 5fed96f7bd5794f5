"""NaturalBench: 1,900 groups of two questions on two pictures, whose answers are all crossed.

Owner's numbers: Baiqi-Li/NaturalBench@9967605 naturalbench_vqa.py. G_Acc: all four right; Q_Acc: a question right on
both pictures; I_Acc: both questions of a picture right; Acc: answers right. The answer is the first
of the words yes and no (A and B for options), whatever the case: "A dog, so B" is A. Neither is
-1: wrong, but the owner's script tests for 1 and 0, so it is never right as either.
"""

import re
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.benchmarks.mmvp import pairs_first
from llava_jax.eval.simple import Item, SimpleTask, groups_right
from llava_jax.eval.task import percent

SUFFIX = {
    "yes_no": " Please answer Yes or No.",
    "multiple_choice": " Please output the letter corresponding to the correct option.",
}
WORDS = {"yes_no": ("yes", "no"), "multiple_choice": ("a", "b")}


class NaturalBench(SimpleTask):
    name = "naturalbench"
    headline = "G_Acc"
    data_files = "parquet files of BaiqiL/NaturalBench (images inside)"
    files = ("*.parquet", "*.jsonl")

    def rows(self, data, settings):
        for path, number, row in super().rows(data, settings):
            for question in (0, 1):
                for image in (0, 1):
                    yield path, number, {**row, "_q": question, "_i": image}

    def item(self, row: dict[str, Any], number: int) -> Item:
        q, i, kind = row["_q"], row["_i"], row["Question_Type"]
        group = str(row["Index"])
        crossed = ("Yes", "No") if kind == "yes_no" else "AB"
        read = truths.yes_no if kind == "yes_no" else truths.letter
        truth = read(row.get(f"Image_{i}_Question_{q}", crossed[q != i]))
        prompt = row[f"Question_{q}"] + SUFFIX[kind]
        image = row[f"Image_{i}"]
        groups = {"type": kind, "question": f"{group} {q}", "picture": f"{group} {i}"}
        return Item(f"{group}_q{q}_i{i}", prompt, truth, (image,), (), groups, group)

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        words = WORDS[item.groups["type"]]
        found = re.search(rf"\b({'|'.join(words)})\b", text, re.IGNORECASE)
        read = found[1].lower() if found else "Z"
        return float(read == item.truth.lower()), read

    def result(self, items, samples, result):
        for name, kind in (("Q_Acc", "question"), ("I_Acc", "picture")):
            result.totals[name] = percent(map(float, groups_right(samples, kind).values()))
        return pairs_first(self, items, samples, result)
