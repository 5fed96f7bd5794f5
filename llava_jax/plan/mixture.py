"""The steps of a stage, from lengths that are drawn, by the very code that lays out those of a run."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from llava_jax.batch import Shape, Size
from llava_jax.data.layout import Batches, Exact, Fill, Layout
from llava_jax.data.packing import Sizes
from llava_jax.data.sampler import Epochs
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.plan.lengths import CAPTIONS_558K, MIX_665K, UNKNOWN, Means, draw_sizes


@dataclass(frozen=True)
class Mixture:
    """samples: of an epoch. The rest are means of a sample; tokens: image features counted.

    keys: positions that a token attends to, on average: half of its sample, the long ones counting more.
    """

    samples: int
    tokens: float
    targets: float
    images: float
    keys: float


@dataclass(frozen=True)
class Steps:
    """What a stage's steps are. shape: of the largest, the one to compile.

    epoch: steps of an epoch. positions: of a step on average, padding included. real: the share of them
    that are tokens.
    """

    mixture: Mixture
    shape: Shape
    epoch: int
    positions: float
    real: float

    def of_run(self, config: Any) -> int:
        """Optimizer steps of the stage: as the config says, else every sample `epochs` times."""
        return config.steps or math.ceil(config.epochs * self.epoch)


@functools.lru_cache(maxsize=8)  # the machines of a plan share most of them
def lay_out(settings: DataSettings, image_tokens: int, means: Means = UNKNOWN) -> Steps:
    """The steps of an epoch. settings: completed for the model and the devices.

    Samples are those of the mixture that data.version stands for: LLaVA-1.5's 558K captions for
    "plain", else its 665K.
    """
    sources = CAPTIONS_558K if settings.version == "plain" else MIX_665K
    longest = settings.max_length or settings.length_buckets[-1]
    sizes = draw_sizes(sources, means=means, image_tokens=image_tokens, longest=longest)
    if settings.target_buckets and not settings.pack:  # who sets them has no sample that needs more
        sizes = sizes._replace(targets=np.minimum(sizes.targets, settings.target_buckets[-1]))
    layout, records = _layout(settings, sizes, image_tokens)
    count, shapes, positions = layout.steps(1), set(), 0
    alike = count if settings.pack == "fill" else 1  # steps
    for within in range(0, count, alike):
        own = sizes.at(records[layout.entries(0, within)])
        needs = [Size(*map(int, need)) for need in zip(*own)]
        shape = layout.rows(0, within, list(range(len(needs))), needs)[1]
        shapes.add(shape)
        positions += alike * shape.rows * shape.length
    largest = max(shapes, key=lambda s: (s.rows * s.length, s.images, s.targets or 0))
    tokens = int(sizes.length.sum())
    keys = (sizes.length.astype(np.int64) ** 2).sum() / tokens / 2
    means_of = (float(column.mean()) for column in (sizes.length, sizes.targets, sizes.images))
    mixture = Mixture(len(sizes.length), *means_of, keys=float(keys))
    return Steps(mixture, largest, count, positions / count, tokens / positions)


def _layout(settings: DataSettings, sizes: Sizes, image_tokens: int) -> tuple[Layout, np.ndarray]:
    """The layout of a run over such samples, and the sample of each entry of its first epoch."""
    with_image, text = sizes.images > 0, sizes.length - sizes.images * image_tokens
    data: Any = SimpleNamespace(
        with_image=with_image,
        file=np.zeros(len(with_image), np.int64),
        files=[DataFile("", "", 1.0)],
        words=np.where(with_image, 1, -1) * np.maximum(text, 1),  # as many as tokens
    )
    epochs = Epochs(data, settings)
    layout: Layout = Batches(epochs, settings)
    if settings.pack:
        layout = {"exact": Exact, "fill": Fill}[settings.pack](epochs, settings, sizes, 1)
    return layout, epochs[0].records
