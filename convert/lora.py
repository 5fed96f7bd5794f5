"""LoRA adapters over a base: PEFT's files, of the original LLaVA or on Hugging Face's.

PEFT's rule: W + scale * B @ A with scale = alpha / r (alpha / sqrt(r) with use_rslora).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LoraConfig
from llava_jax.convert import adapter_config, compose, keymap, tensors
from llava_jax.convert.lazy import Lazy, Leaf, cast, of_array
from llava_jax.convert.source import Options, Source, check
from llava_jax.errors import WeightError
from llava_jax.params import LINEARS, check_params

log = logging.getLogger(__name__)

_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_BLOCKS = {"attn": "self_attn", "mlp": "mlp"}
_PREFIXES = tuple(f"{lay.lm}." for lay in (*keymap.HF_LAYOUTS, keymap.ORIGINAL))


def open_adapter(folder: Path, options: Options) -> Source:
    """An adapter folder over its base, unmerged: leaves `<linear>.lora_a`, `<linear>.lora_b`.

    The base is `options.base` or the one adapter_config.json names. Linear layers that the adapter
    leaves out get zero factors. Raises WeightError for variants of LoRA that change the formula.
    """
    settings = tensors.read_json(folder / adapter_config.FILE, required=True)
    lora = adapter_config.lora_config(settings)
    data = tensors.read_json(folder / "config.json")
    adapter_file = tensors.first_file(folder, tensors.ADAPTER_FILES)
    if adapter_file is None:
        raise WeightError(f"{folder}: has no adapter_model file")
    state = tensors.read_file(adapter_file, options.allow_pickle)
    more_file = tensors.first_file(folder, tensors.NON_LORA_FILES)
    more = tensors.read_file(more_file, options.allow_pickle) if more_file else {}
    factors = {n: t for n, t in state.items() if ".lora_" in n}
    elsewhere = {n: t for n, t in factors.items() if _outside(n)}
    factors = {n: t for n, t in factors.items() if n not in elsewhere}
    more |= {n: t for n, t in state.items() if ".lora_" not in n}
    _refuse_vocabulary(state, folder.name)
    under = compose.open_base(folder, data, options, _base(folder, settings, options))
    raw, more = list(more), _to_original(compose.strip_peft(more))
    adapter_config.check_saved(settings, raw, folder.name)
    source = compose.overlay(under, more, under.config, folder.name, options)
    _merge_elsewhere(elsewhere, source, lora, folder.name, options)
    files = [adapter_file, *([more_file] if more_file else [])]
    if elsewhere and not factors:  # merged, so that nothing of the adapter is left
        check(source)
        return replace(source, kind="lora", files=source.files + files)
    source.config = replace(source.config, lora=lora)
    source.leaves |= _leaves(factors, source, lora, settings, folder.name, options)
    source.kept["lora"] = {
        "adapter_config": settings,
        "config": data,
        "adapter_file": adapter_file.name,
        "non_lora_file": more_file.name if more_file else None,
        "prefix": _prefix(factors),
        # Whole tensors that go along: the file's own names -> the original's.
        "whole": {n: o for n, o in zip(raw, more) if not keymap.is_buffer(o)},
        "in_adapter": [n for n in raw if n in state],
    }
    check(source)
    return replace(source, kind="lora", files=source.files + files)


def merge(source: Source, dtype: np.dtype | None = None) -> Source:
    """The same model without adapters: each kernel plus its update, summed in float32.

    The sum is rounded once: to `dtype`, or to the kernel's own type.
    """
    lora = source.config.lora
    if lora is None:
        return source
    leaves = {n: t for n, t in source.leaves.items() if ".lora_" not in n}
    for name in LINEARS:
        at = f"language.layers.{name}"
        a, b, kernel = (source.leaves[f"{at}.{k}"] for k in ("lora_a", "lora_b", "kernel"))
        parts = tuple(
            _merged(w, x, y, lora.scale, dtype) for w, x, y in zip(kernel.parts, a.parts, b.parts)
        )
        leaves[f"{at}.kernel"] = Leaf(parts, True)
    kept = {k: v for k, v in source.kept.items() if k != "lora"}
    return replace(source, leaves=leaves, config=replace(source.config, lora=None), kept=kept)


def _merged(kernel: Lazy, a: Lazy, b: Lazy, scale: float, dtype: np.dtype | None) -> Lazy:
    def read() -> np.ndarray:
        update = a.read().astype(np.float32) @ b.read().astype(np.float32)
        update *= np.float32(scale)
        return kernel.read().astype(np.float32) + update

    whole = Lazy(kernel.shape, np.dtype(np.float32), read, kernel.origin)
    return cast(whole, dtype or kernel.dtype)


def _refuse_vocabulary(names: Iterable[str], where: str) -> None:
    """Raises WeightError for adapters on the token embedding or the head."""
    for name in names:
        match = re.search(r"\b(embed_tokens|lm_head)\.(lora_|base_layer)", name)
        if match:
            raise WeightError(
                f"{where}: adapters on {match[1]} are not supported", fix=adapter_config.MERGE
            )


def _outside(name: str) -> bool:
    """Whether an adapter is on the tower or the projector (PEFT matches names like q_proj there too)."""
    return any(
        f".{part}." in name for part in ("vision_tower", "multi_modal_projector", "mm_projector")
    )


def _merge_elsewhere(
    factors: dict[str, Lazy], source: Source, lora: LoraConfig, where: str, options: Options
) -> None:
    """Adds adapters outside of the language model into their kernels: they are not kept apart."""
    if not factors:
        return
    log.info("%s: adapters outside of the language model are merged", where)
    config = replace(source.config, lora=None)
    hugging_face = keymap.HF_LAYOUTS if config.projector == "mlp2x_gelu" else ()
    places = {
        name: (entry.ours, i)
        for layout in (*hugging_face, keymap.ORIGINAL)
        for entry in keymap.entries(layout, config)
        for i, name in enumerate(entry.theirs)
    }
    shapes = {name: lazy.shape for name, lazy in factors.items()}
    check_params(factors, shapes, where, types=lambda _: "adapter")
    pairs: dict[str, dict[str, Lazy]] = {}
    for name, lazy in factors.items():
        match = _NAME.fullmatch(name)
        if not match or f"{match[1]}.weight" not in places:
            raise WeightError(f"{where}: unknown tensor {name}")
        pairs.setdefault(match[1], {})[match[2]] = lazy
    for path, pair in pairs.items():
        ours, i = places[f"{path}.weight"]
        leaf = source.leaves[ours]
        if len(leaf.parts[i].shape) != 2:
            raise WeightError(
                f"{where}: adapters of {path} are not supported", fix=adapter_config.MERGE
            )
        d_in, d_out = leaf.parts[i].shape
        if set(pair) != {"A", "B"}:
            raise WeightError(f"{where}: missing lora_{'BA'['B' in pair]} of {path}")
        for letter, shape in (("A", (lora.rank, d_in)), ("B", (d_out, lora.rank))):
            if pair[letter].shape != shape:
                have = list(pair[letter].shape)
                raise WeightError(f"{pair[letter].origin} has shape {have}, not {list(shape)}")
        a, b = (keymap._moved(pair[letter], keymap.T) for letter in "AB")
        parts = list(leaf.parts)
        parts[i] = _merged(parts[i], a, b, lora.scale, options.type)
        source.leaves[ours] = Leaf(tuple(parts), leaf.stacked)


def adapter_state(source: Source, prefix: str, targets: set[str] | None) -> dict[str, Lazy]:
    """The adapters of `source` under PEFT's names; `targets` limits them to some linear layers.

    prefix: the decoder's name in the model the adapter is for, such as "model."
    """
    state = {}
    for name in LINEARS:
        block, ours = name.split(".")
        if targets is not None and f"{ours}_proj" not in targets:
            continue
        for letter in "ab":
            leaf = source.leaves[f"language.layers.{name}.lora_{letter}"]
            for i, part in enumerate(leaf.parts):
                theirs = f"{prefix}layers.{i}.{_BLOCKS[block]}.{ours}_proj.lora_{letter.upper()}"
                state[f"base_model.model.{theirs}.weight"] = part.map(
                    keymap.T.to_theirs, part.shape[::-1]
                )
    return state


def _leaves(
    factors: dict[str, Lazy],
    source: Source,
    lora: LoraConfig,
    settings: dict[str, Any],
    where: str,
    options: Options,
) -> dict[str, Leaf]:
    """PEFT's factors as stacked leaves; a linear layer without any gets zeros."""
    language, layers = source.config.language, source.config.language.layers
    found: dict[tuple[str, int, str], Lazy] = {}
    for name, lazy in factors.items():
        found[_place(name, where)] = lazy
    shapes = {name: lazy.shape for name, lazy in factors.items()}
    check_params(factors, shapes, where, types=lambda _: "adapter", mixed=options.mixed)
    kinds = {linear for linear, _, _ in found}
    for name in _targets(settings):
        if name not in kinds:
            raise WeightError(f"{where}: missing the adapters of {name.split('.')[1]}_proj")
    if not factors:
        raise WeightError(f"{where}: has no adapters on the language model")
    dtype = next(iter(factors.values())).dtype
    leaves = {}
    for name in LINEARS:
        _, d_in, d_out = source.leaves[f"language.layers.{name}.kernel"].shape
        for letter, shape in (("A", (lora.rank, d_in)), ("B", (d_out, lora.rank))):
            parts = []
            for i in range(layers):
                lazy = found.pop((name, i, letter), None)
                if lazy is None and name in kinds:
                    raise WeightError(
                        f"{where}: missing lora_{letter} of {name} in layer {i}",
                        fix=f"for an adapter on some layers only, {adapter_config.MERGE}",
                    )
                if lazy is None:
                    lazy = of_array(np.broadcast_to(np.zeros((), dtype), shape), "not adapted")
                if lazy.shape != shape:
                    raise WeightError(
                        f"{lazy.origin} has shape {list(lazy.shape)}, the base wants {list(shape)}"
                    )
                parts.append(keymap._moved(lazy, keymap.T))
            leaves[f"language.layers.{name}.lora_{letter.lower()}"] = Leaf(tuple(parts), True)
    if found:
        name, i, _ = next(iter(found))
        raise WeightError(
            f"{where}: adapters for layer {i} of {name}, the base has {language.layers} layers"
        )
    return leaves


def _place(name: str, where: str) -> tuple[str, int, str]:
    """("attn.q", layer, "A") of a PEFT name."""
    match = _NAME.fullmatch(name)
    path = match[1] if match else ""
    for prefix in _PREFIXES:
        inner = re.fullmatch(
            re.escape(prefix) + r"layers\.(\d+)\.(self_attn|mlp)\.([a-z]+)_proj", path
        )
        if match and inner:
            linear = f"{'attn' if inner[2] == 'self_attn' else 'mlp'}.{inner[3]}"
            if linear in LINEARS:
                return linear, int(inner[1]), match[2]
    raise WeightError(
        f"{where}: unknown tensor {name}",
        fix="adapters on the language model's linear layers are supported",
    )


def _targets(settings: dict[str, Any]) -> list[str]:
    """The linear layers that adapter_config.json lists by name."""
    listed = adapter_config.targets(settings) or ()
    return [n for n in LINEARS if f"{n.split('.')[1]}_proj" in listed]


def _prefix(factors: dict[str, Lazy]) -> str:
    for name in factors:
        match = _NAME.fullmatch(name)
        for prefix in _PREFIXES:
            if match and match[1].startswith(f"{prefix}layers."):
                return prefix
    return "model."


def _to_original(state: dict[str, Lazy]) -> dict[str, Lazy]:
    """Whole tensors saved with a Hugging Face adapter (modules_to_save), under the original's names."""
    pairs = (
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("language_model.", "model."),
    )
    out = {}
    for name, lazy in state.items():
        inner = name.removeprefix("model.")
        theirs = next(
            (new + inner[len(old) :] for old, new in pairs if inner.startswith(old)), name
        )
        out[theirs] = lazy
    return out


def _base(folder: Path, settings: dict[str, Any], options: Options) -> str | Path:
    if options.base is not None:
        return options.base
    name = settings.get("base_model_name_or_path")
    if isinstance(name, str) and name and ".." not in Path(name).parts:
        for place in (folder / name, folder.parent / name, Path(name)):
            if (place / "config.json").is_file() or (place / "llava_jax.json").is_file():
                return place
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            revision = settings.get("revision")
            return f"{name}@{revision}" if isinstance(revision, str) and revision else name
    said = f"its base {ascii(name)[:80]} is not here" if name else "it names no base model"
    raise WeightError(f"{folder}: {said}", fix="give --base")
