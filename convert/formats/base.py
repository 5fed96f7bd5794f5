"""The base of an adapter or projector, and tensors that replace its own."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.convert import tokenizer_files
from llava_jax.convert.formats.language import open_language, with_tower
from llava_jax.convert.formats.tower import open_tower
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import hub
from llava_jax.convert.io.lazy import Lazy, Leaf, cast
from llava_jax.convert.source import Options, Source, identify
from llava_jax.convert.table import configs, keys, language
from llava_jax.convert.vocabulary import EMBED, grown
from llava_jax.errors import WeightError
from llava_jax.params import FLOATS, check_params, component

log = logging.getLogger(__name__)


def open_base(folder: Path, data: dict[str, Any], options: Options, base: str | Path) -> Source:
    """The base of the adapter or projector in `folder`, whose own config.json is `data`.

    A language model is joined with the tower that `data` names, and still lacks a projector; a
    whole LLaVA is taken as it is. The vocabulary grows to what `data` says.
    """
    path = hub.resolve(base, options.allow_pickle)
    data = folders.without_quantisation(data)  # of QLoRA: its base was quantised while it trained
    kind = identify(path)
    if kind == "lora":
        raise WeightError(f"{path} is itself an adapter, not a base")
    if kind != "llama":
        from llava_jax.convert.checkpoint import open_source  # which needs this module

        whole = open_source(path, replace(options, base=None, dtype=None, merge=False, mixed=False))
        return _fitted(whole, data, folder) if data else whole
    lm = open_language(path, options)
    tower = open_tower(data, folder, options)
    legacy = tokenizer_files.legacy(path, default=True)
    described = {**lm.metadata["llama"]["config"], **data}
    config = configs.from_original(described, tower.config, str(folder / "config.json"), legacy)
    joined = with_tower(lm, tower, replace(config, language=lm.config.language), data, options)
    joined.tokenizer = folders.tokenizer_folder(folder, path)
    return _fitted(joined, data, folder)


def _fitted(base: Source, data: dict[str, Any], folder: Path) -> Source:
    """`base` with the settings of `data`, which must be of the same sizes but for the vocabulary.

    Rows that the base has beyond those of `data`, as Hugging Face's format adds them, stay.
    """
    have, where = base.config.language, str(folder / "config.json")
    if "hidden_size" not in data:
        return base
    want = language.language_config(data, where)
    for name in ("width", "layers", "heads", "kv_heads", "mlp_width"):
        if getattr(want, name) != getattr(have, name):
            raise WeightError(
                f"{folder} was made for a base with {name} {getattr(want, name)}, "
                f"this one has {getattr(have, name)}",
                fix="give the right --base",
            )
    rows = max(want.vocab_size, have.vocab_size)
    base.leaves = grown(base.leaves, have.vocab_size, rows)
    if "mm_projector_type" in data:
        old = base.config
        own = configs.from_original(data, old.vision, where, old.tokenizer_legacy)
        base.config = replace(own, template=old.template)
        base.metadata.setdefault("original", {"tower_inside": False, "tower": {}})["config"] = data
    base.config = replace(base.config, language=replace(have, vocab_size=rows))
    return base


def overlay(
    base: Source, state: Mapping[str, Lazy], config: LlavaConfig, where: str, options: Options
) -> Source:
    """`base` with the tensors of `state` (original names, any part of the model) in place of its own.

    Raises WeightError for a name that the original lacks, a wrong shape, or a projector in part.
    """
    plan = keys.pairings(keys.ORIGINAL, replace(config, lora=None))
    places = {name: p for p in plan for name in p.theirs}
    leaves, found = dict(base.leaves), {}
    for name, lazy in state.items():
        if name in places and places[name].ours == EMBED:
            found[name] = _all_rows(lazy, leaves[EMBED].parts[0], config.language.vocab_size)
        elif name in places or not keys.is_buffer(name):
            found[name] = lazy
    check_params(
        found,
        {name: p.their_shape for name, p in places.items()},
        where,
        noun="tensor",
        partial=True,
        types=lambda name: component(places[name].ours),
        mixed=options.mixed,
    )
    lacking = {}
    for p in plan:
        mine = [found.get(name) for name in p.theirs]
        old = leaves.get(p.ours)
        if options.dtype is None and old is not None and p.ours.startswith("language."):
            mine = [t and _of_type(t, old.dtype, where) for t in mine]
        if any(mine):
            kept = old.parts if old is not None else [None] * len(mine)
            parts = [p.move.to_ours(t) if t else kept[i] for i, t in enumerate(mine)]
            leaves[p.ours] = Leaf(tuple(t for t in parts if t), p.stacked)
        elif old is None:
            lacking |= dict.fromkeys(p.theirs, p.their_shape)
    check_params({}, lacking, where, noun="tensor")
    return replace(base, config=config, leaves={p.ours: leaves[p.ours] for p in plan})


def _of_type(lazy: Lazy, dtype: np.dtype, where: str) -> Lazy:
    """`lazy` in the type of the base it is laid over, as the original's load_state_dict does it."""
    if lazy.dtype.name in FLOATS and lazy.dtype != dtype:
        name = lazy.origin.rpartition(": ")[2]
        log.warning("%s: %s is %s, and cast to the base's %s", where, name, lazy.dtype, dtype)
        return cast(lazy, dtype)
    return lazy


def _all_rows(lazy: Lazy, old: Lazy, vocab: int) -> Lazy:
    """An embedding of all rows, or of the added ones only, as one of all rows."""
    if len(lazy.shape) != 2 or lazy.shape[0] >= vocab or lazy.shape[0] > 16:
        return lazy
    new = lazy.shape[0]
    return Lazy(
        old.shape,
        old.dtype,
        lambda: np.concatenate([old.read()[:-new], lazy.read().astype(old.dtype)]),
        f"{lazy.origin} over {old.origin}",
    )


def strip_peft(state: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """Original names from PEFT's: "base_model." goes, then a doubled "model." (builder.py's rule)."""
    state = {n.removeprefix("base_model."): t for n, t in state.items()}
    if any(n.startswith("model.model.") for n in state):
        state = {n.removeprefix("model."): t for n, t in state.items()}
    return state
