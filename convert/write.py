"""Writing an open checkpoint in any format: the JAX side's, Hugging Face's, the original's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.convert import (
    adapter_config,
    configs,
    declared,
    keymap,
    language_configs,
    lora,
    output,
    preprocessor,
    tokenizer_out,
    vocabulary,
)
from llava_jax.convert.keymap import Layout
from llava_jax.convert.lazy import Lazy, Leaf, cast_all, float_dtype
from llava_jax.convert.output import Progress, write_json
from llava_jax.convert.source import JAX_FILE, OURS_ONLY, SIDE, Source, check, vision_digest
from llava_jax.errors import ConfigError, LlavaError, WeightError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """How to write.

    to: "jax", "hf", "original", "projector" (stage 1's), "lora" (the original's pair) or "peft".
    layout: for "hf", a name of keymap.HF_LAYOUTS; None: as it was read, else the hub's.
    tower: for "original": "inside", "folder" or "none"; None: as it was read.
    dtype: as in source.Options. shard_size: bytes. provenance: goes into llava_jax.json.
    base: the model that an adapter written here belongs to, named in its adapter_config.json.
    """

    to: str = "jax"
    layout: str | None = None
    tower: str | None = None
    dtype: str | None = None
    shard_size: int = output.DEFAULT_SHARD
    overwrite: bool = False
    provenance: dict[str, Any] | None = None
    base: str | Path | None = None


def save(source: Source, dst: str | Path, target: Target, progress: Progress | None = None) -> Path:
    """Writes `source` to the folder `dst`, which appears whole or not at all.

    Adapters are merged where the format has no place for them. Raises WeightError when `dst` is
    there already, or the format cannot hold the model.
    """
    writers: dict[str, Callable] = {
        "jax": write_jax,
        "hf": write_hf,
        "original": write_original,
        "projector": write_projector,
        "lora": write_lora,
        "peft": write_peft,
    }
    if target.to not in writers:
        raise WeightError(f"format {target.to!r} is unknown", fix=f"one of {', '.join(writers)}")
    check(source)
    if target.to != "jax":
        vocabulary.check_tokens(source)
    dtype = None if target.dtype is None else float_dtype(target.dtype)
    if target.to in ("lora", "peft") and source.config.lora is None:
        raise WeightError("the checkpoint has no LoRA adapters to write")
    if target.to in ("hf", "original") and source.config.lora is not None:
        source = lora.merge(source, dtype)
    source = replace(source, leaves=cast_all(source.leaves, dtype))
    with output.folder(Path(dst), overwrite=target.overwrite) as work:
        writers[target.to](source, work, target, progress)
    return Path(dst)


def write_jax(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """The JAX-side format: flat names, layer stacks whole, configuration and provenance beside."""
    hashes = output.write_safetensors(
        work, source.leaves, shard_size=target.shard_size, progress=progress
    )
    write_json(
        work / JAX_FILE,
        {
            "format": "llava_jax",
            "version": 1,
            "config": source.config.to_dict(),
            "provenance": target.provenance or {},
            "files": hashes,
        },
    )
    tokenizer_out.copy(source.tokenizer, work)
    write_side(source, work)


def write_side(source: Source, work: Path) -> None:
    """What the format has no place for, in the sub-folder that our own readers look into."""
    ours = {name: getattr(source.config, name) for name in OURS_ONLY}
    (work / SIDE).mkdir(exist_ok=True)
    write_json(work / SIDE / "kept.json", {**source.kept, "ours": ours})
    if source.extras:
        output.write_safetensors(work / SIDE, source.extras, stem="extras", shard_size=1 << 62)


# Hugging Face -----------------------------------------------------------------------------------


def write_hf(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """A LlavaForConditionalGeneration folder that transformers 4 and 5, vLLM and SGLang read."""
    kept = source.kept.get("hf")
    config, leaves, image_id, pad_id = vocabulary.hf_vocabulary(source)
    layout = keymap.LAYOUTS[target.layout or (kept or {}).get("layout", "hf")]
    state = keymap.to_theirs(leaves, layout, config)
    state |= _extras(source, "hf")
    output.write_safetensors(work, state, shard_size=target.shard_size, progress=progress)
    data = _hf_config(source, config, configs.hf_json(config, image_id, pad_id, "float32"))
    data = declared.declaring(data, leaves.values(), (kept or {}).get("types"))
    write_json(work / "config.json", data)
    write_generation(work, kept, config, pad_id)
    tokenizer_out.write_processor(work, config)
    tokenizer_out.write_chat_template(work, config)
    if kept and config.language.vocab_size == source.config.language.vocab_size:
        tokenizer_out.copy_hf(source.tokenizer, work)
    else:
        tokenizer_out.write_hf(source.tokenizer, work, config, image_id, pad_id)
    write_side(source, work)


def write_generation(
    work: Path, kept: dict[str, Any] | None, config: LlavaConfig, pad_id: int
) -> None:
    """generation_config.json: the one that was read if it ends answers where `config` does."""
    fresh = language_configs.generation_json(config.language, pad_id)
    old = (kept or {}).get("generation_config") or {}
    ends = old.get("eos_token_id")
    said = [*config.language.eos_ids] == (ends if isinstance(ends, list) else [ends])
    if not old or not (said or ends is None):  # without the field config.json decides
        old = configs.updated(old, fresh)
    write_json(work / "generation_config.json", old)


def _hf_config(source: Source, config: LlavaConfig, fresh: dict) -> dict:
    kept = source.kept.get("hf")
    old = kept["config"] if kept else None
    if kept and old:
        processor, generation = kept.get("preprocessor_config"), kept.get("generation_config")
        if _same(
            lambda: configs.from_hf(old, "", processor, generation=generation), config, OURS_ONLY
        ):
            return old
        fresh = {
            **fresh,
            "text_config": configs.updated(old.get("text_config"), fresh["text_config"]),
            "vision_config": configs.updated(old.get("vision_config"), fresh["vision_config"]),
        }
        fresh["text_config"].pop("rope_parameters", None)
    return configs.updated(old, fresh)


# Original LLaVA ---------------------------------------------------------------------------------


def write_original(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """A full checkpoint of the original code; the tower inside it, beside it, or left out."""
    source = vocabulary.original_rows(source)
    language = source.config.language
    if language.head_width * language.heads != language.width:
        raise WeightError(
            "the original code has no heads whose widths do not add up to hidden_size"
        )
    kept = source.kept.get("original") or {}
    place = target.tower or _tower_place(source, kept)
    layout = keymap.ORIGINAL if place == "inside" else keymap.ORIGINAL_NO_TOWER
    state = keymap.to_theirs(source.leaves, layout, source.config)
    state |= _extras(source, "original")
    output.write_safetensors(work, state, shard_size=target.shard_size, progress=progress)
    tower = _write_tower(source, work, kept, place, progress)
    ours = [t for n, t in source.leaves.items() if place == "inside" or not n.startswith("vision.")]
    write_original_config(source, work, ours, tower)
    write_generation(work, kept, source.config, source.config.language.pad_id)
    tokenizer_out.copy_original(source.tokenizer, work, source.config.language.vocab_size)
    write_side(source, work)


def write_original_config(
    source: Source,
    work: Path,
    tensors: Iterable[Leaf | Lazy],
    tower: str | None,
    extra: dict | None = None,
) -> None:
    """config.json: the one that was read if it still says the same, else a fresh one over it.

    tensors: the parameters beside it, whose type it declares.
    """
    kept = source.kept.get("original") or {}
    old = kept.get("config") or {}
    name = tower or (kept.get("tower") or {}).get("name") or "vision_tower"
    config = replace(source.config, lora=None)
    legacy = config.tokenizer_legacy
    said = _same(
        lambda: configs.from_original(
            old, config.vision, "", legacy, kept.get("generation_config")
        ),
        config,
        ("template",),
    )
    if "hidden_size" in old and said:
        data = dict(old)
    else:
        data = configs.updated(old, configs.original_json(config, name) | {"torch_dtype": None})
    if tower is not None:
        data["mm_vision_tower"] = tower
    data = declared.declaring(data, tensors, kept.get("types"))
    write_json(work / "config.json", data | (extra or {}))


def _tower_place(source: Source, kept: dict[str, Any]) -> str:
    if kept.get("tower_inside"):
        return "inside"
    digest = (kept.get("tower") or {}).get("digest")
    if digest and digest == vision_digest(source.leaves):
        return "none"  # still the published tower that config.json names
    return "folder"


def _write_tower(
    source: Source, work: Path, kept: dict[str, Any], place: str, progress: Progress | None
) -> str | None:
    """The tower as a CLIP folder inside `work`; returns its name for mm_vision_tower.

    A tower inside the checkpoint leaves a folder without weights, which says its sizes, unless
    they are those of a published one that config.json names.
    """
    tower = kept.get("tower") or {}
    name, vision = str(tower.get("name") or ""), source.config.vision
    if place == "none" or (place == "inside" and configs.KNOWN_TOWERS.get(name) == vision):
        return None
    plain = name and Path(name).name == name and name not in (".", "..", SIDE)
    name = name if plain else "vision_tower"
    (work / name).mkdir()
    if place == "folder":
        layout = keymap.LAYOUTS[tower.get("layout", "clip")]
        state = keymap.to_theirs(source.leaves, layout, source.config) | _extras(source, "tower")
        output.write_safetensors(work / name, state, shard_size=1 << 62, progress=progress)
    old: dict[str, Any] = tower.get("config") or {}
    processor = tower.get("preprocessor_config")
    if not old or not _same(lambda: configs.vision_config(old, "", processor), vision):
        old, processor = configs.vision_json(vision), None
    leaves = [t for n, t in source.leaves.items() if n.startswith("vision.")]
    write_json(work / name / "config.json", declared.declaring(old, leaves, tower.get("types")))
    write_json(
        work / name / "preprocessor_config.json",
        processor or preprocessor.preprocessor_json(source.config),
    )
    return name


# Parts of a model -------------------------------------------------------------------------------


def write_projector(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """Stage 1's result: mm_projector.bin and config.json (with the token embeddings if trained)."""
    from llava_jax.convert import torch_file

    source = vocabulary.original_rows(source)
    layout = Layout("projector", "model", "lm_head", "model.mm_projector")
    state = keymap.to_theirs(source.leaves, layout, source.config)
    wanted = ["model.mm_projector."] + ["model.embed_tokens."] * source.config.use_im_start_end
    state = {n: t for n, t in state.items() if n.startswith(tuple(wanted))}
    torch_file.write(work / "mm_projector.bin", state)
    write_original_config(source, work, state.values(), None, {"tune_mm_mlp_adapter": True})


def write_lora(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """The original's pair: adapter_model and non_lora_trainables.bin (the projector)."""
    from llava_jax.convert import torch_file

    source = vocabulary.original_rows(source)
    kept = source.kept.get("lora") or {}
    config = replace(source.config, lora=None)
    settings = _adapter_settings(source, kept, "model.")
    state = lora.adapter_state(source, "model.", adapter_config.targets(settings))
    layout = Layout("projector", projector="model.mm_projector")
    more = keymap.to_theirs(source.leaves, layout, config)
    more = {f"base_model.model.{n}": t for n, t in more.items()}
    # Modules trained whole go where they were; from another layout's adapter, beside the projector.
    if kept.get("prefix") == "model.":
        apart, inside = _whole(source, kept, inside=False), _whole(source, kept, inside=True)
        more, state = {n: t for n, t in (more | apart).items() if n not in inside}, state | inside
    elif kept:
        names = _whole(source, {**kept, "whole": {o: o for o in kept.get("whole", {}).values()}})
        more |= {f"base_model.model.{n}": t for n, t in names.items()}
    if target.base is not None and not settings.get("base_model_name_or_path"):
        settings["base_model_name_or_path"] = adapter_config.base_name(target.base)
    if kept.get("adapter_file") == "adapter_model.bin":
        torch_file.write(work / "adapter_model.bin", state)
    else:
        output.write_safetensors(work, state, stem="adapter_model", progress=progress)
    torch_file.write(work / "non_lora_trainables.bin", more)
    write_json(work / adapter_config.FILE, settings)
    write_original_config(source, work, [*state.values(), *more.values()], None)


def write_peft(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """An adapter for PEFT on Hugging Face's LLaVA; the projector goes along as a saved module."""
    kept = source.kept.get("lora") or {}
    prefix = kept.get("prefix", "model.language_model.")
    if prefix == "model." or target.layout:
        prefix = f"{keymap.LAYOUTS[target.layout or 'hf5_memory'].lm}."
    settings = _adapter_settings(source, kept, prefix)
    state = lora.adapter_state(source, prefix, adapter_config.targets(settings))
    if kept.get("prefix") != prefix:  # the base is another model than the one it was trained on
        settings["target_modules"] = adapter_config.pattern(prefix, settings)
        settings["base_model_name_or_path"] = None
    if target.base is not None:
        settings["base_model_name_or_path"] = adapter_config.base_name(target.base)
    others = [o for o in kept.get("whole", {}).values() if "mm_projector." not in o]
    if others and kept.get("prefix") != prefix:
        raise WeightError(
            f"{others[0]} was trained whole: an adapter for another layout cannot hold it",
            fix="use --to lora, or --merge with --to hf",
        )
    if others:
        state |= _whole(source, kept)
    elif kept.get("non_lora_file") or not kept or settings.get("modules_to_save"):
        root = "model." if prefix.startswith("model.") else ""
        layout = Layout("peft", projector=f"{root}multi_modal_projector", hf=True)
        more = keymap.to_theirs(source.leaves, layout, replace(source.config, lora=None))
        state |= {f"base_model.model.{n}": t for n, t in more.items()}
        settings["modules_to_save"] = ["multi_modal_projector"]
    output.write_safetensors(work, state, stem="adapter_model", progress=progress)
    write_json(work / adapter_config.FILE, settings)


def _whole(source: Source, kept: dict[str, Any], *, inside: bool | None = None) -> dict[str, Lazy]:
    """The whole tensors that lay with an adapter, under the names they had there.

    inside: only those of the adapter's own file (True), or of the one beside it (False).
    """
    state = keymap.to_theirs(source.leaves, keymap.ORIGINAL, replace(source.config, lora=None))
    return {
        name: state[theirs]
        for name, theirs in (kept.get("whole") or {}).items()
        if theirs in state and inside in (None, name in (kept.get("in_adapter") or ()))
    }


def _adapter_settings(source: Source, kept: dict[str, Any], prefix: str) -> dict[str, Any]:
    """adapter_config.json: the one that was read if it still says the same, else a fresh one."""
    old, config = kept.get("adapter_config"), source.config.lora
    if old and _same(lambda: adapter_config.lora_config(old), config):
        return dict(old)
    if config is None:
        raise WeightError("the checkpoint has no LoRA adapters to write")
    return adapter_config.fresh(config, prefix)


def _extras(source: Source, name: str) -> dict[str, Lazy]:
    return {
        n.removeprefix(f"{name}:"): t for n, t in source.extras.items() if n.startswith(f"{name}:")
    }


def _same(read: Callable[[], Any], want: Any, no_field: tuple[str, ...] = ()) -> bool:
    """Whether a kept config file still means `want`, but for what it has `no_field` for."""
    try:
        have = read()
    except LlavaError:
        return False
    try:
        return replace(have, **{k: getattr(want, k) for k in no_field}) == want
    except ConfigError:
        return False
