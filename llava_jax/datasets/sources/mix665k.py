"""llava_v1_5_mix665k.json, the whole of stage 2 as published."""

from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.source import File
from llava_jax.datasets.sources.llava_instruct import URL, Published


@dataclass(kw_only=True)
class Mix665K(Published):
    name = "mix665k"
    published = 665_298
    files: ClassVar = {"records": File("llava_v1_5_mix665k.json", URL)}


SOURCE = Mix665K
