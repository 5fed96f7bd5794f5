"""A vision tower in a CLIP folder of its own, beside the checkpoint that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import hub, output
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.convert.io.output import Progress
from llava_jax.convert.io.safetensors import contiguous
from llava_jax.convert.source import SIDE, Options, Source, still_means
from llava_jax.convert.table import configs, keys, pixels
from llava_jax.errors import ConfigError, WeightError
from llava_jax.reader import Reader


@dataclass
class Tower:
    """A CLIP folder, opened. Its leaves need the whole configuration: see `tower_leaves`."""

    name: str
    folder: Path | None
    config: VisionConfig
    metadata: dict[str, Any]


def open_tower(
    data: Mapping[str, Any],
    folder: Path,
    options: Options,
    inside: Mapping[str, Lazy] | None = None,
) -> Tower:
    """The tower named by `options` or by the config.json `data`; `inside`: tensors that hold it already.

    A relative name is looked for in the checkpoint's folder and beside it.
    """
    name = options.vision_tower or data.get("mm_vision_tower") or data.get("vision_tower")
    if not isinstance(name, str | Path) or not str(name):
        if inside is None:
            raise WeightError(f"{folder} names no vision tower", fix="give --vision-tower")
        name = ""
    found = find_tower(str(name), folder, options, must=inside is None)
    metadata: dict[str, Any] = {"name": str(data.get("mm_vision_tower") or name)}
    if found is None:
        vision = configs.KNOWN_TOWERS.get(str(name)) or _guess_vision(inside or {}, folder)
        return Tower(str(name), None, vision, metadata)
    data = folders.model_config(found)
    processor, where = processor_config(found)
    metadata |= {"config": data, "preprocessor_config": processor}
    vision = configs.vision_config(data, str(found / "config.json"), processor, where)
    return Tower(str(name), found, vision, metadata)


def tower_leaves(
    tower: Tower, config: LlavaConfig, options: Options
) -> tuple[dict[str, Leaf], dict[str, Lazy], list[Path]]:
    """The tower's leaves, its other tensors as "tower:name", and its files; records its layout."""
    if tower.folder is None:
        raise WeightError(f"vision tower {tower.name} has no folder", fix="give --vision-tower")
    state, files = folders.read_folder(tower.folder, options.allow_pickle)
    layout = keys.best_layout(state, (keys.CLIP, keys.CLIP_BARE), config)
    where = f"vision tower {tower.folder}"
    leaves, buffers = keys.to_jax(state, layout, config, where=where, mixed=options.mixed)
    tower.metadata |= {"layout": layout.name, "types": configs.types_of(leaves.values())}
    if hub.looks_like_id(tower.name) and options.dtype is None:
        tower.metadata["digest"] = vision_digest(leaves)
    return leaves, {f"tower:{n}": t for n, t in buffers.items()}, files


def vision_digest(leaves: Mapping[str, Leaf]) -> str:
    """SHA-256 over the tower's values: tells later whether it is still the published one."""
    digest = hashlib.sha256()
    for name in sorted(n for n in leaves if n.startswith("vision.")):
        for part in leaves[name].parts:
            digest.update(contiguous(part.read()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def find_tower(name: str, folder: Path, options: Options, must: bool) -> Path | None:
    """Where the tower called `name` in the checkpoint `folder` is; None, or an error if it `must` be."""
    if options.vision_tower is not None:
        return hub.resolve(options.vision_tower, options.allow_pickle)
    place = folders.find_beside(name, folder, "config.json")
    if place is not None or not must:
        return place
    if hub.looks_like_id(name):
        try:
            return hub.resolve(name, options.allow_pickle)
        except WeightError as error:
            raise WeightError(
                f"{folder}: its vision tower: {error.message}",
                fix=f"{error.fix}: --vision-tower FOLDER" if error.fix else "give --vision-tower",
            ) from None
    raise WeightError(
        f"{folder}: its vision tower {ascii(name)[:80]} is not here", fix="give --vision-tower"
    )


def processor_config(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The image processor's settings, and what to call them: file and key.

    transformers 5 has them in processor_config.json and looks there first.
    """
    path = folder / "processor_config.json"
    found = Reader(folders.read_json(path), str(path)).object("image_processor")
    if found:
        return found, f"{path}: image_processor"
    path = folder / "preprocessor_config.json"
    return folders.read_json(path) or None, str(path)


def _guess_vision(state: Mapping[str, Lazy], folder: Path) -> VisionConfig:
    """The sizes of a CLIP tower from its tensors; heads of width 64, as in all published ones."""
    shapes = {name.rpartition("vision_model.")[2]: t.shape for name, t in state.items()}
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        patches = shapes["embeddings.position_embedding.weight"][0] - 1
        mlp = shapes["encoder.layers.0.mlp.fc1.weight"][0]
        layers = sum(n.endswith("layer_norm1.weight") for n in shapes)
        side = int(np.sqrt(patches))
        if width % 64 or side * side != patches:
            raise ValueError
        return VisionConfig(side * patch, patch, width, layers, width // 64, mlp)
    except (KeyError, ValueError, ConfigError):
        raise WeightError(
            f"{folder}: the sizes of its vision tower cannot be determined",
            fix="give --vision-tower",
        ) from None


def write_tower(source: Source, work: Path, place: str, progress: Progress | None) -> str | None:
    """The tower as a CLIP folder inside `work`; returns its name for mm_vision_tower.

    place: "inside", "folder" or "none", as in Target. A tower inside the checkpoint leaves a folder
    without weights, which says its sizes, unless they are those of a published one that config.json
    names.
    """
    tower = (source.metadata.get("original") or {}).get("tower") or {}
    name, vision = str(tower.get("name") or ""), source.config.vision
    if place == "none" or (place == "inside" and configs.KNOWN_TOWERS.get(name) == vision):
        return None
    # A name of SHIPPED stands for that model wherever it is read, never for a folder.
    plain = name and Path(name).name == name and name not in (".", "..", SIDE, *hub.SHIPPED)
    name = name if plain else "vision_tower"
    (work / name).mkdir()
    if place == "folder":
        layout = keys.LAYOUTS[tower.get("layout", "clip")]
        state = keys.to_theirs(source.leaves, layout, source.config) | source.buffers_of("tower")
        output.write_safetensors(work / name, state, shard_size=1 << 62, progress=progress)
    old: dict[str, Any] = tower.get("config") or {}
    processor = tower.get("preprocessor_config")
    if not old or not still_means(lambda: configs.vision_config(old, "", processor), vision):
        old, processor = configs.vision_json(vision), None
    leaves = [t for n, t in source.leaves.items() if n.startswith("vision.")]
    data = configs.with_dtype(old, leaves, tower.get("types"))
    output.write_json(work / name / "config.json", data)
    processor = processor or pixels.preprocessor_json(source.config)
    output.write_json(work / name / "preprocessor_config.json", processor)
    return name
