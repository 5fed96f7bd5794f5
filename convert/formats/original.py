"""The original LLaVA: a full checkpoint of its code, with the tower inside or in its own folder."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from llava_jax.convert import tokenizer_files, vocabulary
from llava_jax.convert.formats.hf import write_generation
from llava_jax.convert.formats.language import apply_delta
from llava_jax.convert.formats.tower import open_tower, tower_leaves, vision_digest, write_tower
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import output
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.convert.io.output import Progress, write_json
from llava_jax.convert.source import Options, Source, Target, read_side, still_means, write_side
from llava_jax.convert.table import configs, keys
from llava_jax.errors import WeightError

log = logging.getLogger(__name__)


def open_original(folder: Path, options: Options) -> Source:
    """A folder of this format, or a delta of one over `options.base`."""
    data = folders.model_config(folder)
    state, files = folders.read_folder(folder, options.allow_pickle)
    inside = any("vision_tower." in name for name in state)
    tower = open_tower(data, folder, options, state if inside else None)
    generation = folders.read_json(folder / "generation_config.json")
    legacy = tokenizer_files.legacy(folder, default=True)
    config = configs.from_original(
        data, tower.config, str(folder / "config.json"), legacy, generation
    )
    layout = keys.ORIGINAL if inside else keys.ORIGINAL_NO_TOWER
    leaves, rest = keys.to_jax(state, layout, config, where=str(folder), mixed=options.mixed)
    metadata, buffers = read_side(folder)
    buffers |= {f"original:{n}": t for n, t in rest.items()}
    types = configs.types_of(leaves.values())
    if inside:
        log.info("the vision tower inside %s is used, not %s", folder, tower.name)
    else:
        found, more, tower_files = tower_leaves(tower, config, options)
        leaves, buffers, files = leaves | found, buffers | more, files + tower_files
    metadata["original"] = {
        "config": data,
        "generation_config": generation,
        "types": types,
        "tower_inside": inside,
        "tower": tower.metadata,
    }
    tokenizer = folders.tokenizer_folder(folder)
    source = Source("original", config, leaves, metadata, buffers, files, tokenizer)
    return apply_delta(source, options)


def write_original(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """A folder of this format; the tower inside it, beside it, or left out."""
    source = vocabulary.original_rows(source)
    language = source.config.language
    if language.head_width * language.heads != language.width:
        raise WeightError(
            "the original code has no heads whose widths do not add up to hidden_size"
        )
    place = target.tower or _tower_place(source)
    layout = keys.ORIGINAL if place == "inside" else keys.ORIGINAL_NO_TOWER
    state = keys.to_theirs(source.leaves, layout, source.config) | source.buffers_of("original")
    output.write_safetensors(work, state, shard_size=target.shard_size, progress=progress)
    tower = write_tower(source, work, place, progress)
    ours = [t for n, t in source.leaves.items() if place == "inside" or not n.startswith("vision.")]
    write_config(source, work, ours, tower)
    read = source.metadata.get("original") or {}
    write_generation(work, read, source.config, language.pad_id)
    tokenizer_files.copy_original(source.tokenizer, work, language.vocab_size)
    write_side(source, work)


def write_config(
    source: Source,
    work: Path,
    tensors: Iterable[Leaf | Lazy],
    tower: str | None,
    extra: dict | None = None,
) -> None:
    """config.json: the one that was read if it still says the same, else a fresh one over it.

    tensors: the parameters beside it, whose type it declares.
    """
    read = source.metadata.get("original") or {}
    old, config = read.get("config") or {}, replace(source.config, lora=None)
    same = "hidden_size" in old and still_means(
        lambda: configs.from_original(
            old, config.vision, "", config.tokenizer_legacy, read.get("generation_config")
        ),
        config,
        ("template",),
    )
    name = tower or (read.get("tower") or {}).get("name") or "vision_tower"
    fresh = {} if same else configs.original_json(config, name) | {"torch_dtype": None}
    data = old | fresh
    if tower is not None:
        data["mm_vision_tower"] = tower
    data = configs.with_dtype(data, tensors, read.get("types"))
    write_json(work / "config.json", data | (extra or {}))


def _tower_place(source: Source) -> str:
    read = source.metadata.get("original") or {}
    if read.get("tower_inside"):
        return "inside"
    digest = (read.get("tower") or {}).get("digest")
    # "none" where it is still the published tower that config.json names.
    return "none" if digest and digest == vision_digest(source.leaves) else "folder"
