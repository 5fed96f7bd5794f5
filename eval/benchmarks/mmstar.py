"""MMStar (1,500 questions that need their picture; 6 categories of 3 parts each).

Owner's rule: MMStar-Benchmark/MMStar@88f243a eval/vlmeval/evaluate/mmstar.py. Answer and truth in lower
case: the truth is the answer's first character, or follows "(", "option " or "the answer is " at its
start. So "Bananas" is B, "A cat" is A, "answer: B" is A, and "" is wrong. The number is over all
questions. Its files name pictures in the options, so the prompt is the question as it is given.
"""

from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import LETTER
from llava_jax.eval.simple import Item, SimpleTask

BEFORE = ("", "(", "option ", "the answer is ")


class MMStar(SimpleTask):
    name = "mmstar"
    data_files = "parquet of Lin-Chen/MMStar (images inside), or jsonl"
    files = ("*mmstar*.parquet", "val*.parquet", "*.parquet", "MMStar*.jsonl", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        groups = {"category": row["category"], "l2_category": row["l2_category"]}
        prompt, truth = row["question"].strip() + LETTER, truths.letter(row["answer"], "ABCD")
        return Item(str(row["index"]), prompt, truth, (row["image"],), groups=groups)

    def letters(self, item: Item) -> str:
        return "ABCD"

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        said = text.lower().strip().replace("\n", " ")
        read = [said[len(b) : len(b) + 1].upper() for b in BEFORE if said.startswith(b)]
        right = item.truth.upper() in read
        return float(right), item.truth.upper() if right else read[-1] or "Z"
