"""LoRA adapters on a base: PEFT's files, for the original LLaVA or Hugging Face's.

PEFT's rule: W + scale * B @ A with scale = alpha / r (alpha / sqrt(r) with use_rslora); with use_dora
each output's weights are then scaled to a trained length, the lora_magnitude_vector.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
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
from llava_jax.convert.io.lazy import Lazy, Leaf, summed
from llava_jax.convert.io.output import Progress, write_json
from llava_jax.convert.source import Options, Source, Target, still_means
from llava_jax.convert.table import keys
from llava_jax.errors import WeightError
from llava_jax.params import check_params, is_lora, is_run, linears, unique

log = logging.getLogger(__name__)


def open_adapter(folder: Path, options: Options) -> Source:
    """An adapter folder over its base, unmerged: leaves `<linear>.lora_a`, `<linear>.lora_b`.

    The base is `options.base` or the one adapter_config.json names. Adapters on layers of the tower
    that the model does not run are merged, and so are those on some of its layers alone. Raises WeightError for variants of LoRA that change the
    formula.
    """
    settings = folders.read_json(folder / adapter_config.FILE, required=True)
    lora = adapter_config.lora_config(settings, str(folder / adapter_config.FILE))
    data = folders.read_json(folder / "config.json")
    file = folders.first_file(folder, folders.ADAPTER_FILES)
    if file is None:
        raise WeightError(f"{folder}: there is no adapter_model file")
    state = folders.read_file(file, options.allow_pickle)
    beside = folders.first_file(folder, folders.NON_LORA_FILES)
    more = folders.read_file(beside, options.allow_pickle) if beside else {}
    factors = unique((_factor(n), t) for n, t in state.items() if ".lora_" in n)
    more |= {n: t for n, t in state.items() if ".lora_" not in n}
    _refuse_vocabulary(state, str(folder))
    base = open_base(folder, data, options, _base(folder, settings, options))
    adapter_config.check_saved(settings, more, str(folder / adapter_config.FILE))
    whole = unique(keys.to_original(strip_peft(more), base.config))
    source = overlay(base, whole, base.config, str(folder), options)
    files = [*source.files, file, *([beside] if beside else [])]
    source = replace(source, kind="lora", files=files)
    anywhere = replace(lora, targets=tuple(linears(source.config)))
    config = replace(source.config, lora=anywhere)
    layout = keys.best_layout(factors, (*keys.hf_layouts(config), keys.ORIGINAL), config)
    not_run = {n: factors.pop(n) for n in _not_run(factors, layout, config)}
    if not_run:
        log.info("%s: adapters on some layers of the tower alone are merged", str(folder))
        _merge_not_run(not_run, source, layout, lora, str(folder), options)
        if not factors:
            source.check()
            return source
    leaves = _leaves(factors, layout, config, settings, str(folder), options)
    adapted = {n.rpartition(".")[0] for n in leaves}
    targets = tuple(n for n in anywhere.targets if n in adapted)
    source.config = replace(config, lora=replace(lora, targets=targets))
    source.leaves |= leaves
    if isinstance(held := data.get("quantization_config"), dict):
        # Which transformers writes of an 8-bit model too.
        four = None if held.get("load_in_8bit") else held.get("bnb_4bit_quant_type")
        source.metadata["quantized_base"] = {"type": four or "8 bits"}
    source.metadata["lora"] = {
        "layout": layout.name,
        "adapter_config": settings,
        "config": data,
        "adapter_file": file.name,
        "non_lora_file": beside.name if beside else None,
        "prefix": f"{layout.lm}.",
        # Tensors trained whole: the file's own names -> the original's.
        "whole": {n: o for n, o in zip(more, whole) if not keys.is_buffer(o)},
        "in_adapter": [n for n in more if n in state],
    }
    source.check()
    return source


_NOT_LINEAR = "embed_tokens|lm_head|patch_embedding|position_embedding"


def _factor(name: str) -> str:
    """A tensor's name without that of PEFT's adapter; magnitudes end without ".weight", as PEFT saves."""
    name = re.sub(r"\.default(?=(\.weight)?$)", "", name)
    return name.removesuffix(".weight") if ".lora_magnitude_vector" in name else name


def _refuse_vocabulary(names: Iterable[str], where: str) -> None:
    """Raises WeightError for adapters on an embedding or the head."""
    for name in names:
        match = re.search(rf"\b({_NOT_LINEAR})\.(lora_|base_layer)", name)
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
    """PEFT's factors as leaves of the linear layers that have any, or that target_modules lists."""
    if not factors:
        raise WeightError(f"{where} has no adapters")
    listed = adapter_config.targets(settings) or ()
    plan = [p for p in keys.pairings(layout, config) if is_lora(p.ours)]
    adapted = {  # linear layers, by the name that their factors share but for its last letter
        p.ours[:-1]
        for p in plan
        if (_module(p.theirs[0]) in listed and p.ours.startswith("language."))
        or any(n in factors for n in p.theirs)
    }
    expected = {n: p.their_shape for p in plan if p.ours[:-1] in adapted for n in p.theirs}
    try:
        _check(factors, expected, where, mixed=options.mixed)
    except WeightError as error:
        fix = f"for an adapter on some layers only, {adapter_config.MERGE}"
        raise WeightError(error.message, fix=error.fix or fix) from None
    return {p.ours: p.leaf(factors[n] for n in p.theirs) for p in plan if p.ours[:-1] in adapted}


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
    if held := source.metadata.get("quantized_base"):
        log.warning(
            "the adapter was trained over a base in %s, and is merged into the plain one",
            held.get("type"),
        )
    leaves = {n: t for n, t in source.leaves.items() if not is_lora(n)}
    last = ("kernel", "lora_a", "lora_b", *(["lora_m"] if config.lora.dora else []))
    for name in config.lora.targets:
        parts = zip(*(source.leaves[f"{name}.{k}"].parts for k in last))
        sums = tuple(_merged(*tensors, scale=config.lora.scale, dtype=dtype) for tensors in parts)
        leaves[f"{name}.kernel"] = Leaf(sums, source.leaves[f"{name}.kernel"].stacked)
    metadata = {k: v for k, v in source.metadata.items() if k != "lora"}
    return replace(source, leaves=leaves, config=replace(config, lora=None), metadata=metadata)


def _merged(
    kernel: Lazy, a: Lazy, b: Lazy, m: Lazy | None = None, *, scale: float, dtype: np.dtype | None
) -> Lazy:
    def read() -> np.ndarray:
        update = a.read().astype(np.float32) @ b.read().astype(np.float32)
        update *= np.float32(scale)
        whole = kernel.read().astype(np.float32) + update  # [d_in, d_out]
        return whole if m is None else whole * (m.read() / np.linalg.norm(whole, axis=0))

    return replace(summed(read, kernel, dtype), origin=f"{kernel.origin} with its adapter")


def _not_run(names: Iterable[str], layout: keys.Layout, config: LlavaConfig) -> dict[str, str]:
    """{factor: its kernel, in their names} of factors that cannot be leaves: layers of the tower after
    the feature layer, and linear layers of the tower of which only some have factors."""
    places = keys.places(layout, config)
    kernels = {n: f"{n.removeprefix(keys.PEFT).partition('.lora_')[0]}.weight" for n in names}
    kernels = {n: k for n, k in kernels.items() if k in places}
    whole = Counter(pairing.ours for pairing, *_ in places.values())
    adapted = Counter(places[k][0].ours for k in set(kernels.values()))

    def merged(ours: str) -> bool:
        partly = ours.startswith("vision.") and adapted[ours] < whole[ours]
        return partly or not is_run(ours)

    return {n: k for n, k in kernels.items() if merged(places[k][0].ours)}


def _merge_not_run(
    factors: Mapping[str, Lazy],
    source: Source,
    layout: keys.Layout,
    lora: LoraConfig,
    where: str,
    options: Options,
) -> None:
    """Adds such adapters into their kernels; changes `source.leaves`."""
    places = keys.places(layout, source.config)
    last = ("lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] if lora.dora else []))
    expected: dict[str, tuple[int, ...]] = {}
    kernels = {}
    for kernel in dict.fromkeys(_not_run(factors, layout, source.config).values()):
        pairing, layer = places[kernel]
        d_out, d_in = pairing.their_shape
        names = [f"{keys.PEFT}{kernel.removesuffix('weight')}{part}" for part in last]
        expected |= zip(names, ((lora.rank, d_in), (d_out, lora.rank), (d_out,)))
        kernels[pairing.ours, layer] = names
    _check(factors, expected, where, mixed=options.mixed)
    for (ours, layer), (a, b, *m) in kernels.items():
        parts = list(source.leaves[ours].parts)
        both = (keys.T.to_ours(factors[n]) for n in (a, b))
        magnitudes = (factors[n] for n in m)
        parts[layer] = _merged(
            parts[layer], *both, *magnitudes, scale=lora.scale, dtype=options.type
        )
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


def named_base(folder: Path) -> str | Path:
    """The base that the adapter in `folder` names. Raises WeightError where it is not here."""
    settings = folders.read_json(folder / adapter_config.FILE, required=True)
    return _base(folder, settings, Options())


# Writing ------------------------------------------------------------------------------------------


def adapter_state(source: Source, layout: keys.Layout) -> dict[str, Lazy]:
    """The adapters of `source` under PEFT's names, for a model of `layout`."""
    state = keys.to_theirs(source.leaves, layout, source.config)
    return {name: t for name, t in state.items() if ".lora_" in name}


def write_lora(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """The original's pair: adapter_model and non_lora_trainables.bin (the projector)."""
    source = vocabulary.original_rows(source)
    read = source.metadata.get("lora") or {}
    settings = _settings(source, read, keys.ORIGINAL)
    for name in source.config.lora.targets if source.config.lora else ():
        if not name.startswith("language."):
            raise WeightError(
                f"the original LLaVA loads no adapters on {name}",
                fix="use --to peft, or --merge with --to hf or original",
            )
    state = adapter_state(source, keys.ORIGINAL)
    more = keys.to_theirs(source.leaves, keys.PROJECTOR, replace(source.config, lora=None))
    more = {f"{keys.PEFT}{n}": t for n, t in more.items()}
    # Modules trained whole go where they were; from another layout's adapter, beside the projector.
    whole = read.get("whole") or {}
    if read.get("prefix") == "model.":
        found, inside = _whole(source, whole), set(read.get("in_adapter") or ())
        there = {n: t for n, t in found.items() if n in inside}
        more = {n: t for n, t in (more | found).items() if n not in there}
        state |= there
    elif read:
        more |= _whole(source, {f"{keys.PEFT}{o}": o for o in whole.values()})
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
    was = keys.LAYOUTS.get(read.get("layout") or _BY_PREFIX.get(read.get("prefix", ""), ""))
    layout = was or keys.HF_MEMORY
    if layout is keys.ORIGINAL or target.layout:
        layout = keys.LAYOUTS[target.layout or "hf5_memory"]
    prefix, same_base = f"{layout.lm}.", was is not None and was.lm == layout.lm
    settings = _settings(source, read, layout)
    state = adapter_state(source, layout)
    if not same_base:  # the base is another model than the one it was trained on
        settings["target_modules"] = adapter_config.pattern(source.config, layout)
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
    elif any(".multi_modal_projector." in name for name in state):
        log.warning("the projector has adapters: the weights under them must be those of the base")
    elif read.get("non_lora_file") or not read or settings.get("modules_to_save"):
        root = "model." if prefix.startswith("model.") else ""
        whole = keys.Layout("peft", projector=f"{root}multi_modal_projector", hf=True)
        more = keys.to_theirs(source.leaves, whole, replace(source.config, lora=None))
        state |= {f"{keys.PEFT}{n}": t for n, t in more.items()}
        settings["modules_to_save"] = ["multi_modal_projector"]
    output.write_safetensors(work, state, stem="adapter_model", progress=progress)
    write_json(work / adapter_config.FILE, settings)


def _whole(source: Source, names: Mapping[str, str]) -> dict[str, Lazy]:
    """The tensors that were trained whole. names: the file's name -> the original's."""
    state = keys.to_theirs(source.leaves, keys.ORIGINAL, replace(source.config, lora=None))
    return {name: state[theirs] for name, theirs in names.items() if theirs in state}


# The layout that an adapter was read in, where an older export has the decoder's prefix alone.
_BY_PREFIX = {"model.": "original", "language_model.model.": "hf"}
_BY_PREFIX["model.language_model."] = "hf5_memory"


def _settings(source: Source, read: dict[str, Any], layout: keys.Layout) -> dict[str, Any]:
    """adapter_config.json: the one that was read if it still says the same, else a fresh one."""
    old, config = read.get("adapter_config"), source.config.lora
    if (
        old
        and config
        and still_means(lambda: adapter_config.lora_config(old), config, ("targets",))
    ):
        return dict(old)
    if config is None:
        raise WeightError("the checkpoint has no LoRA adapters to write")
    return adapter_config.fresh(source.config, config, layout)
