"""Output that appears whole or not at all: a temporary folder beside it, fsync, rename."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from llava_jax.convert.io import safetensors
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.digests import SUMS, write_sums
from llava_jax.errors import WeightError
from llava_jax.util import expanded, sync_path, sync_tree, write_text

DEFAULT_SHARD = 5 * 10**9  # bytes
# A folder that holds one of these is a checkpoint. (A work directory of training has a config.json.)
_MARKS = ("*.safetensors", "*model*.bin", "mm_projector.bin", "*.gguf")
Progress = Callable[[int], object]


@contextmanager
def folder(dst: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into; it becomes `dst` when the block ends, and vanishes if it raises.

    A link is written through: what it points to is made or replaced. Raises WeightError when `dst`
    exists, unless it is an empty folder, or with `overwrite` a checkpoint: nothing else is replaced.
    What a killed run left behind is removed by the next run for the same `dst`.
    """
    dst = Path(os.path.realpath(expanded(dst)))
    dst.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(dst)
    check_free(dst, overwrite)
    # The process id is no name: every run in a container may have the same one.
    token = secrets.token_hex(8)
    work, old = (dst.parent / f".{dst.name}.{kind}-{token}" for kind in ("tmp", "old"))
    work.mkdir()
    try:
        with _locked(work):
            yield work
            if not (work / SUMS).exists():
                write_sums(work)
            sync_tree(work)
            check_free(dst, overwrite)  # hours may have passed
            with _locked(dst):
                if dst.exists():
                    os.rename(dst, old)
                os.rename(work, dst)
            sync_path(dst.parent)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if (
            isinstance(error, OSError) and error.errno is None
        ):  # numpy's tofile: "9 requested and 4 written"
            raise WeightError(
                f"{dst} cannot be written whole: {error}", fix="is the disk full?"
            ) from error
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(dst)
        raise


def check_free(dst: Path, overwrite: bool) -> None:
    """Raises WeightError where `dst` is there and may not, or cannot, be replaced."""
    dst = Path(os.path.realpath(expanded(dst)))
    if os.path.ismount(dst):
        raise WeightError(
            f"{dst} is a mount point, which cannot be replaced", fix="name a folder inside it"
        )
    if not os.path.lexists(dst) or _is_empty(dst):
        return
    if not overwrite:
        raise WeightError(f"{dst} already exists", fix="give another name, or say to overwrite it")
    if not dst.is_dir() or not any(any(dst.glob(name)) for name in _MARKS):
        kind = "a folder that holds no checkpoint" if dst.is_dir() else "a file"
        raise WeightError(f"{dst} is {kind}: that is not overwritten", fix="give another name")


def _is_empty(dst: Path) -> bool:
    return dst.is_dir() and not any(dst.iterdir())


def _remove_leftovers(dst: Path) -> None:
    """Deletes temporary folders for `dst` that no process holds any more."""
    pattern = re.compile(rf"\.{re.escape(dst.name)}\.(tmp|old)-[0-9a-f]+")
    for path in list(dst.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or path.is_symlink() or not path.is_dir() or not _is_free(path):
            continue
        if match[1] == "old" and not dst.exists():
            os.rename(path, dst)  # killed between the two renames of an overwrite
        else:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the system's lock on a folder, if there is one and its file system has locks.

    The lock goes with the folder when that is renamed, and ends with the process however that ends.
    """
    fd = None
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        if fd is not None:
            os.close(fd)


def _is_free(path: Path) -> bool:
    """Whether no process holds `path`; without locks nobody knows, and it stays."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """JSON as Hugging Face writes it (indent 2); the same data give the same bytes."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


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
    # 18 digits: no disk is larger, and a float holds it.
    pattern = r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*"
    match = re.fullmatch(pattern, str(text), re.I)
    if not match:
        raise WeightError(f"size {str(text)[:40]!r} cannot be read", fix="such as 5GB or 500MB")
    power = "KMGT".find(match[2].upper()) + 1 if match[2] else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise WeightError(f"size {text!r} is not positive")
    return size
