"""RealWorldQA (765 pictures taken from cars and phones; options in the question, or a short answer).

xAI gave out no scorer. Where the truth is a letter, an answer is read by VLMEvalKit's exact rule
(rules.read_letter), else as lmms-eval@75571cf tasks/realworldqa does: the whole answer less outer space and
then final periods ("3 ." is not 3) equals the truth, whatever the case; a truth that ends in a period is
never met. The set's own instruction is replaced by LLaVA-1.5's.
"""

import re
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import LETTER, SHORT
from llava_jax.eval.rules import LETTERS, letter
from llava_jax.eval.simple import Item, SimpleTask

_OWN = re.compile(r"\s*Please answer (directly )?with [^\n]*")
_LETTERED = re.compile(r"[A-F]|\([A-Fa-f]\)")
_OPTION = re.compile(r"^([A-Z])\. *(.*)$", re.MULTILINE)


class RealWorldQA(SimpleTask):
    name = "realworldqa"
    data_files = "parquet files of xai-org/RealworldQA (images inside)"
    files = ("test*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        asked, truth = _OWN.sub("", row["question"].strip()), truths.text(row["answer"])
        options = tuple(text.strip() for _, text in _OPTION.findall(asked))
        if len(options) < 2:  # one line that holds them all: none is read
            options = ()
        truth = None if truth is None else truth.strip()
        if lettered := truth is None or bool(_LETTERED.fullmatch(truth)):
            truth = truths.letter(truth, LETTERS[: len(options)] or "ABCD")
        image = row.get("image") or row["image_path"]
        prompt = asked + (LETTER if lettered else SHORT)
        return Item(str(number), prompt, truth, (image,), options if lettered else ())

    def judged(self, text: str, item: Item) -> tuple[float, str]:
        if item.truth in tuple("ABCDEF"):
            return letter(text, item.truth, item.options)
        read = text.lower().strip().rstrip(".")
        return float(read == item.truth.lower()), read
