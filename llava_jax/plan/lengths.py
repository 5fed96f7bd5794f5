"""Lengths like those of LLaVA-1.5's data, drawn where no data are there to count. Imports no jax.

Samples per source are the published ones of llava_v1_5_mix665k and of the 558K captions; mean text
lengths are guesses that give what a mixture of them has been estimated to have: mean 861 tokens, images
839, text alone 1,188, half below 802, nine tenths below 1,105, a hundredth cut at 2,048.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llava_jax.data.packing import Sizes

# source: (samples, mean text tokens, spread of their logarithm, trained part)
MIX_665K = {
    "llava_instruct": (157_712, 345, 0.60, 0.70),
    "sharegpt": (40_688, 1_900, 1.00, 0.75),
    "vqav2": (82_783, 180, 0.30, 0.12),
    "gqa": (72_140, 215, 0.35, 0.12),
    "okvqa": (8_998, 90, 0.25, 0.10),
    "ocr_vqa": (80_000, 180, 0.20, 0.25),
    "a_okvqa": (66_160, 105, 0.20, 0.03),
    "textcaps": (21_953, 150, 0.35, 0.12),
    "refcoco": (48_447, 340, 0.50, 0.45),
    "vg": (86_417, 430, 0.20, 0.45),
}
CAPTIONS_558K = {"captions": (558_128, 15, 0.35, 0.93)}


@dataclass(frozen=True)
class Means:
    """What is known of the data, in place of the mixture's own; None where nothing is.

    samples: of an epoch. tokens (image features counted), targets, images: of a sample.
    """

    samples: int | None = None
    tokens: float | None = None
    targets: float | None = None
    images: float | None = None


UNKNOWN = Means()


def draw_sizes(
    sources=None,
    share: float = 1.0,
    seed: int = 0,
    *,
    means: Means = UNKNOWN,
    image_tokens: int = 576,
    longest: int = 2048,
) -> Sizes:
    """What each sample needs, in the order of the sources, MIX_665K if None.

    share: of each source's samples. longest: samples are cut there, so that they may be shorter than
    `means` says.
    """
    rng = np.random.RandomState(seed)
    sources = sources or MIX_665K
    total = sum(count for count, *_ in sources.values())
    share = means.samples / total if means.samples else share
    ends = np.rint(np.cumsum([0, *(count for count, *_ in sources.values())]) * share).astype(int)
    texts, parts, images = [], [], []
    for n, (name, (_, mean, spread, trained)) in enumerate(sources.items()):
        count = ends[n + 1] - ends[n]
        text = rng.lognormal(np.log(mean) - spread**2 / 2, spread, count)
        texts.append(np.maximum(text, 6))
        parts.append(np.full(count, trained))
        images.append(np.full(count, float(name != "sharegpt")))
    text, part, pictures = map(np.concatenate, (texts, parts, images))
    if means.images is not None:
        pictures = np.floor(means.images + rng.random_sample(len(text)))
    features = pictures * image_tokens + (pictures > 0)  # and the one BOS of a sample
    if means.tokens is not None:
        text = np.maximum(text * max(means.tokens - features.mean(), 1) / text.mean(), 2)
    length = np.minimum(text.astype(np.int64) + features.astype(np.int64), longest)
    learned = np.maximum((length - features) * part, 2)
    if means.targets is not None:
        learned = learned * means.targets / learned.mean()
    targets = np.clip(learned, 1, length)
    return Sizes(*(column.astype(np.int32) for column in (length, pictures, targets)))
