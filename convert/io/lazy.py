"""Tensors that are read only when asked for. Everything in this package moves these, not arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from llava_jax.errors import WeightError
from llava_jax.params import FLOATS, is_stacked
from llava_jax.processes import cores

# The types that a checkpoint may hold, by the names of safetensors (README of the format).
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
BY_NAME = {dtype.name: dtype for dtype in DTYPES.values()}  # torch's names are numpy's
STRIP = 16  # of 16, 32, 64, 128 and 256 the fastest, in float32 and bfloat16
THREADED = 2**26
"""Bytes of a parameter from which its layers are copied by several threads."""
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def dtype_name(dtype: np.dtype) -> str:
    """The safetensors name of `dtype`, such as "BF16"."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise WeightError(f"tensors of type {dtype} are not supported")


def float_dtype(name: str) -> np.dtype:
    """The dtype that a user calls "bf16"/"bfloat16", "fp16"/"float16" or "fp32"/"float32"."""
    full = _SHORT.get(name, name)
    if full not in FLOATS:
        raise WeightError(f"dtype {name!r} is unknown", fix="use fp32, fp16 or bf16")
    return BY_NAME[full]


@dataclass(frozen=True)
class Lazy:
    """One tensor: its shape and dtype, and `read`, which gives the values (often a mapped view).

    `origin` says where it comes from, "file: name", for messages. `release` gives back the memory of
    pages that were read of a mapped file; they are read again where they are asked for again.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    origin: str = ""
    release: Callable[[], None] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self, f: Callable[[np.ndarray], np.ndarray], shape=None, dtype=None) -> Lazy:
        """This tensor with `f` applied when it is read; give shape and dtype where `f` changes them."""
        return Lazy(
            self.shape if shape is None else tuple(shape),
            self.dtype if dtype is None else dtype,
            lambda: f(self.read()),
            self.origin,
            self.release,
        )


def copy_to(out: np.ndarray, array: np.ndarray) -> None:
    """out[...] = array. A transposed matrix in strips, a third of the time of numpy's order."""
    if array.ndim != 2 or not array.flags.f_contiguous or array.flags.c_contiguous:
        out[...] = array
        return
    for i in range(0, array.shape[1], STRIP):
        out[:, i : i + STRIP] = array[:, i : i + STRIP]


def of_array(array: np.ndarray, origin: str = "") -> Lazy:
    """An array that is in memory already."""
    return Lazy(tuple(array.shape), array.dtype, lambda: array, origin)


@dataclass(frozen=True)
class Leaf:
    """A parameter of the JAX model: one part, or one part per layer of a stack ([L, ...]).

    `block`, where there is one, holds the same bytes already stacked. In place of an array it is read
    whole, or layer by layer by its index.
    """

    parts: tuple[Lazy, ...]
    stacked: bool
    block: Lazy | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        inner = self.parts[0].shape
        return (len(self.parts), *inner) if self.stacked else inner

    @property
    def dtype(self) -> np.dtype:
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.parts)

    def read(self, index: Sequence[slice] | None = None) -> np.ndarray:
        """The values, or only those at `index` (one slice per axis). Copies only what it must."""
        index = tuple(index) if index is not None else (slice(None),) * len(self.shape)
        if self.block is not None:
            return self.block.read()[index]
        if not self.stacked:
            return self.parts[0].read()[index]
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(index, self.shape)], self.dtype)

        def fill(row: np.ndarray, part: Lazy) -> None:
            copy_to(row, part.read()[index[1:]])

        with ThreadPoolExecutor(cores() if out.nbytes > THREADED else 1) as pool:
            list(pool.map(fill, out, self.parts[index[0]]))
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, layer: int) -> np.ndarray:
        return self.parts[layer].read()

    def release(self) -> None:
        """Gives back the memory of what was read of mapped files."""
        for part in self.parts:
            if part.release is not None:
                part.release()

    def map(self, f: Callable[[Lazy], Lazy]) -> Leaf:
        """This leaf with `f` applied to each part."""
        return Leaf(tuple(f(p) for p in self.parts), self.stacked)


def leaf(name: str, lazy: Lazy) -> Leaf:
    """The parameter `name`, whose layers, if it has any, are one tensor [L, ...]."""
    if not is_stacked(name):
        return Leaf((lazy,), False)

    def layer(i: int) -> Lazy:
        origin = f"{lazy.origin}[{i}]"
        return Lazy(lazy.shape[1:], lazy.dtype, lambda: lazy.read()[i], origin, lazy.release)

    return Leaf(tuple(layer(i) for i in range(lazy.shape[0])), True, block=lazy)


def cast(lazy: Lazy, dtype: np.dtype | None) -> Lazy:
    """`lazy` as `dtype`; None changes nothing. Reading raises WeightError where a finite value
    becomes infinite."""
    if dtype is None or lazy.dtype == dtype:
        return lazy

    def convert(array: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            out = array.astype(dtype)
        if np.isinf(out.astype(np.float32)).any() and np.isfinite(array.astype(np.float32)).all():
            raise WeightError(
                f"{lazy.origin}: values do not fit into {dtype.name}", fix="use bf16 or fp32"
            )
        return out

    return lazy.map(convert, dtype=dtype)


def cast_all(leaves: Mapping[str, Leaf], dtype: np.dtype | None) -> dict[str, Leaf]:
    """Every leaf as `dtype`; None changes nothing."""
    return {
        name: leaf if dtype is None or {p.dtype for p in leaf.parts} == {dtype}
        else leaf.map(lambda p: cast(p, dtype))
        for name, leaf in leaves.items()
    }  # fmt: skip


def summed(terms: Callable[[], np.ndarray], like: Lazy, dtype: np.dtype | None) -> Lazy:
    """A sum in float32, in place of `like`: rounded once, to `dtype` or to the type of `like`."""
    whole = Lazy(like.shape, np.dtype(np.float32), terms, like.origin)
    return cast(whole, dtype or like.dtype)
