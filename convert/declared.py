"""The dtype that a config.json declares: always that of the weights beside it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from llava_jax.convert.lazy import Lazy, Leaf

log = logging.getLogger(__name__)

KEYS = ("dtype", "torch_dtype")  # of transformers 5, and of 4 (which 5 reads too)


def types(tensors: Iterable[Leaf | Lazy]) -> list[str]:
    """The types of these parameters as torch calls them, such as ["bfloat16"]; most have one."""
    kinds: set[str] = set()
    for tensor in tensors:
        parts = tensor.parts if isinstance(tensor, Leaf) else (tensor,)
        kinds |= {p.dtype.name for p in parts}
    return sorted(kinds)


def declaring(
    data: Mapping[str, Any], tensors: Iterable[Leaf | Lazy], read: list[str] | None = None
) -> dict[str, Any]:
    """A config.json whose dtype fields, of either spelling and at any depth, are true of `tensors`.

    read: the types that were beside `data` when it was read. If they still are, what it said of them
    stays, unless it would round them. Otherwise the dtype is that of `tensors`; where these differ it
    is float32, which holds all of them: transformers loads every parameter in the one dtype of
    config.json. Fields that are not there are not added: without them it asks the weights.
    """
    kinds = types(tensors)
    if kinds == read and _said(data) <= {*kinds, "float32", None}:
        return dict(data)
    dtype = kinds[0] if len(kinds) == 1 else "float32"
    if len(kinds) > 1:
        log.warning(
            "the weights are %s: config.json says float32, so that loading them rounds nothing "
            "(--dtype brings them to one type)",
            " and ".join(kinds),
        )
    return _set(data, dtype)


def _said(data: Mapping[str, Any]) -> set[Any]:
    """Every dtype that a config.json names."""
    own = {data[k] if isinstance(data[k], str) else None for k in KEYS if k in data}
    return own.union(*(_said(v) for v in data.values() if isinstance(v, Mapping)))


def _set(data: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    out = {k: _set(v, dtype) if isinstance(v, Mapping) else v for k, v in data.items()}
    return out | {k: dtype for k in KEYS if k in out}
