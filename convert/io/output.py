"""Output that appears whole or not at all: a temporary folder beside it, fsync, rename."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava_jax.convert.io import safetensors
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.errors import WeightError

DEFAULT_SHARD = 5 * 10**9  # bytes
# A folder that holds one of these is a checkpoint. (A work directory of training has a config.json.)
_MARKS = ("*.safetensors", "*model*.bin", "mm_projector.bin", "*.gguf")
Progress = Callable[[int], object]


@contextmanager
def folder(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into; it becomes `dst` when the block ends, and vanishes if it raises.

    Raises WeightError when `dst` exists, unless `overwrite` or it is an empty folder.
    What a killed run left behind is removed by the next run for the same `dst`.
    """
    dst = Path(dst).expanduser().absolute()
    if dst.exists() and not overwrite and not _is_empty(dst):
        raise WeightError(f"{dst} already exists", fix="give another name, or --overwrite")
    dst.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(dst)
    work = dst.parent / f".{dst.name}.tmp-{os.getpid()}"
    work.mkdir()
    try:
        yield work
        sync(work)
        old = dst.parent / f".{dst.name}.old-{os.getpid()}"
        if dst.exists():
            os.rename(dst, old)
        os.rename(work, dst)
        _sync_path(dst.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def refuse_foreign(dst: Path) -> None:
    """Raises WeightError where `dst` is a file, or a folder of other things than a checkpoint.

    For the command line, where a name is easily mistaken: replacing deletes the folder.
    """
    if not dst.exists() or _is_empty(dst):
        return
    if not dst.is_dir() or not any(any(dst.glob(name)) for name in _MARKS):
        kind = "a folder that holds no checkpoint" if dst.is_dir() else "a file"
        raise WeightError(
            f"{dst} is {kind}, which --overwrite does not replace", fix="give another name"
        )


def _is_empty(dst: Path) -> bool:
    return dst.is_dir() and not any(dst.iterdir())


def _remove_leftovers(dst: Path) -> None:
    """Deletes temporary folders for `dst` whose process is gone."""
    pattern = re.compile(rf"\.{re.escape(dst.name)}\.(tmp|old)-(\d+)")
    for path in dst.parent.glob(f".{dst.name}.*"):
        match = pattern.fullmatch(path.name)
        if match and not Path(f"/proc/{match[2]}").exists() and Path("/proc/self").exists():
            if match[1] == "old" and not dst.exists():
                os.rename(path, dst)  # killed between the two renames of an overwrite
            else:
                shutil.rmtree(path, ignore_errors=True)


def sync(root: Path) -> None:
    """fsync of every file and folder under `root`."""
    for base, _, files in os.walk(root):
        for name in files:
            _sync_path(Path(base) / name)
        _sync_path(Path(base))


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON as Hugging Face writes it (indent 2); the same data give the same bytes."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def write_safetensors(
    work: Path,
    tensors: Mapping[str, Lazy | Leaf],
    *,
    stem: str = "model",
    shard_size: int = DEFAULT_SHARD,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Writes tensors as `stem`.safetensors, or as numbered shards and an index beyond `shard_size`.

    A tensor larger than `shard_size` gets a shard of its own. Returns {file name: SHA-256}.
    """
    shards, squares = _split(tensors, shard_size), {}
    hashes, table = {}, {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        name = name if len(shards) > 1 else f"{stem}.safetensors"
        hashes[name] = safetensors.write(work / name, shard, progress, squares)
        table |= dict.fromkeys(shard, name)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        write_json(work / f"{stem}.safetensors.index.json", index)
    if squares and stem == "model":  # which way square matrices lie; only a model's own
        (work / safetensors.SQUARES).parent.mkdir(exist_ok=True)
        text = json.dumps(squares, separators=(",", ":"), sort_keys=True)
        (work / safetensors.SQUARES).write_text(text + "\n", "utf-8")
    return hashes


def _split(tensors: Mapping[str, Lazy | Leaf], shard_size: int) -> list[dict[str, Lazy | Leaf]]:
    """The tensors in their order, cut where the next one would exceed `shard_size` bytes."""
    shards: list[dict[str, Lazy | Leaf]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def parse_size(text: str | int) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.I)
    if not match:
        raise WeightError(f"size {text!r} cannot be read", fix="such as 5GB or 500MB")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise WeightError(f"size {text!r} is not positive")
    return size
