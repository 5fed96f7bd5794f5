"""LLaVA-Instruct as published: its pictures are named without their folder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.source import File, Record, Source, placed

URL = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K"


@dataclass(kw_only=True)
class Published(Source):
    """A file that is in LLaVA's form already: records as they are, with `image` put before paths."""

    image: str = "{}"

    def records(self) -> Iterator[Record]:
        for row in self.rows(next(iter(self.inputs()))):
            if row.get("image"):
                row["image"] = placed(self.image, row["image"])
            yield row


@dataclass(kw_only=True)
class LLaVAInstruct(Published):
    name = "llava_instruct"
    published = 157_712
    files: ClassVar = {"records": File("llava_instruct_150k.json", URL)}

    image: str = "coco/train2017/{}"


SOURCE = LLaVAInstruct
