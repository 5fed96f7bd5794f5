"""What lies where on the mesh, and how many bytes of it a device holds: printed before the first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from llava_jax.params import component, is_lora, weights_in
from llava_jax.sharding import MESH_AXES
from llava_jax.train.step import TrainState

_KINDS = {"attn": "attention", "mlp": "MLP", "embed": "vocabulary", "head": "vocabulary"}


@dataclass
class _Row:
    """Parameters of one kind and type."""

    count: int = 0
    bytes: int = 0
    axes: set[str] = field(default_factory=set)


def placement(state: TrainState, frozen: Mapping[str, Any], batch: Any) -> str:
    """A table of parameters by kind, the mesh axes that split them, and bytes on a device.

    state, frozen, batch: what a step takes; arrays, or jax.ShapeDtypeStructs with shardings.
    """
    rows: dict[tuple[str, str, str], _Row] = {}
    for how, params in (("trained", state.params), ("frozen", frozen)):
        for name, leaf in params.items():
            row = rows.setdefault((kind(name), how, leaf.dtype.name), _Row())
            row.count += weights_in(name, leaf)
            row.bytes += bytes_on_a_device(leaf)
            row.axes |= _axes(leaf)
    lines = [("parameters", "", "type", "split over", "MB a device")]
    for (what, how, dtype), row in rows.items():
        over = " x ".join(axis for axis in MESH_AXES if axis in row.axes) or "nothing"
        lines.append((what, f"{row.count:,} {how}", dtype, over, _megabytes(row.bytes)))
    for what, tree in (("optimizer", state.opt_state), ("batch", batch)):
        lines.append((what, "", "", "", _megabytes(bytes_on_a_device(tree))))
    wide = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join((*map(str.ljust, line[:-1], wide), line[-1].rjust(wide[-1]))) for line in lines
    )


def kind(name: str) -> str:
    """What a parameter is, in a few words: "language attention", "vision norms and biases"."""
    part = component(name)
    if is_lora(name):
        return f"{name.partition('.')[0]} adapters"
    if name.endswith((".scale", ".bias")):
        return f"{part} norms and biases"
    words = [_KINDS[w] for w in name.split(".") if w in _KINDS]
    return f"{part} {words[0]}" if words else f"{part} matrices"


def bytes_on_a_device(tree: Any) -> int:
    """The bytes that the shards of `tree` take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _axes(leaf: Any) -> set[str]:
    """The mesh axes that split a leaf into more than one part."""
    sharding, found = leaf.sharding, []
    for entry in getattr(sharding, "spec", ()):
        found += [a for a in (entry if isinstance(entry, tuple) else (entry,)) if a]
    return {axis for axis in found if sharding.mesh.shape[axis] > 1}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
