"""Loading and saving checkpoints as arrays, and converting files to files without loading them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_jax import __version__
from llava_jax.config import LlavaConfig
from llava_jax.convert import detect, hub, tensors
from llava_jax.convert.lazy import Lazy, Leaf, of_array, single, stacked_block
from llava_jax.convert.opening import open_source
from llava_jax.convert.output import DEFAULT_SHARD, Progress
from llava_jax.convert.source import JAX_FILE, Options, Source
from llava_jax.convert.write import Target, save
from llava_jax.errors import WeightError
from llava_jax.text.vocabulary import load_fitting

if TYPE_CHECKING:
    from jax.sharding import Mesh, Sharding

log = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    """A checkpoint in memory.

    params: {dotted name: array}; numpy arrays (often mapped from the files, read-only), or jax
    arrays where `load_checkpoint` got a mesh. A Leaf of an open source, read when it is written,
    may stand for an array.
    tokenizer: the folder with the tokenizer's files. provenance: where it came from.
    kept, extras: what a writer needs to give back names, settings and tensors that are no
    parameters; hand the whole checkpoint to `save_checkpoint`.
    """

    config: LlavaConfig
    params: dict[str, Any]
    tokenizer: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)
    extras: dict[str, Lazy] = field(default_factory=dict)


def load_checkpoint(
    path: str | Path,
    *,
    base: str | Path | None = None,
    vision_tower: str | Path | None = None,
    allow_pickle: bool = False,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    merge: bool = False,
    projector: str = "mlp2x_gelu",
    seed: int = 0,
    mixed: bool = False,
    need_tokenizer: bool = False,
    template: str | None = None,
) -> Checkpoint:
    """Loads any supported checkpoint: a folder, a projector file, or a hub id.

    base: what an adapter, projector or delta belongs to. vision_tower: the CLIP folder, in place of
    the one the checkpoint names. dtype: "fp32", "bf16" or "fp16"; None keeps the files'.
    merge: LoRA updates added into the kernels. projector, seed: of the random projector when a
    language model and `vision_tower` are joined. mixed: with `dtype`, cast even where the tensors of
    a component differ in type, which is an error otherwise.
    mesh: every parameter goes shard by shard to where llava_jax.sharding places it; `shardings`
    ({name: Sharding}) decides instead where given. Without either the arrays stay on the host.
    template: the conversation template, in place of the checkpoint's own.
    need_tokenizer: raises ConfigError, before a tensor is read, where the tokenizer is missing,
    unreadable, or has tokens that the model lacks.
    Raises WeightError, naming the file or tensor, for anything missing, unknown or misshapen.
    """
    options = Options(
        base, vision_tower, allow_pickle, dtype, merge, projector, seed, mixed, template
    )
    source = open_source(path, options)
    if need_tokenizer:
        load_fitting(source.tokenizer, source.config.language.vocab_size, path)
    if shardings is None and mesh is not None:
        from llava_jax.llava import param_shardings

        shardings = param_shardings(source.config, mesh)
    if shardings is None:
        params: dict[str, Any] = {name: leaf.read() for name, leaf in source.leaves.items()}
    else:
        params = read_leaves(source.leaves, shardings)
    provenance = {"kind": source.kind, "path": str(path), "files": [str(f) for f in source.files]}
    return Checkpoint(
        source.config, params, source.tokenizer, provenance, source.kept, source.extras
    )


def read_leaves(leaves: Mapping[str, Leaf], shardings: Mapping[str, Sharding]) -> dict[str, Any]:
    """{name: jax array} of an open source's leaves, each shard read straight to where it lies."""
    return {name: _placed(name, leaf, shardings) for name, leaf in leaves.items()}


def _placed(name: str, leaf: Leaf, shardings: Mapping[str, Sharding]):
    """A jax array whose shards are read one by one; equal shards (replicas) are read once."""
    import jax

    if name not in shardings:
        raise WeightError(f"no sharding for parameter {name}")
    seen: dict[tuple, np.ndarray] = {}

    def read(index) -> np.ndarray:
        key = tuple((s.start, s.stop, s.step) for s in index)
        if key not in seen:
            seen[key] = leaf.read(index)
        return seen[key]

    return jax.make_array_from_callback(leaf.shape, shardings[name], read)


def save_checkpoint(
    checkpoint: Checkpoint,
    dst: str | Path,
    *,
    to: str = "jax",
    dtype: str | None = None,
    layout: str | None = None,
    shard_size: int = DEFAULT_SHARD,
    overwrite: bool = False,
    command: str = "",
) -> Path:
    """Writes a checkpoint to the folder `dst`: to "jax", "hf", "original", "projector", "lora", "peft".

    The folder appears whole or not at all. jax arrays are fetched one at a time (all shards must be
    addressable from this process). For the other arguments see write.Target.
    """
    leaves = {n: _leaf(n, p) for n, p in checkpoint.params.items()}
    source = Source(
        "memory",
        checkpoint.config,
        leaves,
        checkpoint.kept,
        checkpoint.extras,
        tokenizer=checkpoint.tokenizer,
    )
    made = {"from": checkpoint.provenance.get("kind", "memory"), "versions": versions()}
    if command:
        made["command"] = command
    target = Target(
        to,
        layout,
        dtype=dtype,
        shard_size=shard_size,
        overwrite=overwrite,
        provenance=made,
    )
    return save(source, dst, target)


def _leaf(name: str, array: Any) -> Leaf:
    if isinstance(array, Leaf):
        return array
    if isinstance(array, np.ndarray):
        lazy = of_array(array, name)
    else:
        lazy = Lazy(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array), name)
    return stacked_block(lazy) if ".layers." in name else single(lazy)


def convert(
    src: str | Path,
    dst: str | Path,
    target: Target,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Source:
    """Converts files to files, tensor by tensor; returns the opened source.

    The result records the SHA-256 of every file that was read. Raises WeightError when a JAX-side
    source no longer has the bytes that were written.
    """
    options = options or Options()
    # Formats without adapters: the sum is rounded once, so it comes before the cast.
    merges = options.merge or target.to in ("hf", "original")
    source = open_source(src, replace(options, merge=merges))
    hashes = {f"{p.parent.name}/{p.name}": tensors.sha256(p) for p in source.files}
    if source.kind == "jax":
        verify(hub.resolve(src, options.allow_pickle), hashes)
    provenance = {
        "from": source.kind,
        "files": hashes,
        "command": _command(options, target),
        "versions": versions(),
    }
    base = target.base or _base_to_name(target.to, options)
    save(source, dst, replace(target, provenance=provenance, base=base), progress)
    return source


def _base_to_name(to: str, options: Options) -> str | Path | None:
    """The base that an adapter of format `to` names: PEFT loads it with transformers."""
    if options.base is None or to not in ("peft", "lora"):
        return None
    kind = detect.identify(hub.resolve(options.base, options.allow_pickle))
    if to == "peft" and kind != "hf":
        log.warning(
            "%s is %s: PEFT loads an adapter's base with transformers (convert the base with --to hf)",
            options.base, detect.KINDS[kind],
        )  # fmt: skip
    return None if to == "peft" and kind == "llama" else options.base


def verify(folder: Path, hashes: Mapping[str, str] | None = None) -> None:
    """Raises WeightError when a weight file of a JAX-side folder is not what was written."""
    written = tensors.read_json(folder / JAX_FILE, required=True).get("files") or {}
    for name, digest in written.items():
        path = folder / Path(str(name)).name
        have = (hashes or {}).get(f"{path.parent.name}/{path.name}")
        if not path.is_file() or (have or tensors.sha256(path)) != digest:
            raise WeightError(f"{path}: is damaged, its SHA-256 is not the one {JAX_FILE} records")


def versions() -> dict[str, str]:
    """The versions of what wrote a file."""
    return {
        "llava_jax": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _command(options: Options, target: Target) -> str:
    """The conversion as a command, without the places of files (two runs give the same bytes)."""
    words = ["llava-jax convert SRC DST", f"--to {target.to}"]
    words += [f"--layout {target.layout}"] * bool(target.layout)
    words += [f"--dtype {target.dtype or options.dtype}"] * bool(target.dtype or options.dtype)
    words += ["--mixed-types"] * options.mixed
    words += ["--base BASE"] * bool(options.base) + ["--merge"] * options.merge
    words += ["--vision-tower TOWER"] * bool(options.vision_tower)
    words += [f"--template {options.template}"] * bool(options.template)
    return " ".join(words)
