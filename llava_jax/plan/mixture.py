"""What a stage's data hold on average, where no data are there to count, and the shape of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llava_jax.batch import Shape


@dataclass(frozen=True)
class Mixture:
    """samples: of an epoch. tokens, targets, images: per sample, image features among the tokens.

    real: share of the positions of a step that are tokens and not padding.
    """

    samples: int
    tokens: float
    targets: float
    images: float
    real: float


PRETRAIN = Mixture(558_128, 592.0, 16.0, 1.0, 0.98)
"""LLaVA-1.5's stage 1 (558K captions): <s>, 576 features and a caption of about 15 tokens, estimated."""
FINETUNE = Mixture(665_298, 861.0, 138.0, 0.939, 0.61)
"""LLaVA-1.5's stage 2 (665K): lengths and trained tokens estimated per source, ±15 %. 40,688 samples
have no image."""
PACKED = ((8192, 0.975), (4096, 0.96), (2048, 0.88), (0, 0.8))
"""(row length, share of real tokens) when rows are packed to the full; see docs/data.md."""


def mixture_of(config: Any, **changes: float | None) -> Mixture:
    """The mixture that `config` is a recipe for, with `changes` where they are not None."""
    found = PRETRAIN if config.data.version == "plain" else FINETUNE
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    if config.data.pack:
        length = config.data.max_length or 2048
        values["real"] = next(share for least, share in PACKED if length >= least)
    values |= {name: value for name, value in changes.items() if value is not None}
    return Mixture(**values)


def step_shape(config: Any, length: int, mixture: Mixture, parts: int) -> Shape:
    """The padded shape of a step.

    length: of the rows that a device must hold. parts: into how many the rows are cut, micro-batches
    times devices along the batch. Packed: as many rows as a batch fills, and images and targets of each
    part with a tenth to spare. Else a row for each sample, at its longest.
    """
    if not config.data.pack:
        return Shape(config.batch_size, length, math.ceil(mixture.images), min(length, 1024))
    tokens = config.batch_size * mixture.tokens / mixture.real
    rows = math.ceil(tokens / length / parts) * parts
    real = rows * length * mixture.real / parts / mixture.tokens  # samples of a part
    images, targets = math.ceil(1.1 * real * mixture.images), 1.1 * real * mixture.targets
    return Shape(rows, length, images, math.ceil(targets / 128) * 128, parts)


def steps_of(config: Any, shape: Shape, mixture: Mixture) -> int:
    """Optimizer steps of the stage: as the config says, else every sample `epochs` times."""
    if config.steps:
        return config.steps
    samples: float = config.batch_size
    if config.data.pack:  # a step is as full as its shape
        samples = shape.rows * shape.length * mixture.real / mixture.tokens
    return math.ceil(config.epochs * mixture.samples / samples)
