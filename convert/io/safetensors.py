"""Reading and writing safetensors files: memory mapped, one tensor at a time, headers distrusted.

Format: https://github.com/huggingface/safetensors#format. The library reads and checks the headers;
`_audit` refuses what it accepts. Values are mapped here, because the library's numpy reader copies a
tensor whole, and a stack of layers is one tensor of gigabytes. The writer is ours for that reason
too: the library's wants every tensor of a file in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from llava_jax.convert.io.lazy import DTYPES, Lazy, Leaf, dtype_name
from llava_jax.errors import WeightError, instead_of_file
from llava_jax.params import unique

MAX_TENSORS = 100_000
_CHUNK = 1 << 26
SQUARES = Path("llava_jax") / "squares.json"  # beside the weights of an export
Edges = dict[str, list[list[int]]]  # name -> per layer of a stack (or once) [row, column]


def read(path: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors file by name, none of them read yet.

    Raises WeightError, naming the file and the tensor, for a header that is not exactly right.
    """
    path = Path(path)
    with open(path, "rb") as f:
        refuse_stand_in(f.read(200), str(path))
    try:
        with safetensors.safe_open(path, "numpy") as file:  # checks sizes, types, holes, overlaps
            count = len(file.keys())  # in Rust: a header of millions is not read in Python
    except safetensors.SafetensorError as error:
        said = ascii(str(error).removeprefix("Error while deserializing header: "))[1:-1][:200]
        raise WeightError(f"{path}: malformed safetensors header: {said}") from None
    if count > MAX_TENSORS:
        raise WeightError(f"{path}: {count} tensors, the limit is {MAX_TENSORS}")
    header, start = _audit(path)

    mapped: Any = np.memmap(path, np.uint8, "r")

    def lazy(name: str, entry: dict[str, Any]) -> Lazy:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        count, at = math.prod(shape), start + entry["data_offsets"][0]

        def view() -> np.ndarray:
            flat = np.frombuffer(mapped, dtype, count, at) if count else np.zeros(0, dtype)
            return flat.reshape(shape)

        def release() -> None:
            first = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this tensor alone
            size = (at + count * dtype.itemsize - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if size > 0 and hasattr(mmap, "MADV_DONTNEED"):
                mapped._mmap.madvise(mmap.MADV_DONTNEED, first, size)

        return Lazy(shape, dtype, view, f"{path.name}: {name}", release)

    return {name: lazy(name, entry) for name, entry in header.items()}


def _audit(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """(header, where the data begin). Raises WeightError for what the library accepts.

    That is: duplicated names, names that look like paths, fields of no meaning, tensors without
    end (its limit is the header's 100 MB), and types that numpy has not.
    """
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        text = f.read(length)
    header = json.loads(text, object_pairs_hook=lambda pairs: unique(pairs, str(path)))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        check_name(name, str(path))
        if set(entry) != {"dtype", "shape", "data_offsets"}:
            raise WeightError(f"{path}: malformed safetensors header: the entry of {name}")
        if entry["dtype"] not in DTYPES:
            quantised = entry["dtype"].startswith(("F8", "F6", "F4"))
            raise WeightError(
                f"{path}: {name} has type {entry['dtype']}, which is not supported",
                fix="use the 16-bit weights" if quantised else None,
            )
    return header, 8 + length


def refuse_stand_in(start: bytes, file: str) -> None:
    """Raises WeightError when `start`, how `file` begins, is that of a file never downloaded."""
    if found := instead_of_file(start):
        raise WeightError(f"{file} {found[0]}", fix=found[1])


def check_name(name: object, file: str) -> None:
    """Raises WeightError for a tensor name that could be taken for a path, or cannot be printed."""
    if not isinstance(name, str) or not 0 < len(name) <= 500 or not name.isprintable():
        raise WeightError(f"{file}: malformed tensor name {ascii(name)[:120]}")
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise WeightError(f"{file}: the tensor name {ascii(name)[:120]} looks like a path")


def write(
    path: Path,
    tensors: Mapping[str, Lazy | Leaf],
    progress: Callable[[int], object] | None = None,
    squares: Edges | None = None,
) -> str:
    """Writes one file, tensor by tensor, and gives its SHA-256. `squares` collects their edges.

    Only one tensor (one layer of a stack) is in memory at a time. The order is by falling item
    size, then by name, so that the same tensors always give the same bytes, all aligned.
    """
    order = sorted(tensors, key=lambda n: (-tensors[n].dtype.itemsize, n))
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in order:
        t = tensors[name]
        header[name] = {
            "dtype": dtype_name(t.dtype),
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    digest = hashlib.sha256()
    with open(path, "wb") as f:
        _put(f, digest, struct.pack("<Q", len(text)) + text)
        for (name, part), data in _read_ahead(_parts(tensors, order)):
            _put(f, digest, data)
            if squares is not None and (axes := _square_axes(part.shape)):
                array = np.frombuffer(data, f"u{part.dtype.itemsize}").reshape(part.shape)
                squares.setdefault(name, []).append([_edge(array, axis) for axis in axes])
            if progress:
                progress(part.nbytes)
        f.flush()
        os.fsync(f.fileno())
    return digest.hexdigest()


def _parts(tensors: Mapping[str, Lazy | Leaf], order: list[str]) -> Iterator[tuple[str, Lazy]]:
    for name in order:
        tensor = tensors[name]
        for part in tensor.parts if isinstance(tensor, Leaf) else (tensor,):
            yield name, part


def _read_ahead(
    parts: Iterable[tuple[str, Lazy]],
) -> Iterator[tuple[tuple[str, Lazy], memoryview]]:
    """Each part with its bytes. The next one is read and turned while this one is written."""
    with ThreadPoolExecutor(1) as pool:
        waiting: list[tuple[tuple[str, Lazy], Future]] = []
        for part in parts:
            waiting.append((part, pool.submit(_bytes_of, *part)))
            if len(waiting) > 1:
                first, future = waiting.pop(0)
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()


def _bytes_of(name: str, part: Lazy) -> memoryview:
    array = part.read()
    if tuple(array.shape) != part.shape or array.dtype != part.dtype:
        raise WeightError(
            f"{name}: became {array.dtype.name}{list(array.shape)}, "
            f"expected {part.dtype.name}{list(part.shape)}"
        )
    return contiguous(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _put(f, digest, data) -> None:
    view = memoryview(data)
    for start in range(0, len(view), _CHUNK):
        piece = view[start : start + _CHUNK]
        digest.update(piece)
        f.write(piece)


def contiguous(array: np.ndarray) -> np.ndarray:
    """`array` in C order. A transposed matrix is copied in tiles: the cache then holds both sides."""
    if array.flags.c_contiguous or array.ndim != 2 or array.nbytes < 1 << 20:
        return np.ascontiguousarray(array)
    out = np.empty(array.shape, array.dtype)
    # Copying as plain integers is far faster than as bfloat16, which numpy moves item by item.
    whole = {2: np.uint16, 4: np.uint32}.get(array.dtype.itemsize)
    source, target = (array, out) if whole is None else (array.view(whole), out.view(whole))
    tile = 64
    for i in range(0, array.shape[0], tile):
        for j in range(0, array.shape[1], tile):
            target[i : i + tile, j : j + tile] = source[i : i + tile, j : j + tile]
    return out


# Which way square matrices lie: no shape says it, so an export records it and a reader checks -----
#
# Of every square matrix the checksums of its first row and first column are recorded. A matrix whose
# first row is now the recorded column has been transposed; one with other values is merely another.


def _square_axes(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The two axes of a tensor that could be swapped unseen: the last two, or a convolution's sides."""
    for a, b in ((-2, -1), (0, 1)) if len(shape) == 4 else ((-2, -1),):
        if len(shape) > 1 and shape[a] == shape[b] > 1:
            return a, b
    return None


def _edge(array: np.ndarray, axis: int) -> int:
    """CRC-32 of what comes first on an axis."""
    return zlib.crc32(array.take(0, axis).tobytes())


def check_orientation(record: Mapping[str, object], state: Mapping[str, Lazy]) -> None:
    """Raises WeightError naming the first matrix of `state` that was transposed since it was written.

    record: the content of SQUARES. Entries that fit nothing here are ignored.
    """
    for name, lazy in state.items():
        recorded = record.get(name)
        if not isinstance(recorded, list) or _square_axes(lazy.shape) is None:
            continue
        array = lazy.read()
        layers = array if len(recorded) == len(array) and array.ndim == 3 else array[None]
        for layer, pair in zip(layers, recorded):
            swapped = _square_axes(layer.shape)
            if swapped and isinstance(pair, list) and len(pair) == 2:
                row = _edge(layer, swapped[0])  # a column would touch every page of the file
                if row != pair[0] and row == pair[1]:
                    raise WeightError(f"{lazy.origin} is transposed: its rows were its columns")
