"""CV-Bench (2,638 questions: 2D counting and relations of ADE20K and COCO, 3D depth and distance).

Owner's formula (nyu-visionx/CV-Bench, and lmms-eval@75571cf tasks/cv_bench/utils.py): half the mean
of ADE20K and COCO, half Omni3D, by `source`. The letter is the answer's first character after
"(" and blanks, whatever the case: "Both" is B, "The answer is A" is T and wrong. Asked as the owner does
(cambrian-mllm/cambrian@a220b3f eval/eval/ade/ade_eval.py): the row's own `prompt`, whose options are "(A) 3".
"""

from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import LETTER
from llava_jax.eval.rules import LETTERS
from llava_jax.eval.simple import Item, SimpleTask, choices

SHARES = {"ADE20K": 0.25, "COCO": 0.25, "Omni3D": 0.5}


class CVBench(SimpleTask):
    name = "cvbench"
    rule, macro, shares = "first_letter", "source", SHARES
    parts = ("source", 3)
    data_files = "test_2d.parquet and test_3d.parquet of nyu-visionx/CV-Bench (images inside)"
    files = ("test*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        if row["source"] not in SHARES:
            raise ValueError(f"the source {row['source']!r} is none of {', '.join(SHARES)}")
        groups = {k: str(row[k]) for k in ("source", "task", "type")}
        options = truths.options(row["choices"])
        image = row.get("image") or row["filename"]
        truth = truths.letter(row["answer"], LETTERS[: len(options)])
        key = f"{row['type']}_{row['idx']}" if "type" in row else str(row["idx"])
        prompt = row["prompt"] + LETTER if "prompt" in row else choices(row["question"], options)
        return Item(key, prompt, truth, (image,), options, groups)
