"""The values of a checkpoint: NaN and infinity, and what a cast or a merge rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert.checkpoint import open_source
from llava_jax.convert.source import Options, Source
from llava_jax.convert.table.configs import types_of
from llava_jax.params import is_lora

_CHUNK = 1 << 24  # values checked together
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
    found = (name for name, array in _arrays(values) if not all_finite(array))
    return list(islice(found, limit))


def all_finite(array: Any) -> bool:
    """Whether a numpy or jax array holds neither NaN nor infinity; integers never do."""
    if array.dtype.name not in _EXPONENT:
        return True
    if not isinstance(array, np.ndarray):
        import jax.numpy as jnp  # on its devices: a sharded array need not come to the host

        return bool(jnp.isfinite(array).all())
    kind, mask = _EXPONENT[array.dtype.name]
    # A transposed view is contiguous as `array.T`, which needs no copy.
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


# Rounding -----------------------------------------------------------------------------------------


def rounding(
    path: str | Path,
    options: Options,
    written: Source,
    names: Iterable[str],
    align: Callable[[Source], Source],
) -> dict[str, Any] | None:
    """How far `written` is from the checkpoint at `path` before `options` cast or merged it.

    names: the parameters to look at. align: brings another opening of `path` to the vocabulary of
    `written`. Returns None where nothing was cast and no sum rounded, else
    kind: "cast", "merge" or "merge and cast". from, to: the types before and after.
    rounded: how many parameters changed. max_abs, name: by how much at most, and where, against the
    values in float32, which holds both 16-bit types.
    """
    if options.dtype is None and not options.merge:
        return None
    before, adapted = _before(path, options)
    wanted = set(names)
    after = types_of(t for n, t in written.leaves.items() if n in wanted)
    cast, merged = options.dtype is not None and before != after, options.merge and adapted
    if not cast and not merged:
        return None
    exact = align(open_source(path, replace(options, dtype="fp32")))
    off = {name: _furthest(exact, written, name) for name in sorted(wanted)}
    where = max(off, key=off.__getitem__, default="")
    rounded = sum(d > 0 for d in off.values())
    if not cast and not rounded:
        return None
    return {
        "kind": " and ".join(["merge"] * merged + ["cast"] * cast),
        "from": before,
        "to": after,
        "rounded": rounded,
        "max_abs": off.get(where, 0.0),
        "name": where if rounded else "",
    }


def _before(path: str | Path, options: Options) -> tuple[list[str], bool]:
    """(the types in the checkpoint's files, whether it has adapters)."""
    if options.mixed:  # cannot be opened without a cast
        source = open_source(path, replace(options, merge=False))
        return ["mixed types"], source.config.lora is not None
    source = open_source(path, replace(options, dtype=None, merge=False))
    kinds = types_of(t for n, t in source.leaves.items() if not is_lora(n))
    return kinds, source.config.lora is not None


def _furthest(exact: Source, written: Source, name: str) -> float:
    """The largest distance of a value in `written` from what it was."""
    parts = zip(exact.leaves[name].parts, written.leaves[name].parts)
    return max(distance(x.read(), y.read()) for x, y in parts)


def distance(x: np.ndarray, y: np.ndarray, nan: float = 0.0) -> float:
    """The largest |x - y| in float32; `nan` stands where it is not a number."""
    with np.errstate(invalid="ignore"):
        off = np.abs(x.astype(np.float32) - y.astype(np.float32))
    return float(np.nan_to_num(off, nan=nan).max(initial=0.0))


def rounding_text(cast: dict[str, Any]) -> str:
    """One line about what `rounding` found."""
    types = [" and ".join(cast[end]) for end in ("from", "to")]
    how = f"{cast['kind']} from {types[0]} to {types[1]}: "
    if not cast["rounded"]:
        return how + "no value was rounded"
    return how + (
        f"{cast['rounded']} tensors were rounded, by up to {cast['max_abs']:.3g} ({cast['name']})"
    )
