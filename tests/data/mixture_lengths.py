"""Lengths like those of LLaVA-1.5's data, for tests of packing that need no data.

Counts per source are the published ones of llava_v1_5_mix665k and of the 558K captions; mean text
lengths are guesses that give what a mixture of them has been estimated to have: mean 861 tokens, images
839, text alone 1,188, half below 802, nine tenths below 1,105, a hundredth cut at 2,048.
"""

import numpy as np

from llava_jax.data.packing import Sizes

IMAGE = 577  # its features, and the one BOS of a sample
CUT = 2048

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


def mixture(sources=None, share: float = 1.0, seed: int = 0) -> Sizes:
    """Lengths in the order of the sources. share: of each source's samples."""
    rng = np.random.RandomState(seed)
    found = []
    for name, (count, mean, spread, trained) in (sources or MIX_665K).items():
        images = int(name != "sharegpt")
        text = rng.lognormal(np.log(mean) - spread**2 / 2, spread, max(1, round(count * share)))
        text = np.maximum(text, 6).astype(np.int64)
        length = np.minimum(text + IMAGE * images, CUT)
        targets = np.maximum((length - IMAGE * images) * trained, 2).astype(np.int64)
        found.append((length, np.full(len(length), images), targets))
    return Sizes(*(np.concatenate(column).astype(np.int32) for column in zip(*found)))
