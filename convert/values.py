"""Whether the values of a checkpoint are numbers: NaN and infinity, found by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llava_jax.convert.source import Source

_CHUNK = 1 << 24  # values looked at together
# The exponent of each type, as bits: all ones there mean NaN or infinity (IEEE 754).
_EXPONENT = {
    "bfloat16": (np.uint16, 0x7F80),
    "float16": (np.uint16, 0x7C00),
    "float32": (np.uint32, 0x7F800000),
    "float64": (np.uint64, 0x7FF0000000000000),
}


def not_finite(values: Source | Mapping[str, Any], limit: int | None = None) -> list[str]:
    """The names of the tensors that hold NaN or infinity, in their order; at most `limit` of them.

    values: an open checkpoint, read tensor by tensor and named as its files name them
    ("model.safetensors: language_model.lm_head.weight", a layer of a stack as "...[3]"), or
    {name: array} with numpy or jax arrays of any floating type.
    """
    found = []
    for name, array in _arrays(values):
        if limit is not None and len(found) >= limit:
            break
        if not all_finite(array):
            found.append(name)
    return found


def all_finite(array: Any) -> bool:
    """Whether a numpy or jax array holds neither NaN nor infinity; integers never do."""
    if array.dtype.name not in _EXPONENT:
        return True
    if not isinstance(array, np.ndarray):
        import jax.numpy as jnp  # on its devices: a sharded array need not come to the host

        return bool(jnp.isfinite(array).all())
    kind, mask = _EXPONENT[array.dtype.name]
    # `array.T`: a transposed view lies in order the other way round, and is not copied.
    flat = (array if array.flags.c_contiguous else array.T).reshape(-1).view(kind)
    return not any(
        ((flat[i : i + _CHUNK] & mask) == mask).any() for i in range(0, len(flat), _CHUNK)
    )


def _arrays(values: Source | Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Source):
        yield from values.items()
        return
    for name, leaf in values.leaves.items():
        for i, part in enumerate(leaf.parts):
            yield part.origin or (f"{name}[{i}]" if leaf.stacked else name), part.read()
