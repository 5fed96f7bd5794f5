"""What a stage's data hold on average, where no data are there to count, and the shape of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llava_jax.batch import Shape


@dataclass(frozen=True)
class Mixture:
    """samples: of an epoch. tokens, targets, images: per sample, image features among the tokens.

    real: share of the positions of a step that are tokens and not padding. longest: the positions of
    an unpacked row at most.
    """

    samples: int
    tokens: float
    targets: float
    images: float
    real: float
    longest: int


PRETRAIN = Mixture(558_128, 592.0, 16.0, 1.0, 0.92, 640)
"""LLaVA-1.5's stage 1 (558K captions): <s>, 576 features and a caption of about 15 tokens, estimated."""
FINETUNE = Mixture(665_298, 861.0, 138.0, 0.939, 0.61, 2048)
"""LLaVA-1.5's stage 2 (665K): lengths and trained tokens estimated per source, ±15 %. 40,688 samples
have no image."""
REAL = {"exact": 0.85, "fill": 0.97}
"""{data.pack: share of real tokens}, a little less than what docs/data.md says was counted."""


def mixture_of(config: Any, **changes: float | None) -> Mixture:
    """The mixture that `config` is a recipe for, with `changes` where they are not None."""
    found = PRETRAIN if config.data.version == "plain" else FINETUNE
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    if config.data.pack:
        values["real"] = REAL[_pack(config)]
    values |= {name: value for name, value in changes.items() if value is not None}
    return Mixture(**values)


def _pack(config: Any) -> str:
    return "exact" if config.data.pack is True else config.data.pack


def step_shape(config: Any, length: int, mixture: Mixture, parts: int) -> Shape:
    """The padded shape of a step, by the rules of llava_jax.data.layout on averages.

    length: the longest sample. parts: into how many the rows are cut, micro-batches times devices along
    the batch. Unpacked: a row for each sample, at its longest. Packed: the slots of a part have the
    more to spare the fewer rows share them.
    """
    data = config.data
    if not data.pack:
        targets = 1 << max(0, math.ceil(math.log2(4 * mixture.targets)))  # of the row that has most
        length = min(length, mixture.longest)
        return Shape(config.batch_size, length, math.ceil(mixture.images), min(length, targets))
    length = data.get("pack_length", 0) or length
    wanted = config.batch_size * mixture.tokens / length
    if _pack(config) == "fill":
        step = math.lcm(8, parts)
        near = [n for n in (1, 2, 4) if n % parts == 0]
        near.append(max(step, round(wanted / step) * step))
        rows = data.get("pack_rows", 0) or min(near, key=lambda n: abs(n - wanted))
    else:
        rows = math.ceil(wanted / mixture.real / parts) * parts
    of_part = rows // parts
    samples = of_part * length * mixture.real / mixture.tokens
    images = math.ceil(samples * mixture.images * (1 + 0.4 / of_part**0.5))
    targets = math.ceil(samples * mixture.targets * (1 + 0.6 / of_part**0.5) / 128) * 128
    return Shape(rows, length, images, targets, parts)


def steps_of(config: Any, shape: Shape, mixture: Mixture) -> int:
    """Optimizer steps of the stage: as the config says, else every sample `epochs` times."""
    if config.steps:
        return config.steps
    samples: float = config.batch_size
    if (
        _pack(config) == "fill"
    ):  # a step is as full as its shape; exact keeps the samples of each step
        samples = shape.rows * shape.length * mixture.real / mixture.tokens
    return math.ceil(config.epochs * mixture.samples / samples)
