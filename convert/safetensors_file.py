"""Reading and writing safetensors files: memory mapped, one tensor at a time, headers distrusted.

Format: https://github.com/huggingface/safetensors#format. The library accepts duplicate names,
names with `../`, and headers with any number of tensors; this reader refuses them.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llava_jax.convert import quantised
from llava_jax.convert.lazy import Lazy, Leaf, dtype_name, dtypes
from llava_jax.convert.orientation import Edges, axes, edges
from llava_jax.errors import WeightError, instead_of_file

MAX_HEADER = 100_000_000  # bytes; the library's own limit
MAX_TENSORS = 100_000
_CHUNK = 1 << 26


def read(path: Path) -> dict[str, Lazy]:
    """The tensors of one safetensors file by name, none of them read yet.

    Raises WeightError, naming the file, for a header that is not exactly right: see `parse_header`.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as f:
        prefix = f.read(200)
        refuse_stand_in(prefix, path.name)
        if len(prefix) < 8:
            raise WeightError(f"{path.name}: too short for a safetensors file")
        f.seek(8)
        (length,) = struct.unpack("<Q", prefix[:8])
        if length > MAX_HEADER or length > size - 8:
            raise WeightError(f"{path.name}: the header claims {length} bytes")
        raw = f.read(length)
    header = parse_header(raw, size - 8 - length, path.name)
    if not header:
        return {}
    mapped = np.memmap(path, np.uint8, "r") if size > 8 + length else np.zeros(0, np.uint8)
    start = 8 + length

    def lazy(name: str, dtype: np.dtype, shape: tuple[int, ...], begin: int, end: int) -> Lazy:
        def view() -> np.ndarray:
            flat = (
                np.frombuffer(mapped, np.uint8, end - begin, start + begin)
                if end > begin
                else (np.zeros(0, np.uint8))
            )
            return flat.view(dtype).reshape(shape)

        return Lazy(shape, dtype, view, f"{path.name}: {name}")

    return {name: lazy(name, *entry) for name, entry in header.items()}


def refuse_stand_in(start: bytes, file: str) -> None:
    """Raises WeightError when `start`, how `file` begins, is that of a file never downloaded."""
    if found := instead_of_file(start):
        raise WeightError(f"{file} {found[0]}", fix=found[1])


def parse_header(
    raw: bytes, data_size: int, file: str
) -> dict[str, tuple[np.dtype, tuple[int, ...], int, int]]:
    """name -> (dtype, shape, begin, end) of a safetensors header, offsets into the data.

    Refused with a WeightError: JSON that is none, duplicate names, over MAX_TENSORS tensors, unsafe
    names, unknown types, sizes that do not match, and data that overlap, leave holes or end early.
    """
    try:
        text = raw.decode("utf-8")
        header = json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, file))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise WeightError(f"{file}: the safetensors header is not valid JSON") from None
    if not isinstance(header, dict):
        raise WeightError(f"{file}: the safetensors header is not a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, file) for name, value in header.items()}
    at = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda e: e[1][2:]):
        if begin != at:
            what = "overlaps another tensor" if begin < at else "leaves a hole before it"
            raise WeightError(f"{file}: the data of {_shown(name)} {what}")
        at = end
    if at != data_size:
        raise WeightError(f"{file}: the tensors need {at} bytes of data, the file has {data_size}")
    return entries


def _object(pairs: list, file: str) -> dict:
    if len(pairs) > MAX_TENSORS + 1:
        raise WeightError(f"{file}: {len(pairs)} tensors are over the limit of {MAX_TENSORS}")
    out = dict(pairs)
    if len(out) != len(pairs):
        seen = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise WeightError(f"{file}: {_shown(twice)} is there twice")
    return out


def _entry(name: str, value, file: str) -> tuple[np.dtype, tuple[int, ...], int, int]:
    check_name(name, file)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise WeightError(f"{file}: the header entry of {name} is malformed")
    dtype = dtypes().get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        kind = str(value["dtype"])[:20]
        small = kind.startswith(("F8", "F6", "F4"))
        raise WeightError(
            f"{file}: {name} has the unsupported type {kind!r}",
            fix=quantised.FIX if small else None,
        )
    shape, offsets = value["shape"], value["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 32:
        raise WeightError(f"{file}: the shape or place of {name} is malformed")
    count = 1
    for n in shape:
        count *= n
    if offsets[1] - offsets[0] != count * dtype.itemsize:
        raise WeightError(f"{file}: {name} of shape {shape} does not fit its place in the file")
    return dtype, tuple(shape), offsets[0], offsets[1]


def check_name(name: str, file: str) -> None:
    """Raises WeightError for a tensor name that could be taken for a path, or cannot be printed."""
    if not isinstance(name, str) or not name or len(name) > 500 or not name.isprintable():
        raise WeightError(f"{file}: a tensor has the malformed name {_shown(name)}")
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise WeightError(f"{file}: the tensor name {_shown(name)} looks like a path")


def _naturals(values) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _shown(name) -> str:
    return ascii(name)[:120]


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
            if squares is not None and axes(part.shape):
                pair = edges(data, part.shape, part.dtype.itemsize)
                squares.setdefault(name, []).append(pair)
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
            f"planned {part.dtype.name}{list(part.shape)}"
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
