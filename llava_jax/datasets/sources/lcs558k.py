"""LCS-558K, the captions of stage 1 as published: blip_laion_cc_sbu_558k.json."""

from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.source import File
from llava_jax.datasets.sources.llava_instruct import Published


@dataclass(kw_only=True)
class LCS558K(Published):
    name = "lcs558k"
    published = 558_128
    files: ClassVar = {
        "records": File(
            "blip_laion_cc_sbu_558k.json",
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",
        )
    }


SOURCE = LCS558K
