"""ChartQA (test: 1,250 questions by people, 1,250 by a model).

Owner's rule: relaxed accuracy (vis-nlp/ChartQA; see rules.relaxed for its odd cases). The paper's number
is the mean of the two halves, which are of one size.
"""

import re
from collections import Counter
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import SHORT
from llava_jax.eval.simple import Item, SimpleTask


class ChartQA(SimpleTask):
    name = "chartqa"
    rule = "relaxed"
    macro = "half"
    parts = ("half", 2)
    data_files = "test_human.json and test_augmented.json with png/, or parquet of lmms-lab/ChartQA"
    files = ("test_*.json", "test*.parquet", "*.parquet", "*.jsonl")

    def rows(self, data, settings):
        seen: Counter[str] = Counter()  # shards of one half go on counting
        for path, number, row in super().rows(data, settings):
            half = re.sub(r"-\d+-of-\d+.*", "", path.stem).removeprefix("test_")
            seen[half] += 1
            yield path, number, {"half": half, "row": seen[half], **row}

    def item(self, row: dict[str, Any], number: int) -> Item:
        half = str(row.get("type", row["half"])).removesuffix("_test").removesuffix("_split")
        image = row["image"] if "image" in row else f"png/{row['imgname']}"
        asked = row["query"] if "query" in row else row["question"]
        truth = row["label"] if "label" in row else row["answer"]
        truth = truths.text(truth[0] if isinstance(truth, list) and truth else truth)
        return Item(f"{half}_{row['row']}", asked + SHORT, truth, (image,), groups={"half": half})
