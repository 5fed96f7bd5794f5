"""PyTorch's .bin files, which are pickles: read only on request, and then tensors alone.

torch is imported here and in probe.py, nowhere else in the package.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np

from llava_jax.convert.io.lazy import BY_NAME, Lazy
from llava_jax.convert.io.safetensors import MAX_TENSORS, check_name, refuse_stand_in
from llava_jax.errors import WeightError


def read(path: Path, allow_pickle: bool) -> dict[str, Lazy]:
    """The tensors of a .bin/.pt file by name, memory mapped where the file is torch's zip form.

    Loaded with `weights_only=True`, so the pickle can build tensors and nothing else. Raises
    WeightError without `allow_pickle`, without torch, and for a file with anything but tensors.
    """
    path = Path(path)
    if not allow_pickle:
        refuse(path)
    torch = import_torch(path.name)
    with open(path, "rb") as file:
        refuse_stand_in(file.read(200), str(path))
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except Exception:
        # The exception's own text quotes the file (class names, addresses): it is not repeated.
        raise WeightError(f"{path} is damaged, or holds something other than tensors") from None
    if not isinstance(state, Mapping):
        raise WeightError(f"{path}: expected named tensors, found a {type(state).__name__}")
    if len(state) > MAX_TENSORS:
        raise WeightError(f"{path}: {len(state)} tensors, the limit is {MAX_TENSORS}")
    return {name: _lazy(torch, path.name, name, value) for name, value in state.items()}


def refuse(path: Path) -> NoReturn:
    """Raises WeightError: `path` is a pickle, and those are read on request only."""
    raise WeightError(
        f"{path} is a pickle file, which can run code in a careless reader",
        fix="pass --allow-pickle (allow_pickle=True) to read its tensors and nothing else",
    )


def write(path: Path, tensors: Mapping[str, Lazy]) -> None:
    """Writes a .bin file as torch.save does (the original code reads its projector from one)."""
    torch = import_torch(path.name)
    state = {name: _to_torch(torch, t.read()) for name, t in tensors.items()}
    with open(path, "wb") as f:
        torch.save(state, f)


def import_torch(file: str):
    """The torch module. Raises WeightError, naming `file`, where it is not installed."""
    try:
        import torch
    except ImportError:
        raise WeightError(
            f"{file}: .bin files need PyTorch, which is not installed",
            fix="pip install 'llava_jax[torch]'",
        ) from None
    return torch


def _lazy(torch, file: str, name: str, value) -> Lazy:
    check_name(name, file)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_quantized:
        raise WeightError(f"{file}: {name} is not a plain tensor")
    dtype = BY_NAME.get(str(value.dtype).removeprefix("torch."))
    if dtype is None:
        raise WeightError(f"{file}: {name} has type {value.dtype}, which is not supported")

    def array() -> np.ndarray:
        plain = value.detach()
        if dtype.name == "bfloat16":  # numpy has no such type: the bits go over as integers
            return plain.view(torch.int16).numpy().view(dtype)
        return plain.numpy()

    return Lazy(tuple(value.shape), dtype, array, f"{file}: {name}")


def _to_torch(torch, array: np.ndarray):
    array = np.array(array, order="C")  # torch wants to own writable memory
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
