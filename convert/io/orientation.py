"""Which way square matrices lie: no shape says it, so an export records it and a reader checks.

Of every square matrix the checksums of its first row and first column are kept. A matrix whose first
row is now the recorded column has been transposed; one with other values is merely another matrix.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llava_jax.convert.io.lazy import Lazy
from llava_jax.errors import WeightError

FILE = Path("llava_jax") / "squares.json"
Edges = dict[str, list[list[int]]]  # name -> per layer of a stack (or once) [row, column]


def axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two axes of a tensor that could be swapped unseen: the last two, or a convolution's sides."""
    for a, b in ((-2, -1), (0, 1)) if len(shape) == 4 else ((-2, -1),):
        if len(shape) > 1 and shape[a] == shape[b] > 1:
            return a, b
    return None


def edges(data: memoryview, shape: tuple[int, ...], size: int) -> list[int]:
    """CRC-32 of what comes first on each of the `axes` of a tensor, from its bytes.

    size: bytes of one value.
    """
    array = np.frombuffer(data, f"u{size}").reshape(shape)
    return [_edge(array, axis) for axis in axes(shape) or ()]


def _edge(array: np.ndarray, axis: int) -> int:
    return zlib.crc32(array.take(0, axis).tobytes())


def check(record: Mapping[str, object], state: Mapping[str, Lazy]) -> None:
    """Raises WeightError naming the first matrix of `state` that was transposed since it was written.

    record: the content of FILE. Entries that fit nothing here are ignored.
    """
    for name, lazy in state.items():
        recorded = record.get(name)
        if not isinstance(recorded, list) or axes(lazy.shape) is None:
            continue
        array = lazy.read()
        layers = array if len(recorded) == len(array) and array.ndim == 3 else array[None]
        for layer, pair in zip(layers, recorded):
            swapped = axes(layer.shape)
            if swapped and isinstance(pair, list) and len(pair) == 2:
                row = _edge(layer, swapped[0])  # a column would touch every page of the file
                if row != pair[0] and row == pair[1]:
                    raise WeightError(f"{lazy.origin} is transposed: its rows were its columns")
