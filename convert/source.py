"""A checkpoint, opened: our configuration and our leaves over somebody's files, nothing read yet."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.convert import configs, declared, hub, keymap, tensors
from llava_jax.convert.lazy import Lazy, Leaf, float_dtype, single, stacked_block
from llava_jax.convert.safetensors_file import contiguous
from llava_jax.errors import ConfigError, WeightError
from llava_jax.params import check_params, component, is_stacked, parameter_shapes
from llava_jax.text.conversation import find_template
from llava_jax.text.tokenizer_files import legacy_of

log = logging.getLogger(__name__)

JAX_FILE = "llava_jax.json"
SIDE = "llava_jax"  # sub-folder of an export with what its format has no place for
# What neither config.json can say; carried along in the side folder.
OURS_ONLY = ("template", "max_length", "use_im_start_end", "image_aspect_ratio", "tokenizer_legacy")


@dataclass(frozen=True)
class Options:
    """How to open a checkpoint.

    base: the language model or LLaVA that an adapter, projector or delta belongs to.
    vision_tower: CLIP folder or hub id, in place of the one the checkpoint names.
    dtype: "fp32", "bf16" or "fp16" for every parameter; None keeps the files' own.
    merge: adds LoRA updates into the kernels, in float32; the sum is rounded once, to `dtype`.
    projector, seed: kind and seed of the random projector when CLIP and an LLM are joined.
    mixed: lets a component mix types, which are then cast to `dtype`. Otherwise a tensor of another
    type than its neighbours is an error: somebody has touched it.
    template: the conversation template, in place of the one that the checkpoint's files say.

    Raises WeightError for `mixed` without a `dtype`.
    """

    base: str | Path | None = None
    vision_tower: str | Path | None = None
    allow_pickle: bool = False
    dtype: str | None = None
    merge: bool = False
    projector: str = "mlp2x_gelu"
    seed: int = 0
    mixed: bool = False
    template: str | None = None

    def __post_init__(self):
        if self.mixed and self.dtype is None:
            raise WeightError("mixed types need a type to bring them to", fix="give --dtype")
        if self.template is not None:
            find_template(self.template)

    @property
    def type(self) -> np.dtype | None:
        """`dtype` as numpy's. Raises WeightError for an unknown one."""
        return None if self.dtype is None else float_dtype(self.dtype)


@dataclass
class Source:
    """An open checkpoint.

    kept: per format ("hf", "original", "lora"), what its writer needs to give back what was read.
    extras: tensors that are no parameters, "format:name" -> tensor.
    files: the weight files that were opened. tokenizer: the folder with the tokenizer's files.
    """

    kind: str
    config: LlavaConfig
    leaves: dict[str, Leaf]
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: dict[str, Lazy] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    tokenizer: Path | None = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves.values())


def check(source: Source) -> None:
    """Raises WeightError unless the leaves are exactly the configuration's parameters."""
    check_params(source.leaves, parameter_shapes(source.config))


# Our own format ---------------------------------------------------------------------------------


def open_jax(folder: Path) -> Source:
    """The JAX-side format: flat names in safetensors shards, and llava_jax.json."""
    data = tensors.read_json(folder / JAX_FILE, required=True)
    if data.get("format") != "llava_jax" or data.get("version") != 1:
        raise WeightError(f"{folder / JAX_FILE}: is of a format or version that is not known")
    try:
        config = LlavaConfig.from_dict(data.get("config") or {})
    except (ConfigError, TypeError, ValueError, AttributeError) as error:
        raise WeightError(f"{JAX_FILE}: the configuration is malformed: {error}") from None
    state, files = tensors.read_folder(folder, allow_pickle=False)
    shapes = parameter_shapes(config)
    check_params(state, shapes, folder, types=component)
    leaves = {n: stacked_block(state[n]) if is_stacked(n) else single(state[n]) for n in shapes}
    kept, extras = read_side(folder)
    return Source("jax", config, leaves, kept, extras, files, tensors.tokenizer_folder(folder))


# Hugging Face -----------------------------------------------------------------------------------


def open_hf(folder: Path, options: Options) -> Source:
    """A LlavaForConditionalGeneration folder, of any generation of names."""
    data = tensors.model_config(folder)
    processor, processor_where = processor_config(folder)
    generation = tensors.read_json(folder / "generation_config.json")
    legacy = _legacy(folder, default=False)
    config = configs.from_hf(data, "config.json", processor, legacy, generation, processor_where)
    state, files = tensors.read_folder(folder, options.allow_pickle)
    layout = keymap.best_layout(state, keymap.HF_LAYOUTS, config)
    leaves, rest = keymap.to_jax(state, layout, config, where=str(folder), mixed=options.mixed)
    kept, extras = read_side(folder)
    kept["hf"] = {
        "config": data,
        "layout": layout.name,
        "types": declared.types(leaves.values()),
        "generation_config": generation,
        "preprocessor_config": processor,
    }
    extras |= {f"hf:{n}": t for n, t in rest.items()}
    source = Source("hf", config, leaves, kept, extras, files, tensors.tokenizer_folder(folder))
    return restore_ours(source)


def processor_config(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The image processor's settings, and what to call them: file and key.

    transformers 5 keeps them in processor_config.json and asks that first.
    """
    file = f"{folder.name}/processor_config.json"
    found = tensors.read_json(folder / "processor_config.json").get("image_processor")
    if isinstance(found, dict) and found:
        return found, f"{file}: image_processor"
    found = tensors.read_json(folder / "preprocessor_config.json")
    return found or None, f"{folder.name}/preprocessor_config.json"


def _legacy(folder: Path, default: bool) -> bool:
    """The tokenizer's `legacy`; a file without the key means what its own stack makes of it."""
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        try:
            return legacy_of(folder)
        except ConfigError:
            return default  # which tokenizer it is matters only to those who load it
    data = tensors.read_json(folder / "tokenizer_config.json")
    value = data.get("legacy", default if data else False)
    return value if isinstance(value, bool) else default


# Original LLaVA ---------------------------------------------------------------------------------


@dataclass
class Tower:
    """A CLIP folder, opened. `leaves` need the whole configuration: see `tower_leaves`."""

    name: str
    folder: Path | None
    config: VisionConfig
    kept: dict[str, Any]


def open_original(folder: Path, options: Options) -> Source:
    """A full checkpoint of the original code, with the tower inside or in a folder of its own."""
    data = tensors.model_config(folder)
    state, files = tensors.read_folder(folder, options.allow_pickle)
    inside = any("vision_tower." in name for name in state)
    tower = open_tower(data, folder, options, state if inside else None)
    generation = tensors.read_json(folder / "generation_config.json")
    legacy = _legacy(folder, default=True)
    config = configs.from_original(data, tower.config, "config.json", legacy, generation)
    layout = keymap.ORIGINAL if inside else keymap.ORIGINAL_NO_TOWER
    leaves, rest = keymap.to_jax(state, layout, config, where=str(folder), mixed=options.mixed)
    kept, extras = read_side(folder)
    extras |= {f"original:{n}": t for n, t in rest.items()}
    kinds = declared.types(leaves.values())
    if inside:
        log.info("the vision tower inside %s is used, not %s", folder, tower.name)
    else:
        found, more, tower_files = tower_leaves(tower, config, options)
        leaves, extras, files = leaves | found, extras | more, files + tower_files
    kept["original"] = {
        "config": data,
        "generation_config": generation,
        "types": kinds,
        "tower_inside": inside,
        "tower": tower.kept,
    }
    tokenizer = tensors.tokenizer_folder(folder)
    return Source("original", config, leaves, kept, extras, files, tokenizer)


def open_tower(
    data: Mapping[str, Any],
    folder: Path,
    options: Options,
    inside: Mapping[str, Lazy] | None = None,
) -> Tower:
    """The tower that `options` or the config.json `data` name; `inside`: tensors that hold it already.

    A relative name is looked for in the checkpoint's folder and beside it.
    """
    name = options.vision_tower or data.get("mm_vision_tower") or data.get("vision_tower")
    if not isinstance(name, str | Path) or not str(name):
        if inside is None:
            raise WeightError(f"{folder}: names no vision tower", fix="give --vision-tower")
        name = ""
    found = find_tower(str(name), folder, options, must=inside is None)
    kept: dict[str, Any] = {"name": str(data.get("mm_vision_tower") or name)}
    if found is None:
        if str(name) in configs.KNOWN_TOWERS:
            return Tower(str(name), None, configs.KNOWN_TOWERS[str(name)], kept)
        return Tower(str(name), None, _guess_vision(inside or {}, folder), kept)
    data = tensors.model_config(found)
    processor, where = processor_config(found)
    kept |= {"config": data, "preprocessor_config": processor}
    vision = configs.vision_config(
        data, f"{found.name}/config.json", processor, processor_where=where
    )
    return Tower(str(name), found, vision, kept)


def tower_leaves(
    tower: Tower, config: LlavaConfig, options: Options
) -> tuple[dict[str, Leaf], dict[str, Lazy], list[Path]]:
    """The tower's leaves, its other tensors as "tower:name", and its files; records its layout."""
    if tower.folder is None:
        raise WeightError(f"vision tower {tower.name}: no folder to read", fix="--vision-tower")
    state, files = tensors.read_folder(tower.folder, options.allow_pickle)
    layout = keymap.best_layout(state, (keymap.CLIP, keymap.CLIP_BARE), config)
    leaves, rest = keymap.to_jax(
        state, layout, config, where=f"vision tower {tower.folder}", mixed=options.mixed
    )
    tower.kept |= {"layout": layout.name, "types": declared.types(leaves.values())}
    if hub.looks_like_id(tower.name) and options.dtype is None:
        tower.kept["digest"] = vision_digest(leaves)
    return leaves, {f"tower:{n}": t for n, t in rest.items()}, files


def vision_digest(leaves: Mapping[str, Leaf]) -> str:
    """SHA-256 over the tower's values: tells later whether it is still the published one."""
    digest = hashlib.sha256()
    for name in sorted(n for n in leaves if n.startswith("vision.")):
        for part in leaves[name].parts:
            digest.update(contiguous(part.read()).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def find_tower(name: str, folder: Path, options: Options, must: bool) -> Path | None:
    """Where the tower called `name` in the checkpoint `folder` lies; None, or an error if it `must`."""
    if options.vision_tower is not None:
        return hub.resolve(options.vision_tower, options.allow_pickle)
    if name and ".." not in Path(name).parts:
        for place in (folder / name, folder.parent / name, Path(name)):
            if (place / "config.json").is_file():
                return place
    if not must:
        return None
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
            f"{folder}: the sizes of its vision tower cannot be told", fix="give --vision-tower"
        ) from None


# What an export carries along -------------------------------------------------------------------


def read_side(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Lazy]]:
    """(kept, extras) that a writer of ours left in the side folder; empty elsewhere."""
    kept = tensors.read_json(folder / SIDE / "kept.json")
    path = folder / SIDE / "extras.safetensors"
    extras = tensors.read_file(path, False) if path.is_file() else {}
    return {k: v for k, v in kept.items() if isinstance(v, dict)}, extras


def restore_ours(source: Source) -> Source:
    """Puts back the settings of ours that the source's own config.json has no field for."""
    ours = source.kept.get("ours") or {}
    fields = {k: ours[k] for k in OURS_ONLY if k in ours}
    try:
        source.config = replace(source.config, **fields)
    except (ConfigError, TypeError) as error:
        raise WeightError(f"{SIDE}/kept.json: {error}") from None
    return source
