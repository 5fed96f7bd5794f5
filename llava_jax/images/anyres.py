"""High-resolution tiles of a picture, and which grid of tiles suits it.

Sources: llava/mm_utils.py of the original (select_best_resolution, resize_and_pad_image,
process_anyres_image); the idea is LLaVA-1.5-HD, arXiv 2310.03744 A.1. Unlike the paper, the code
squeezes the whole picture into a square for the global view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from llava_jax.errors import ConfigError

_BICUBIC = Image.Resampling.BICUBIC


def best_resolution(
    size: tuple[int, int], resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The (width, height) that keeps most of a picture's pixels; of equals, the one with the least waste."""
    width, height = size

    def merit(resolution: tuple[int, int]) -> tuple[int, int]:
        w, h = resolution
        scale = min(w / width, h / height)
        left = min(int(width * scale) * int(height * scale), width * height)
        return left, left - w * h

    return max(resolutions, key=merit)


def to_tiles(image: Image.Image, size: int, resolutions: Sequence[tuple[int, int]]) -> np.ndarray:
    """uint8[1 + tiles, size, size, 3]: the whole picture squeezed, then its tiles row by row.

    The picture is fitted into the best of `resolutions` (each a multiple of `size`) on black.
    """
    width, height = best_resolution(image.size, resolutions)
    if width % size or height % size:
        raise ConfigError(f"resolution {width}x{height} is not a multiple of the tile size {size}")
    if width / image.width < height / image.height:
        fitted = (width, min(math.ceil(image.height * (width / image.width)), height))
    else:
        fitted = (min(math.ceil(image.width * (height / image.height)), width), height)
    canvas = Image.new("RGB", (width, height))
    at = (width - fitted[0]) // 2, (height - fitted[1]) // 2
    canvas.paste(image.resize(fitted, _BICUBIC), at)
    whole = np.asarray(image.resize((size, size), _BICUBIC))
    tiles = np.asarray(canvas).reshape(height // size, size, width // size, size, 3)
    return np.concatenate([whole[None], tiles.swapaxes(1, 2).reshape(-1, size, size, 3)])
