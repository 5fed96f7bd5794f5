"""The loops of `resample`, compiled by numba. They release Python's lock, so threads run side by side.

No fastmath: weights must round as Pillow's do. Integer sums are exact in any order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from llava_jax.images.resample import BITS, SUPPORT

BLOCK = 64  # rows transposed at a time: their columns stay in a core's cache
TILE = 8
_HALF = 1 << (BITS - 1)


@njit(nogil=True, cache=True)
def taps(length, size):
    """(first, count, weights) of `Taps` for an axis of `length` pixels resized to `size`."""
    scale = length / size
    stretch = max(scale, 1.0)
    most = int(np.ceil(SUPPORT * stretch)) * 2 + 1
    first = np.zeros(size, np.int32)
    count = np.zeros(size, np.int32)
    weights = np.zeros((size, most), np.int32)
    kernel = np.zeros(most, np.float64)
    for i in range(size):
        center = (i + 0.5) * scale
        start = max(int(center - SUPPORT * stretch + 0.5), 0)
        end = min(int(center + SUPPORT * stretch + 0.5), length)
        total = 0.0
        for k in range(end - start):
            kernel[k] = _bicubic((k + start - center + 0.5) * (1.0 / stretch))
            total += kernel[k]
        for k in range(end - start):
            fixed = kernel[k] / total * (1 << BITS)
            weights[i, k] = int(fixed - 0.5) if kernel[k] < 0 else int(fixed + 0.5)
        first[i], count[i] = start, end - start
    return first, count, weights


@njit(nogil=True, cache=True)
def _bicubic(x):
    x, a = abs(x), -0.5
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0


@njit(nogil=True, cache=True)
def across(pixels, left, side, fill, first, count, weights, out):
    """Rows of RGBX pixels, uint32[H, W], with `fill` around them to `side`, to uint32[H, size]."""
    width = pixels.shape[1]
    columns = np.full((side, BLOCK), fill, np.uint32)
    column_bytes = columns.view(np.uint8)
    sums = np.empty(4 * BLOCK, np.int32)
    made = np.empty((len(first), BLOCK), np.uint32)
    made_bytes = made.view(np.uint8)
    for y in range(0, len(pixels), BLOCK):
        block = pixels[y : y + BLOCK]
        _transpose(block, columns[left : left + width])
        for x in range(len(first)):
            _weighted(column_bytes, first[x], count[x], weights[x], sums, made_bytes[x])
        _transpose(made[:, : len(block)], out[y : y + BLOCK])


@njit(nogil=True, cache=True)
def down(rows, first, count, weights, out):
    """RGBX, uint8[N, 4 * W], to RGB, uint8[size, W, 3]."""
    sums = np.empty(rows.shape[1], np.int32)
    made = np.empty(rows.shape[1], np.uint8)
    for y in range(len(first)):
        _weighted(rows, first[y], count[y], weights[y], sums, made)
        row = out[y]
        for x in range(len(row)):
            for c in range(3):
                row[x, c] = made[4 * x + c]


@njit(nogil=True, cache=True)
def _transpose(a, out):
    """out[:, :H] = a[H, W].T, in whole tiles that the compiler keeps in registers, then the rest."""
    height, width = a.shape
    h, w = height // TILE * TILE, width // TILE * TILE
    for x in range(0, w, TILE):
        for y in range(0, h, TILE):
            for i in range(TILE):
                for k in range(TILE):
                    out[x + i, y + k] = a[y + k, x + i]
    for y in range(height):
        for x in range(w if y < h else 0, width):
            out[x, y] = a[y, x]


@njit(nogil=True, cache=True)
def _weighted(rows, first, count, weights, sums, out):
    """The weighted sum of `count` rows from `first` on, rounded to uint8."""
    sums[:] = _HALF
    fours = count // 4 * 4
    for k in range(0, fours, 4):  # four at a time: sums are read and written less often
        w0, w1, w2, w3 = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        at = first + k
        r0, r1, r2, r3 = rows[at], rows[at + 1], rows[at + 2], rows[at + 3]
        for i in range(len(sums)):
            sums[i] += (
                np.int32(r0[i]) * w0
                + np.int32(r1[i]) * w1
                + np.int32(r2[i]) * w2
                + np.int32(r3[i]) * w3
            )
    for k in range(fours, count):
        weight, row = weights[k], rows[first + k]
        for i in range(len(sums)):
            sums[i] += np.int32(row[i]) * weight
    for i in range(len(sums)):
        out[i] = min(max(sums[i] >> BITS, 0), 255)
