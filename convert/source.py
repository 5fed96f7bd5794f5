"""An open checkpoint: our configuration and parameters over files of any format, nothing read yet.

Also how to open one, how to write one, and what kind of checkpoint a folder is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig, typed
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import output
from llava_jax.convert.io.lazy import Lazy, Leaf, float_dtype
from llava_jax.convert.table import keys
from llava_jax.errors import LlavaError, WeightError
from llava_jax.params import check_params, parameter_shapes
from llava_jax.reader import Reader, config_of
from llava_jax.text.conversation import find_template

SIDE = "llava_jax"  # sub-folder of an export, with what its format cannot hold
# Settings of ours that no config.json of others can hold; they go into the side folder.
OURS_ONLY = ("template", "max_length", "use_im_start_end", "image_aspect_ratio", "tokenizer_legacy")

TOWERS = ("inside", "folder", "none")  # where an original's vision tower may be


@dataclass(frozen=True)
class Options:
    """How to open a checkpoint.

    base: the language model or LLaVA that an adapter, projector or delta belongs to.
    vision_tower: CLIP folder or hub id, in place of the one the checkpoint names.
    dtype: "fp32", "bf16" or "fp16" for every parameter; None keeps the files' own.
    merge: adds LoRA updates into the kernels, in float32; the sum is rounded once, to `dtype`.
    projector, seed: kind and seed of the random projector when CLIP and an LLM are joined; None is
    mlp2x_gelu and 0.
    mixed: lets a component mix types, which are then cast to `dtype`. Otherwise a tensor of another
    type than its neighbours is an error: the file was edited.
    template: the conversation template, in place of the one that the checkpoint's files name.

    Raises WeightError for `mixed` without a `dtype`, and a seed below 0.
    """

    base: str | Path | None = None
    vision_tower: str | Path | None = None
    allow_pickle: bool = False
    dtype: str | None = None
    merge: bool = False
    projector: str | None = None
    seed: int | None = None
    mixed: bool = False
    template: str | None = None

    def __post_init__(self):
        if self.mixed and self.dtype is None:
            raise WeightError("mixed types need a type to bring them to", fix="give --dtype")
        if self.seed is not None and self.seed < 0:
            raise WeightError(f"the seed of a projector is {self.seed}, below 0")
        if self.template is not None:
            find_template(self.template)

    @property
    def type(self) -> np.dtype | None:
        """`dtype` as numpy's. Raises WeightError for an unknown one."""
        return None if self.dtype is None else float_dtype(self.dtype)


@dataclass(frozen=True)
class Target:
    """How to write a checkpoint.

    to: "jax", "hf", "original", "projector" (stage 1's), "lora" (the original's pair) or "peft".
    layout: for "hf" and "peft", a name of keys.HF_LAYOUTS; None: as it was read, else the hub's.
    tower: for "original": "inside", "folder" or "none"; None: as it was read.
    dtype: as in Options. shard_size: bytes. provenance: goes into llava_jax.json.
    base: the model that an adapter belongs to, named in its adapter_config.json.

    Raises WeightError for another layout, tower, dtype or shard_size; for `to`, when it is written.
    """

    to: str = "jax"
    layout: str | None = None
    tower: str | None = None
    dtype: str | None = None
    shard_size: int = output.DEFAULT_SHARD
    overwrite: bool = False
    provenance: dict[str, Any] | None = None
    base: str | Path | None = None

    def __post_init__(self):
        known = {"layout": tuple(layout.name for layout in keys.HF_LAYOUTS), "tower": TOWERS}
        for name, values in known.items():
            if (given := getattr(self, name)) is not None and given not in values:
                raise WeightError(f"{name} {given!r} is unknown", fix=f"one of {', '.join(values)}")
        if self.dtype is not None:
            float_dtype(self.dtype)
        if not isinstance(self.shard_size, int) or self.shard_size < 1:
            raise WeightError(f"shard_size {self.shard_size!r} is no number of bytes")


@dataclass
class Source:
    """An open checkpoint.

    leaves: the parameters by name. kind: one of KINDS, or "joined" or "memory".
    metadata: per format ("hf", "original", "lora"), what its writer needs to give back what was read.
    buffers: tensors that are not parameters, "format:name" -> tensor.
    files: the weight files that were opened. tokenizer: the folder with the tokenizer's files.
    """

    kind: str
    config: LlavaConfig
    leaves: dict[str, Leaf]
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[str, Lazy] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    tokenizer: Path | None = None

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def check(self) -> None:
        """Raises WeightError unless the leaves are exactly the configuration's parameters."""
        check_params(self.leaves, parameter_shapes(self.config))

    def buffers_of(self, name: str) -> dict[str, Lazy]:
        """The buffers that were read with the format `name`, under their own names."""
        prefix = f"{name}:"
        return {n.removeprefix(prefix): t for n, t in self.buffers.items() if n.startswith(prefix)}


def still_means(read: Callable[[], Any], want: Any, no_field: tuple[str, ...] = ()) -> bool:
    """Whether a config file that was read still means `want`, but for what it has `no_field` for.

    read: gives the configuration that the file means.
    """
    try:
        return replace(read(), **{k: getattr(want, k) for k in no_field}) == want
    except LlavaError:
        return False


# What an export carries along, for our own readers ------------------------------------------------


_KEPT: dict[str, dict[str, type]] = {
    "hf": {"config": dict, "layout": str, "generation_config": dict, "preprocessor_config": dict},
    "original": {"config": dict, "generation_config": dict, "tower": dict},
    "llama": {"config": dict, "generation_config": dict},
    "lora": {"adapter_config": dict, "config": dict, "layout": str, "prefix": str, "whole": dict}
    | {"adapter_file": str, "non_lora_file": str, "in_adapter": list},
    "ours": {},
    "tower": {
        "name": str,
        "layout": str,
        "config": dict,
        "preprocessor_config": dict,
        "digest": str,
    },
}
"""What the parts of kept.json hold; "tower" is that of "original"."""


def read_side(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Lazy]]:
    """(metadata, buffers) that a writer of ours left in the side folder; empty elsewhere.

    Raises WeightError naming file and key for what no writer of ours left there.
    """
    path = folder / SIDE / "kept.json"
    r = Reader(folders.read_json(path), str(path))
    for name in r.data:
        _check_kept(name, r.object(name), str(path))
    extras = folder / SIDE / "extras.safetensors"
    buffers = folders.read_file(extras, False) if extras.is_file() else {}
    return {k: v for k, v in r.data.items() if v is not None}, buffers


def _check_kept(name: str, data: dict[str, Any], where: str) -> None:
    r, kinds = Reader(data, f"{where}: {name}"), _KEPT.get(name, {})
    for key, value in data.items():
        kind = kinds.get(key)
        if kind and value is not None and not isinstance(value, kind):
            raise r.error(
                key, value, {dict: "a JSON object", str: "a string", list: "a list"}[kind]
            )
    if data.get("layout") is not None and data["layout"] not in keys.LAYOUTS:
        raise r.error("layout", data["layout"], "a layout")
    whole = data.get("whole") or {}
    for value in (*whole.values(), *(data.get("in_adapter") or ())):
        if not isinstance(value, str):
            raise r.error("whole, in_adapter", value, "the name of a tensor")
    if name == "original":
        _check_kept("tower", r.object("tower"), where)


def restore_ours(source: Source) -> Source:
    """Puts back the settings of ours that the source's own config.json has no field for."""
    ours = source.metadata.get("ours") or {}
    where = f"{SIDE}/kept.json: ours"
    with config_of(where):
        fields = typed(LlavaConfig, {k: ours[k] for k in OURS_ONLY if k in ours}, where)
        if "template" in fields:
            find_template(fields["template"])
        source.config = replace(source.config, **fields)
    return source


def write_side(source: Source, work: Path) -> None:
    """What the format cannot hold, in the sub-folder that `read_side` looks into."""
    ours = {name: getattr(source.config, name) for name in OURS_ONLY}
    (work / SIDE).mkdir(exist_ok=True)
    output.write_json(work / SIDE / "kept.json", {**source.metadata, "ours": ours})
    if source.buffers:
        output.write_safetensors(work / SIDE, source.buffers, stem="extras", shard_size=1 << 62)


# Which kind of checkpoint a folder is -------------------------------------------------------------

KINDS = {
    "jax": "llava_jax",
    "hf": "Hugging Face LLaVA",
    "original": "original LLaVA",
    "projector": "projector of the original's stage 1",
    "lora": "LoRA adapter",
    "llama": "language model alone",
    "clip": "vision tower alone",
}
_NO_GGUF = "GGUF files are written, not read"


def identify(path: Path) -> str:
    """One of KINDS, determined by files and tensor names, never by the folder's name.

    Raises WeightError when the folder is none of them.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        raise WeightError(f"{path}: {_NO_GGUF}", fix=folders.USE_16_BIT)
    if path.is_file():
        if path.suffix not in (".bin", ".pt", ".pth", ".safetensors"):
            raise WeightError(f"{path} is neither a checkpoint folder nor a projector file")
        return "projector"
    if (path / "llava_jax.json").is_file():
        return "jax"
    if (path / "adapter_config.json").is_file():
        return "lora"
    if folders.weight_files(path)[0]:
        return _identify_config(path)
    if projector_file(path):
        return "projector"
    fix = folders.EXPECTED
    if (path / "export").is_dir():  # a training run's work directory
        fix = f"the model of this run is {path / 'export'}"
    elif stages := sorted(path.glob("*/export"), key=lambda p: p.stat().st_mtime):
        fix = f"there is a model in {stages[-1]}"
    elif any(path.glob("*.gguf")):
        fix = f"{_NO_GGUF}: {folders.USE_16_BIT}"
    elif any(path.glob("adapter_model.*")):
        raise WeightError(
            f"{path}: a LoRA adapter without its adapter_config.json",
            fix="copy that file there too: it says rank, scale and layers",
        )
    raise WeightError(f"{path}: there are no weights", fix=fix)


def projector_file(folder: Path) -> Path | None:
    """The file with a stage-1 projector: mm_projector.bin, or mm_projector/checkpoint-N.bin's last."""
    if (folder / folders.PROJECTOR_FILE).is_file():
        return folder / folders.PROJECTOR_FILE
    numbered = sorted(
        (folder / "mm_projector").glob("checkpoint-*.bin"),
        key=lambda p: int(n) if (n := p.stem.rpartition("-")[2]).isdecimal() else -1,
    )
    return numbered[-1] if numbered else None


def _identify_config(path: Path) -> str:
    data = folders.read_json(path / "config.json", required=True)
    kind = data.get("model_type")
    # "llava" is HF's model_type, and that of released original checkpoints too: the parts decide.
    if "text_config" in data and "vision_config" in data and kind == "llava":
        return "hf"
    if "mm_vision_tower" in data or "mm_projector_type" in data or "mm_hidden_size" in data:
        return "original"
    if kind in ("clip", "clip_vision_model"):
        return "clip"
    if kind == "llava" and ("image_token_index" in data or "image_token_id" in data):
        return "hf"
    if kind in ("llama", "mistral"):
        return "llama"
    raise WeightError(
        f"{path}: config.json describes a {ascii(kind)[:40]}, which is not supported",
        fix="LLaVA, LLaMA- or Mistral-shaped language models and CLIP are",
    )
