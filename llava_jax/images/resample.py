"""A window of a bicubic resize along one axis, equal to the bit to Pillow's resize and then crop.

Pillow can only make the whole resized image. CLIP's plain preprocessing of a 1x8192 picture would ask
for 336 x 2,752,512 pixels (3.7 GB) of which 336 x 336 are kept; this makes only those.
"""

from __future__ import annotations

import math

import numpy as np

_BITS = 32 - 8 - 2  # fixed-point bits of Pillow's 8-bit resampling (src/libImaging/Resample.c)
_SUPPORT = 2.0  # of the bicubic kernel, in input pixels when enlarging


def resize_window(pixels: np.ndarray, axis: int, size: int, start: int, count: int) -> np.ndarray:
    """Rows `start` .. `start + count` of `pixels` resized bicubically to `size` along `axis`.

    pixels: uint8[H, W, C]. Returns uint8 with `count` in place of that axis's length.
    """
    moved = np.moveaxis(pixels, axis, 0)
    out = np.empty((count, *moved.shape[1:]), np.uint8)
    for i in range(count):
        first, weights = _weights(len(moved), size, start + i)
        taps = moved[first : first + len(weights)].astype(np.int64)
        total = np.tensordot(weights, taps, axes=1) + (1 << (_BITS - 1))
        out[i] = np.clip(total >> _BITS, 0, 255)
    return np.moveaxis(out, 0, axis)


def _weights(length: int, size: int, index: int) -> tuple[int, np.ndarray]:
    """(first input pixel, int64[taps] fixed-point weights) of output pixel `index`."""
    scale = length / size
    stretch = max(scale, 1.0)
    center = (index + 0.5) * scale
    first = max(int(center - _SUPPORT * stretch + 0.5), 0)
    last = min(int(center + _SUPPORT * stretch + 0.5), length)
    kernel = [_bicubic((x - center + 0.5) * (1.0 / stretch)) for x in range(first, last)]
    total = 0.0
    for w in kernel:  # in Pillow's order: the sum must round as it does there
        total += w
    fixed = [math.copysign(0.5, w) + w / total * (1 << _BITS) for w in kernel]
    return first, np.array([int(w) for w in fixed], np.int64)


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0
