"""RealWorldQA (765 pictures taken from cars and phones; options in the question, or a short answer).

xAI gave out no scorer; read as lmms-eval@75571cf tasks/realworldqa: where the truth is a letter, the
option's letter (here by VLMEvalKit's exact rule, see rules.read_letter), else the whole answer
whatever the case, outer space and a final period. The set's own instruction is replaced by
LLaVA-1.5's, as its other options' questions have it.
"""

import re
from typing import Any

from llava_jax.eval.questions import LETTER, SHORT
from llava_jax.eval.rules import exact, letter
from llava_jax.eval.simple import Item, SimpleTask

_OWN = re.compile(r"\s*Please answer (directly )?with .*?\.?\s*$", re.DOTALL)
_OPTION = re.compile(r"^([A-Z])\. (.*)$", re.MULTILINE)


class RealWorldQA(SimpleTask):
    name = "realworldqa"
    data_files = "parquet files of xai-org/RealworldQA (images inside)"
    files = ("test*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        asked, truth = _OWN.sub("", row["question"].strip()), row["answer"].strip()
        options = tuple(text.strip() for _, text in _OPTION.findall(asked))
        lettered = truth in tuple("ABCDEF")
        image = row.get("image") or row["image_path"]
        prompt = asked + (LETTER if lettered else SHORT)
        return Item(str(number), prompt, truth, (image,), options if lettered else ())

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        rule = letter if item.truth in tuple("ABCDEF") else exact
        return rule(text, item.truth, item.options)


TASK = RealWorldQA()
