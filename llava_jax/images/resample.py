"""Padding and bicubic resizing, equal to the bit to Pillow's and several times as fast.

The arithmetic is Pillow's (src/libImaging/Resample.c): across and then down, 22-bit fixed-point weights,
rounded to uint8 after each pass. Pillow adds one channel of one pixel at a time; here a block of rows is
transposed, so that the same weight serves neighbouring bytes and a core's vector unit adds them together.
numba (extra `fast`) compiles it on first use and keeps the result; without it callers use Pillow.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from llava_jax.images.jpeg import WORTH

log = logging.getLogger(__name__)

BITS = 32 - 8 - 2
"""Fixed-point bits of Pillow's 8-bit resampling."""
SUPPORT = 2.0
"""Of the bicubic kernel, in input pixels when enlarging."""
_STRIP = 2**20  # pixels of a picture that are copied at a time


class Taps(NamedTuple):
    """What makes each output pixel of an axis: `weights[i, :count[i]]` of the inputs from `first[i]` on."""

    first: np.ndarray  # int32[size]
    count: np.ndarray  # int32[size]
    weights: np.ndarray  # int32[size, most], fixed-point


def is_worth(image: Image.Image | np.ndarray) -> bool:
    """Whether `pad_resize` takes a picture: it is large enough, and numba is there."""
    width, height = size_of(image)
    return width * height >= WORTH and is_fast()


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height) of a picture or of uint8[H, W, 4]."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


@functools.cache
def is_fast() -> bool:
    """Whether numba is installed and may keep what it compiles. Imports it: a third of a second.

    Where it has kept nothing yet, all is compiled now, which takes some seconds, and said. False, with a
    warning, where what it kept cannot be read or written (a full disk, a damaged file): pixels are the same.
    """
    begun = time.monotonic()
    try:
        _compiled()
        pad_resize(np.zeros((8, 8, 4), np.uint8), 4, (0, 0, 0))
    except (ImportError, RuntimeError):  # RuntimeError: no folder for its cache can be written to
        return False
    except Exception as e:  # pickle says anything of damaged bytes
        stats = getattr(_compiled().down, "stats", None)
        where = stats and f" (numba's cache: {stats.cache_path})"
        log.warning("pictures are resized by Pillow, more slowly: %r%s", e, where or "")
        return False
    stats = getattr(_compiled().down, "stats", None)  # not where NUMBA_DISABLE_JIT is set
    if stats and stats.cache_misses:
        seconds = time.monotonic() - begun
        log.info("compiled the loops that resize pictures: %.0f s, once on this machine", seconds)
    return True


def pad_resize(
    image: Image.Image | np.ndarray, size: int, color: tuple[int, int, int]
) -> np.ndarray:
    """uint8[size, size, 3]: a picture in the middle of a square of `color`, resized bicubically.

    image: RGB, or uint8[H, W, 4] of which the fourth byte means nothing.
    """
    width, height = size_of(image)
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    run, taps = _compiled(), _taps(side, size)
    fill = np.frombuffer(bytes((*color, 0)), np.uint32)[0]
    narrow = np.full((side, size), fill, np.uint32)  # RGBX
    rows = max(1, _STRIP // width)
    for y in range(0, height, rows):
        pixels = _strip(image, y, min(y + rows, height))
        run.across(pixels, left, side, fill, *taps, narrow[top + y : top + y + len(pixels)])
    out = np.empty((size, size, 3), np.uint8)
    run.down(narrow.view(np.uint8), *taps, out)
    return out


def _strip(image: Image.Image | np.ndarray, top: int, bottom: int) -> np.ndarray:
    """uint32[H, W]: some rows of a picture as RGBX, not to be written to."""
    if isinstance(image, np.ndarray):
        pixels = image[top:bottom].view(np.uint32)[..., 0]
        pixels.flags.writeable = False
        return pixels
    part = image if bottom - top == image.height else image.crop((0, top, image.width, bottom))
    return np.frombuffer(part.tobytes("raw", "RGBX"), np.uint32).reshape(-1, image.width)


@functools.lru_cache(maxsize=256)
def _taps(length: int, size: int) -> Taps:
    taps = Taps(*_compiled().taps(length, size))
    if length == size:  # Pillow leaves out a pass that changes nothing
        taps = Taps(np.arange(size, dtype=np.int32), np.ones(size, np.int32), taps.weights.copy())
        taps.weights[:, 0] = 1 << BITS
    return taps


@functools.cache
def _compiled() -> Any:
    """The module of compiled loops, imported on first use."""
    from llava_jax.images import resample_loops

    return resample_loops
