"""ShareGPT: conversations of text alone, those that are whole.

The paper leaves out invalid conversations as Vicuna does, and keeps long ones in one piece, to be
cut at 2,048 tokens in training (arXiv 2310.03744, appendix; 40,688 remain). Its exact filter is not published.
Here: a leading answer and a last question without an answer go; roles must alternate, texts may
not be empty, and parts of a conversation after the first (ids that end in _1, _2, ...) are left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax.datasets.source import File, Record, Source

ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bing", "bard"), "gpt"),
}
_LATER_PART = re.compile(r"_[1-9]\d*")


@dataclass(kw_only=True)
class ShareGPT(Source):
    name = "sharegpt"
    published = 40_688
    files: ClassVar = {
        "conversations": File(
            "ShareGPT_V3_unfiltered_cleaned_split.json",
            "https://huggingface.co/datasets/anon8231489123/ShareGPT_Vicuna_unfiltered",
        )
    }

    def records(self) -> Iterator[Record]:
        for row in self.rows(self.path("conversations")):
            turns = whole(row["conversations"])
            if _LATER_PART.fullmatch(row["id"][row["id"].rfind("_") :]):
                self.skipped["later part of a conversation"] += 1
            elif turns is None:
                self.skipped["not a whole conversation"] += 1
            else:
                yield {"id": row["id"], "conversations": turns}


def whole(given: list[dict[str, Any]]) -> list[dict[str, str]] | None:
    """The turns from the first question to the last answer; None if they are no conversation."""
    turns = [{"from": ROLES.get(t["from"], ""), "value": t["value"].strip()} for t in given]
    if turns and turns[0]["from"] == "gpt":
        turns = turns[1:]
    if len(turns) % 2:
        turns = turns[:-1]
    sides = ("human", "gpt")
    right = all(t["from"] == sides[i % 2] and t["value"] for i, t in enumerate(turns))
    return turns if turns and right else None


SOURCE = ShareGPT
