"""LoRA adapters over a base: PEFT's files, of the original LLaVA or on Hugging Face's.

PEFT's rule: W + scale * B @ A with scale = alpha / r (alpha / sqrt(r) with use_rslora).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.convert import vocabulary
from llava_jax.convert.formats import adapter_config
from llava_jax.convert.formats.base import open_base, overlay, strip_peft
from llava_jax.convert.formats.original import write_config
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import output, torch_file
from llava_jax.convert.io.lazy import Lazy, Leaf, of_array, summed
from llava_jax.convert.io.output import Progress, write_json
from llava_jax.convert.source import Options, Source, Target, still_means
from llava_jax.convert.table import keys
from llava_jax.errors import WeightError
from llava_jax.params import LINEARS, check_params, is_lora, unique

log = logging.getLogger(__name__)

_PEFT = "base_model.model."
_LAYOUTS = tuple(layout.decoder for layout in (*keys.HF_LAYOUTS, keys.ORIGINAL))


def open_adapter(folder: Path, options: Options) -> Source:
    """An adapter folder over its base, unmerged: leaves `<linear>.lora_a`, `<linear>.lora_b`.

    The base is `options.base` or the one adapter_config.json names. Linear layers that the adapter
    leaves out get zero factors. Raises WeightError for variants of LoRA that change the formula.
    """
    settings = folders.read_json(folder / adapter_config.FILE, required=True)
    lora = adapter_config.lora_config(settings)
    data = folders.read_json(folder / "config.json")
    file = folders.first_file(folder, folders.ADAPTER_FILES)
    if file is None:
        raise WeightError(f"{folder}: there is no adapter_model file")
    state = folders.read_file(file, options.allow_pickle)
    beside = folders.first_file(folder, folders.NON_LORA_FILES)
    more = folders.read_file(beside, options.allow_pickle) if beside else {}
    # The name of PEFT's adapter, which some files have in a factor's name, goes.
    factors = unique(
        (n.replace(".default.weight", ".weight"), t) for n, t in state.items() if ".lora_" in n
    )
    elsewhere = {n: factors.pop(n) for n in list(factors) if _is_elsewhere(n)}
    more |= {n: t for n, t in state.items() if ".lora_" not in n}
    _refuse_vocabulary(state, folder.name)
    base = open_base(folder, data, options, _base(folder, settings, options))
    adapter_config.check_saved(settings, more, folder.name)
    whole = unique(keys.to_original(strip_peft(more), base.config))
    source = overlay(base, whole, base.config, folder.name, options)
    _merge_elsewhere(elsewhere, source, lora, folder.name, options)
    files = [*source.files, file, *([beside] if beside else [])]
    source = replace(source, kind="lora", files=files)
    if elsewhere and not factors:  # merged, so that nothing of the adapter is left
        source.check()
        return source
    source.config = replace(source.config, lora=lora)
    layout = keys.best_layout(factors, _LAYOUTS, source.config)
    source.leaves |= _leaves(factors, layout, source.config, settings, folder.name, options)
    source.metadata["lora"] = {
        "adapter_config": settings,
        "config": data,
        "adapter_file": file.name,
        "non_lora_file": beside.name if beside else None,
        "prefix": f"{layout.lm}.",
        # Whole tensors that go along: the file's own names -> the original's.
        "whole": {n: o for n, o in zip(more, whole) if not keys.is_buffer(o)},
        "in_adapter": [n for n in more if n in state],
    }
    source.check()
    return source


def _refuse_vocabulary(names: Iterable[str], where: str) -> None:
    """Raises WeightError for adapters on the token embedding or the head."""
    for name in names:
        match = re.search(r"\b(embed_tokens|lm_head)\.(lora_|base_layer)", name)
        if match:
            raise WeightError(
                f"{where}: adapters on {match[1]} are not supported", fix=adapter_config.MERGE
            )


def _leaves(
    factors: Mapping[str, Lazy],
    layout: keys.Layout,
    config: LlavaConfig,
    settings: dict[str, Any],
    where: str,
    options: Options,
) -> dict[str, Leaf]:
    """PEFT's factors as stacked leaves; a linear layer without any gets zeros."""
    if not factors:
        raise WeightError(f"{where} has no adapters on the language model")
    listed = adapter_config.targets(settings) or ()
    plan = [p for p in keys.pairings(layout, config) if is_lora(p.ours)]
    adapted = {  # linear layers, by the name that their two factors share but for its last letter
        p.ours[:-1]
        for p in plan
        if _module(p.theirs[0]) in listed or any(n in factors for n in p.theirs)
    }
    expected = {n: p.their_shape for p in plan if p.ours[:-1] in adapted for n in p.theirs}
    try:
        _check(factors, expected, where, mixed=options.mixed)
    except WeightError as error:
        fix = f"for an adapter on some layers only, {adapter_config.MERGE}"
        raise WeightError(error.message, fix=error.fix or fix) from None
    zero = np.zeros((), next(iter(factors.values())).dtype)
    leaves = {}
    for p in plan:
        absent = of_array(np.broadcast_to(zero, p.their_shape), "not adapted")
        leaves[p.ours] = p.leaf(factors.get(n, absent) for n in p.theirs)
    return leaves


def _check(
    factors: Mapping[str, Lazy],
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    mixed: bool = False,
) -> None:
    check_params(
        factors, expected, where, noun="tensor", types=lambda _: "the adapter", mixed=mixed
    )


def _module(name: str) -> str:
    """The module that a factor belongs to, as target_modules lists it: "q_proj"."""
    return name.partition(".lora_")[0].rpartition(".")[2]


def merge(source: Source, dtype: np.dtype | None = None) -> Source:
    """The same model without adapters: each kernel plus its update, summed in float32.

    The sum is rounded once: to `dtype`, or to the kernel's own type.
    """
    config = source.config
    if config.lora is None:
        return source
    leaves = {n: t for n, t in source.leaves.items() if not is_lora(n)}
    for name in LINEARS:
        at = f"language.layers.{name}"
        parts = zip(*(source.leaves[f"{at}.{k}"].parts for k in ("kernel", "lora_a", "lora_b")))
        sums = tuple(_merged(w, a, b, config.lora.scale, dtype) for w, a, b in parts)
        leaves[f"{at}.kernel"] = Leaf(sums, True)
    metadata = {k: v for k, v in source.metadata.items() if k != "lora"}
    return replace(source, leaves=leaves, config=replace(config, lora=None), metadata=metadata)


def _merged(kernel: Lazy, a: Lazy, b: Lazy, scale: float, dtype: np.dtype | None) -> Lazy:
    def read() -> np.ndarray:
        update = a.read().astype(np.float32) @ b.read().astype(np.float32)
        update *= np.float32(scale)
        return kernel.read().astype(np.float32) + update

    return summed(read, kernel, dtype)


def _is_elsewhere(name: str) -> bool:
    """Whether an adapter is on the tower or the projector (PEFT matches names like q_proj there too)."""
    return any(
        f".{part}." in name for part in ("vision_tower", "multi_modal_projector", "mm_projector")
    )


def _merge_elsewhere(
    factors: dict[str, Lazy], source: Source, lora: LoraConfig, where: str, options: Options
) -> None:
    """Adds adapters outside of the language model into their kernels; changes `source.leaves`."""
    if not factors:
        return
    log.info("%s: adapters outside of the language model are merged", where)
    config = replace(source.config, lora=None)
    places = {}
    for layout in (*keys.hf_layouts(config), keys.ORIGINAL):
        places |= keys.places(layout, config)
    expected, kernels = {}, {}
    for name in factors:
        path = name.removeprefix(_PEFT).partition(".lora_")[0]
        pairing, i = places.get(f"{path}.weight", (None, 0))
        if pairing is None:
            continue  # _check names it
        if len(pairing.their_shape) != 2:
            raise WeightError(
                f"{where}: adapters on {path} are not supported", fix=adapter_config.MERGE
            )
        d_out, d_in = pairing.their_shape
        a, b = (f"{_PEFT}{path}.lora_{letter}.weight" for letter in "AB")
        expected |= {a: (lora.rank, d_in), b: (d_out, lora.rank)}
        kernels[pairing.ours, i] = a, b
    _check(factors, expected, where)
    for (ours, i), pair in kernels.items():
        a, b = (keys.T.to_ours(factors[name]) for name in pair)
        parts = list(source.leaves[ours].parts)
        parts[i] = _merged(parts[i], a, b, lora.scale, options.type)
        source.leaves[ours] = Leaf(tuple(parts), source.leaves[ours].stacked)


def _base(folder: Path, settings: dict[str, Any], options: Options) -> str | Path:
    """The base: that of the options, or a folder or hub id that adapter_config.json names."""
    if options.base is not None:
        return options.base
    name = settings.get("base_model_name_or_path")
    if isinstance(name, str) and name and ".." not in Path(name).parts:
        place = folders.find_beside(name, folder, "config.json", "llava_jax.json")
        if place is not None:
            return place
        if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            revision = settings.get("revision")
            return f"{name}@{revision}" if isinstance(revision, str) and revision else name
    said = f"its base {ascii(name)[:80]} is not here" if name else "it names no base model"
    raise WeightError(f"{folder}: {said}", fix="give --base")


# Writing ------------------------------------------------------------------------------------------


def adapter_state(source: Source, prefix: str, targets: set[str] | None) -> dict[str, Lazy]:
    """The adapters of `source` under PEFT's names; `targets` limits them to some linear layers.

    prefix: the decoder's name in the model the adapter is for, such as "model."
    """
    layout = replace(keys.LLAMA, lm=prefix.removesuffix("."))
    state = keys.to_theirs(source.leaves, layout, source.config)
    return {
        name: t
        for name, t in state.items()
        if ".lora_" in name and (targets is None or _module(name) in targets)
    }


def write_lora(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """The original's pair: adapter_model and non_lora_trainables.bin (the projector)."""
    source = vocabulary.original_rows(source)
    read = source.metadata.get("lora") or {}
    settings = _settings(source, read, "model.")
    state = adapter_state(source, "model.", adapter_config.targets(settings))
    more = keys.to_theirs(source.leaves, keys.PROJECTOR, source.config)
    more = {f"{_PEFT}{n}": t for n, t in more.items()}
    # Modules trained whole go where they were; from another layout's adapter, beside the projector.
    whole = read.get("whole") or {}
    if read.get("prefix") == "model.":
        found, inside = _whole(source, whole), set(read.get("in_adapter") or ())
        there = {n: t for n, t in found.items() if n in inside}
        more = {n: t for n, t in (more | found).items() if n not in there}
        state |= there
    elif read:
        more |= _whole(source, {f"{_PEFT}{o}": o for o in whole.values()})
    if target.base is not None and not settings.get("base_model_name_or_path"):
        settings["base_model_name_or_path"] = adapter_config.base_name(target.base)
    if read.get("adapter_file") == "adapter_model.bin":
        torch_file.write(work / "adapter_model.bin", state)
    else:
        output.write_safetensors(work, state, stem="adapter_model", progress=progress)
    torch_file.write(work / "non_lora_trainables.bin", more)
    write_json(work / adapter_config.FILE, settings)
    write_config(source, work, [*state.values(), *more.values()], None)


def write_peft(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """An adapter for PEFT on Hugging Face's LLaVA; the projector goes along as a saved module."""
    read = source.metadata.get("lora") or {}
    prefix = read.get("prefix", "model.language_model.")
    if prefix == "model." or target.layout:
        prefix = f"{keys.LAYOUTS[target.layout or 'hf5_memory'].lm}."
    same_base = read.get("prefix") == prefix
    settings = _settings(source, read, prefix)
    state = adapter_state(source, prefix, adapter_config.targets(settings))
    if not same_base:  # the base is another model than the one it was trained on
        settings["target_modules"] = adapter_config.pattern(prefix, settings)
        settings["base_model_name_or_path"] = None
    if target.base is not None:
        settings["base_model_name_or_path"] = adapter_config.base_name(target.base)
    others = [o for o in read.get("whole", {}).values() if "mm_projector." not in o]
    if others and not same_base:
        raise WeightError(
            f"{others[0]} was trained whole: an adapter for another layout cannot hold it",
            fix="use --to lora, or --merge with --to hf",
        )
    if others:
        state |= _whole(source, read["whole"])
    elif read.get("non_lora_file") or not read or settings.get("modules_to_save"):
        root = "model." if prefix.startswith("model.") else ""
        layout = keys.Layout("peft", projector=f"{root}multi_modal_projector", hf=True)
        more = keys.to_theirs(source.leaves, layout, source.config)
        state |= {f"{_PEFT}{n}": t for n, t in more.items()}
        settings["modules_to_save"] = ["multi_modal_projector"]
    output.write_safetensors(work, state, stem="adapter_model", progress=progress)
    write_json(work / adapter_config.FILE, settings)


def _whole(source: Source, names: Mapping[str, str]) -> dict[str, Lazy]:
    """The tensors that were trained whole. names: the file's name -> the original's."""
    state = keys.to_theirs(source.leaves, keys.ORIGINAL, replace(source.config, lora=None))
    return {name: state[theirs] for name, theirs in names.items() if theirs in state}


def _settings(source: Source, read: dict[str, Any], prefix: str) -> dict[str, Any]:
    """adapter_config.json: the one that was read if it still says the same, else a fresh one."""
    old, config = read.get("adapter_config"), source.config.lora
    if old and still_means(lambda: adapter_config.lora_config(old), config):
        return dict(old)
    if config is None:
        raise WeightError("the checkpoint has no LoRA adapters to write")
    return adapter_config.fresh(config, prefix)
