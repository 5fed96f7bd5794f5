"""What a cast or a merge rounded, measured on what was written: a check of it says more than "equal"."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.convert import declared
from llava_jax.convert.opening import open_source
from llava_jax.convert.source import Options, Source


def measure(
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
    after = declared.types(t for n, t in written.leaves.items() if n in (names := set(names)))
    cast, merged = options.dtype is not None and before != after, options.merge and adapted
    if not cast and not merged:
        return None
    exact = align(open_source(path, replace(options, dtype="fp32")))
    worst, where, rounded = 0.0, "", 0
    for name in sorted(names):
        off = _furthest(exact, written, name)
        rounded += off > 0
        if off > worst:
            worst, where = off, name
    if not cast and not rounded:
        return None
    return {
        "kind": " and ".join(["merge"] * merged + ["cast"] * cast),
        "from": before,
        "to": after,
        "rounded": rounded,
        "max_abs": worst,
        "name": where,
    }


def _before(path: str | Path, options: Options) -> tuple[list[str], bool]:
    """(the types of the checkpoint as it lies there, whether it has adapters)."""
    if options.mixed:  # which cannot be opened without a cast
        source = open_source(path, replace(options, merge=False))
        return ["mixed types"], source.config.lora is not None
    source = open_source(path, replace(options, dtype=None, merge=False))
    kinds = declared.types(t for n, t in source.leaves.items() if ".lora_" not in n)
    return kinds, source.config.lora is not None


def _furthest(exact: Source, written: Source, name: str) -> float:
    """The largest distance of a value in `written` from what it was."""
    worst = 0.0
    for x, y in zip(exact.leaves[name].parts, written.leaves[name].parts):
        with np.errstate(invalid="ignore"):
            off = np.abs(x.read() - y.read().astype(np.float32))
        worst = max(worst, float(np.nan_to_num(off).max(initial=0.0)))
    return worst


def said(cast: dict[str, Any]) -> str:
    """One line about what `measure` found."""
    types = [" and ".join(cast[end]) for end in ("from", "to")]
    how = f"{cast['kind']} from {types[0]} to {types[1]}: "
    if not cast["rounded"]:
        return how + "no value was rounded"
    return how + (
        f"{cast['rounded']} tensors were rounded, by up to {cast['max_abs']:.3g} ({cast['name']})"
    )
