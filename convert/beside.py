"""An adapter beside its base: its factors, and what else of the model it changes, for unmerged use."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.convert.checkpoint import open_source
from llava_jax.convert.formats.adapter import merge
from llava_jax.convert.io import hub
from llava_jax.convert.io.lazy import Leaf
from llava_jax.convert.source import KINDS, Options, Source, identify
from llava_jax.errors import WeightError
from llava_jax.params import is_lora, parameter_shapes


def read_beside(
    path: str | Path, base: str | Path, own: Source, options: Options
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """(LoRA on the decoder, {name: array}) of an adapter of the model that `own` is, opened from `base`.

    The arrays are its factors, and those parameters of tower and projector that are not the base's;
    adapters on these two are merged into them.
    Raises WeightError for what cannot be used beside the base: another base, trained weights of the
    decoder other than LoRA's, DoRA.
    """
    where, merged = str(path), f"merge it: llava-jax convert {path} OUT --to jax --merge"
    kind = identify(hub.resolve(path, options.allow_pickle))
    if kind not in ("lora", "jax"):
        raise WeightError(f"{where} is a {KINDS[kind]}, not a LoRA adapter")
    whole = kind == "jax"  # the base is inside
    source = open_source(path, replace(options, base=None if whole else base, merge=False))
    lora = source.config.lora
    if lora is None:
        raise WeightError(f"{where} holds no LoRA factors", fix="serve it as a model of its own")
    if lora.dora:
        raise WeightError(f"{where} is DoRA, which cannot be used unmerged", fix=merged)
    _check_base(source, where, base, own.config)
    targets = tuple(t for t in lora.targets if t.startswith("language."))
    if not targets:
        raise WeightError(f"{where} adapts nothing of the decoder", fix=merged)
    seen = tuple(t for t in lora.targets if t not in targets)
    leaves = {n: leaf for n, leaf in source.leaves.items() if is_lora(n) and n.startswith(targets)}
    if seen:
        part = replace(source, config=replace(source.config, lora=replace(lora, targets=seen)))
        source = replace(source, leaves=merge(part, options.type).leaves | leaves)
    for name, leaf in source.leaves.items():
        if is_lora(name) or _same(leaf, own.leaves.get(name), by_name=not whole):
            continue
        if name.startswith("language."):
            what = f"{where}: {name} is not the base's, and only LoRA can be used unmerged"
            raise WeightError(what, fix=merged)
        leaves[name] = leaf
    lora = replace(lora, targets=targets)
    return lora, {name: leaf.read() for name, leaf in leaves.items()}


def _check_base(source: Source, where: str, base: str | Path, own: LlavaConfig) -> None:
    """Raises WeightError unless the adapter is of a model like `own`, under the name of `base`."""
    found = replace(source.config, lora=None)
    shapes = parameter_shapes(own)
    for name, shape in parameter_shapes(found).items():
        if shapes.get(name) != shape:
            what = f"{where}: {name} is {shape} in its model, {shapes.get(name)} in {base}"
            raise WeightError(what, fix="serve it beside its own base")
    for field in fields(LlavaConfig):
        # What only training or the tokenizer reads changes no answer.
        if field.name in ("lora", "quantize", "max_length", "tokenizer_legacy"):
            continue
        theirs, ours = getattr(found, field.name), getattr(own, field.name)
        if theirs != ours:
            what = (
                f"{where}: {field.name} is {_short(theirs)} in its model, {_short(ours)} in {base}"
            )
            fix = "serve it beside its own base, or merged"
            if field.name == "image_aspect_ratio":
                fix = f"load the model with --image-aspect-ratio {theirs}, or serve it merged"
            raise WeightError(what, fix=fix)
    settings = (source.metadata.get("lora") or {}).get("adapter_config") or {}
    named = settings.get("base_model_name_or_path")
    if isinstance(named, str) and named and _last(named) not in _names(base):
        raise WeightError(
            f"{where} was trained on {named[:100]!r}, and the model here is {str(base)[:100]!r}",
            fix="if they are the same, set base_model_name_or_path in its adapter_config.json to null",
        )


def _names(base: str | Path) -> set[str]:
    """What a base may be called: a folder by the name it was given, or that of what a link leads to."""
    path = hub.local(base)
    return {_last(os.path.abspath(path)), _last(os.path.realpath(path))}


def _last(name: str) -> str:
    return Path(name).name.partition("@")[0].lower()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _same(a: Leaf, b: Leaf | None, by_name: bool) -> bool:
    """Whether a parameter is the base's: of the same values, or `by_name` read from the same place."""
    if b is None or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    # Origins have no folder: an adapter's files are called otherwise than a model's.
    if by_name and [p.origin for p in a.parts] == [p.origin for p in b.parts]:
        return True
    return all(np.array_equal(x.read(), y.read()) for x, y in zip(a.parts, b.parts))
