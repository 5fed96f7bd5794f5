"""Which single change makes a step fit: estimated first, and compiled before it is named."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llava_jax.errors import LlavaError
from llava_jax.plan.plan import Question, Row, make_row, set_up
from llava_jax.plan.rows import Kept
from llava_jax.settings import TRAINING

log = logging.getLogger(__name__)

COMPILES = 3
"""How many changes are compiled before none is named."""
_REMAT = ("none", "dots", "minimal", "full", "offload")  # by what they keep on the device


def changes(config: Any) -> Iterator[dict[str, Any]]:
    """Settings that take less memory, those that cost least first, each alone.

    More recomputation; micro-batches; a mesh that shares more; adapters in place of the whole model, at last over 4 bits.
    """
    known = [name for name in _REMAT if name in TRAINING["remat"].choices]
    if config.remat in known:
        for remat in known[known.index(config.remat) + 1 :]:
            yield {"remat": remat}
    for times in (2, 4, 8, 16):
        yield {"grad_accum": config.grad_accum * times}
    if config.mesh.data != 1:
        yield {"mesh.data": 1, "mesh.fsdp": -1}
    elif config.mesh.fsdp == -1 and config.mesh.tensor == 1:
        for tensor in (2, 4):
            yield {"mesh.tensor": tensor}
    if "language" in config.trainable:
        yield {"trainable": ("projector", "lora"), "lora_rank": 128}
    if "language" in config.trainable or (config.lora_rank and not config.quantize):
        yield {"trainable": ("projector", "lora"), "lora_rank": 128, "quantize": "nf4"}


def changed(question: Question, settings: dict[str, Any]) -> Question:
    """The question with some settings set."""
    config = copy.deepcopy(question.config)
    for name, value in settings.items():
        *groups, last = name.split(".")
        group = config
        for part in groups:
            group = group[part]
        group[last] = value
    words = " ".join(f"{name}={_word(value)}" for name, value in settings.items())
    return replace(question, config=config, change=words)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def find_change(question: Question, row: Row, devices: list[Any], kept: Kept) -> Row | None:
    """The row of the first change that fits; None if none of those compiled does.

    A change is compiled when it is estimated to fit, by how much less it takes than what was compiled. Of
    a program that the compiler refused, no peak is known.
    """
    device, off = row["memory"]["device"], 0.0
    if row["compiled"]["fits"]:
        off = row["memory"]["peak"] - set_up(question, devices).peak
    tried = 0
    for settings in changes(question.config):
        other = changed(question, settings)
        try:
            peak = set_up(other, devices).peak
        except LlavaError:  # rows or heads that do not divide
            continue
        if peak + off > device:
            continue
        found = make_row(other, devices, kept)
        if found["fits"]:
            return found
        tried += 1
        if tried == COMPILES:
            break
    return None
