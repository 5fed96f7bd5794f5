"""Opening and writing any checkpoint: as arrays, or from files to files without loading them."""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_jax import __version__
from llava_jax.config import LlavaConfig
from llava_jax.convert import templates, vocabulary
from llava_jax.convert.formats import adapter, hf, language, original, projector
from llava_jax.convert.formats.jax import open_jax, verify, write_jax
from llava_jax.convert.io import hub, output
from llava_jax.convert.io import lazy as tensors
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.convert.io.output import Progress
from llava_jax.convert.source import KINDS, Options, Source, Target, identify
from llava_jax.digests import sha256
from llava_jax.errors import WeightError
from llava_jax.text.vocabulary import load_fitting
from llava_jax.util import refuse_input

if TYPE_CHECKING:
    from jax.sharding import Mesh, Sharding

log = logging.getLogger(__name__)

_READERS: dict[str, Callable[[Path, Options], Source]] = {
    "jax": open_jax,
    "hf": hf.open_hf,
    "original": original.open_original,
    "projector": projector.open_projector,
    "lora": adapter.open_adapter,
    "llama": language.open_joined,
}
_WRITERS: dict[str, Callable[[Source, Path, Target, Progress | None], None]] = {
    "jax": write_jax,
    "hf": hf.write_hf,
    "original": original.write_original,
    "projector": projector.write_projector,
    "lora": adapter.write_lora,
    "peft": adapter.write_peft,
}
COMPLETE = ("hf", "jax")  # kinds that need neither a base nor a tower from elsewhere
MERGED = ("hf", "original", "projector")  # formats that cannot hold adapters


# Open checkpoints ---------------------------------------------------------------------------------


def open_source(path: str | Path, options: Options | None = None) -> Source:
    """Opens any supported checkpoint; its kind is determined by what is in it.

    Reads headers and settings, and no weights. Raises WeightError, in one line that names the file
    or tensor, for anything that is wrong.
    """
    options, name = options or Options(), str(path)
    path = hub.resolve(path, options.allow_pickle)
    kind = identify(path)
    if kind in COMPLETE and options.base is not None:
        log.warning("%s is complete: nothing is read of %s", path, options.base)
    if kind in COMPLETE and options.vision_tower is not None:
        raise WeightError(
            f"{path} holds its vision tower: {options.vision_tower} cannot take its place",
            fix="leave out --vision-tower",
        )
    if kind != "llama" and (options.projector is not None or options.seed is not None):
        raise WeightError(
            f"{path} is a {KINDS[kind]}: a new projector is made for a language model alone",
            fix="leave out --projector and --seed",
        )
    if kind not in _READERS:
        raise WeightError(
            f"{path} is a {KINDS[kind]}",
            fix="open the language model, with --vision-tower for this folder",
        )
    source = _READERS[kind](path, options)
    template = options.template or _template(source, path, kind, name)
    source.config = replace(source.config, template=template)
    if options.merge and source.config.lora:
        source = adapter.merge(source, options.type)
    source.leaves = tensors.cast_all(source.leaves, options.type)
    source.check()
    return source


def kind_of(path: str | Path, allow_pickle: bool = False) -> str:
    """What kind of checkpoint a path, hub id or name stands for: one of source.KINDS."""
    return identify(hub.resolve(path, allow_pickle))


def holds_tower(path: str | Path, allow_pickle: bool = False) -> bool:
    """Whether a checkpoint is of a kind that always has its own vision tower."""
    return kind_of(path, allow_pickle) in COMPLETE


def _template(source: Source, path: Path, kind: str, name: str) -> str:
    """The conversation template: what an export of ours recorded, else what the files say.

    The base of an original adapter says nothing, so there the adapter's name counts.
    """
    recorded = (source.metadata.get("ours") or {}).get("template")
    if kind in ("hf", "original"):
        return str(recorded or templates.of_folder(path, kind, name))
    if kind == "lora":
        return templates.by_name(path, name) or source.config.template
    return source.config.template


def save(source: Source, dst: str | Path, target: Target, progress: Progress | None = None) -> Path:
    """Writes `source` to the folder `dst`, which appears whole or not at all.

    Adapters are merged where the format has no place for them. Raises WeightError when `dst` exists
    already, or the format cannot hold the model.
    """
    if target.to not in _WRITERS:
        raise WeightError(f"format {target.to!r} is unknown", fix=f"one of {', '.join(_WRITERS)}")
    source.check()
    if target.to != "jax":
        vocabulary.check_tokens(source)
    dtype = None if target.dtype is None else tensors.float_dtype(target.dtype)
    if target.to in MERGED:
        source = adapter.merge(source, dtype)
    source = replace(source, leaves=tensors.cast_all(source.leaves, dtype))
    with output.folder(Path(dst), overwrite=target.overwrite) as work:
        _WRITERS[target.to](source, work, target, progress)
    return Path(dst)


# Checkpoints in memory ----------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """A checkpoint in memory.

    params: {name: array}; numpy arrays (often mapped from the files, read-only), or jax arrays where
    `load_checkpoint` got a mesh. A Leaf of an open source, read when it is written, may stand for an
    array.
    tokenizer: the folder with the tokenizer's files. provenance: where it came from.
    metadata, buffers: what a writer needs to give back names, settings and tensors that are not
    parameters; hand the whole checkpoint to `save_checkpoint`.
    """

    config: LlavaConfig
    params: dict[str, Any]
    tokenizer: Path | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    buffers: dict[str, Lazy] = field(default_factory=dict)


def load_checkpoint(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    shardings: Mapping[str, Sharding] | None = None,
    need_tokenizer: bool = False,
    lazy: bool = False,
    **options: Any,
) -> Checkpoint:
    """Loads any supported checkpoint: a folder, a projector file, or a hub id.

    mesh: every parameter goes shard by shard to where llava_jax.sharding places it; `shardings`
    ({name: Sharding}) decides instead where given. Without either the arrays stay on the host; with
    `lazy` Leafs are in their place, which are read when they are used.
    need_tokenizer: raises ConfigError, before a tensor is read, where the tokenizer is missing,
    unreadable, or has tokens that the model lacks.
    options: the fields of Options, such as base="vicuna-7b" or dtype="bf16".
    Raises WeightError, naming the file or tensor, for anything missing, unknown or misshapen.
    """
    source = open_source(path, Options(**options))
    if need_tokenizer:
        load_fitting(source.tokenizer, source.config.language.vocab_size, path)
    if shardings is None and mesh is not None:
        from llava_jax.llava import param_shardings

        shardings = param_shardings(source.config, mesh)
    params: dict[str, Any] = dict(source.leaves)
    if shardings is not None:
        params = read_leaves(source.leaves, shardings)
    elif not lazy:
        params = {name: leaf.read() for name, leaf in source.leaves.items()}
    provenance = {"kind": source.kind, "path": str(path), "files": [str(f) for f in source.files]}
    return Checkpoint(
        source.config, params, source.tokenizer, provenance, source.metadata, source.buffers
    )


def read_leaves(leaves: Mapping[str, Leaf], shardings: Mapping[str, Sharding]) -> dict[str, Any]:
    """{name: jax array} of an open source's leaves, each shard read straight to its device.

    Equal shards (replicas) are read once.
    """
    import jax

    def placed(name: str, leaf: Leaf):
        if name not in shardings:
            raise WeightError(f"no sharding for parameter {name}")
        seen: dict[tuple, np.ndarray] = {}

        def read(index) -> np.ndarray:
            key = tuple((s.start, s.stop, s.step) for s in index)
            if key not in seen:
                seen[key] = leaf.read(index)
            return seen[key]

        return jax.make_array_from_callback(leaf.shape, shardings[name], read)

    return {name: placed(name, leaf) for name, leaf in leaves.items()}


def save_checkpoint(checkpoint: Checkpoint, dst: str | Path, **target: Any) -> Path:
    """Writes a checkpoint to the folder `dst`, which appears whole or not at all.

    jax arrays are fetched one at a time (all shards must be addressable from this process).
    target: the fields of Target, such as to="hf"; without `to` the format is ours.
    """
    source = Source(
        "memory",
        checkpoint.config,
        {n: _leaf(n, p) for n, p in checkpoint.params.items()},
        checkpoint.metadata,
        checkpoint.buffers,
        tokenizer=checkpoint.tokenizer,
    )
    made = {"from": checkpoint.provenance.get("kind", "memory"), "versions": _versions()}
    return save(source, dst, Target(**target, provenance=made))


def _leaf(name: str, array: Any) -> Leaf:
    if isinstance(array, Leaf):
        return array
    lazy = Lazy(tuple(array.shape), np.dtype(array.dtype), lambda: np.asarray(array), name)
    return tensors.leaf(name, lazy)


# Files to files -----------------------------------------------------------------------------------


def convert(
    src: str | Path,
    dst: str | Path,
    target: Target,
    options: Options | None = None,
    progress: Progress | None = None,
) -> Source:
    """Converts files to files, tensor by tensor; returns the opened source.

    The result records the SHA-256 of every file that was read. Raises WeightError when a JAX-side
    source no longer has the bytes that were written, or is what would be overwritten.
    """
    options = options or Options()
    # Formats without adapters: the sum is rounded once, so it comes before the cast.
    source = open_source(src, replace(options, merge=options.merge or target.to in MERGED))
    refuse_input(dst, [hub.local(src), *source.files], WeightError)
    hashes = {f"{p.parent.name}/{p.name}": sha256(p) for p in source.files}
    if source.kind == "jax":
        verify(hub.resolve(src, options.allow_pickle), hashes)
    provenance = {
        "from": source.kind,
        "files": hashes,
        "command": _command(options, target),
        "versions": _versions(),
    }
    base = target.base or _base_to_name(target.to, options)
    save(source, dst, replace(target, provenance=provenance, base=base), progress)
    return source


def _base_to_name(to: str, options: Options) -> str | Path | None:
    """The base that an adapter of format `to` names: PEFT loads it with transformers."""
    if options.base is None or to not in ("peft", "lora"):
        return None
    kind = identify(hub.resolve(options.base, options.allow_pickle))
    if to == "peft" and kind != "hf":
        log.warning(
            "%s is %s: PEFT loads an adapter's base with transformers (convert the base with --to hf)",
            options.base, KINDS[kind],
        )  # fmt: skip
    return None if to == "peft" and kind == "llama" else options.base


def _versions() -> dict[str, str]:
    """The versions of the packages that wrote a file."""
    return {
        "llava_jax": __version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _command(options: Options, target: Target) -> str:
    """The conversion as a command line, without paths (so that two runs give the same bytes)."""
    words = ["llava-jax convert SRC DST", f"--to {target.to}"]
    words += [f"--dtype {target.dtype or options.dtype}"] * bool(target.dtype or options.dtype)
    words += ["--mixed-types"] * options.mixed
    words += ["--base BASE"] * bool(options.base) + ["--merge"] * options.merge
    words += ["--vision-tower TOWER"] * bool(options.vision_tower)
    words += [f"--projector {options.projector}"] * bool(options.projector)
    words += [f"--seed {options.seed}"] * (options.seed is not None)
    words += [f"--template {options.template}"] * bool(options.template)
    words += [f"--shard-size {target.shard_size}"] * (target.shard_size != output.DEFAULT_SHARD)
    return " ".join(words)
