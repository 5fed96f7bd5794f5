"""The tensors and small files of a checkpoint folder, read without trusting the folder.

Which files hold the weights is settled here; what they mean is settled in detect.py and source.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llava_jax.convert import orientation, safetensors_file, torch_file
from llava_jax.convert.lazy import Lazy
from llava_jax.errors import WeightError

log = logging.getLogger(__name__)

MAX_JSON = 50_000_000  # bytes
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
# Lie beside the weights and are none of them.
_OTHER = (PROJECTOR_FILE, "training_args.bin", "optimizer.bin", "scheduler.bin", *ADAPTER_FILES)
_OTHER = (*_OTHER, *NON_LORA_FILES)


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; {} when the file is absent and not `required`.

    Raises WeightError naming the file when it is malformed, has a doubled key, or asks for code
    (`auto_map`): nothing in a checkpoint is ever run.
    """
    path = Path(path)
    if not path.is_file():
        if required:
            raise WeightError(f"{path.parent}: there is no {path.name}")
        return {}
    if path.stat().st_size > MAX_JSON:
        raise WeightError(f"{path.name}: over {MAX_JSON} bytes")
    try:
        data = json.loads(
            path.read_text("utf-8"), object_pairs_hook=lambda p: _no_doubles(p, path.name)
        )
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise WeightError(f"{path.name}: is no valid JSON") from None
    if not isinstance(data, dict):
        raise WeightError(f"{path.name}: is no JSON object")
    if _has_key(data, "auto_map"):
        raise WeightError(f"{path.name}: asks for code of its own (auto_map), which is never run")
    return data


def read_folder(folder: Path, allow_pickle: bool) -> tuple[dict[str, Lazy], list[Path]]:
    """All weight tensors of a folder by name, and the files that hold them.

    An index decides if there is one; else model.safetensors or pytorch_model.bin; else every
    .safetensors, or every .bin, file. Raises WeightError for a tensor that is there twice, that the
    index and the files do not agree on, or (in an export of ours) that was transposed since.
    """
    folder = Path(folder)
    index = _index_file(folder)
    if index is not None:
        state, files = _read_index(folder, index, allow_pickle)
        orientation.check(read_json(folder / orientation.FILE), state)
        return state, files
    files = weight_files(folder)
    if not files:
        raise WeightError(
            f"{folder}: holds no weights", fix="expected .safetensors or .bin files, or an index"
        )
    state = read_files(files, allow_pickle)
    orientation.check(read_json(folder / orientation.FILE), state)
    return state, files


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder without an index; [] if there are none."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return [folder / single]
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(p for p in folder.glob(pattern) if p.is_file() and p.name not in _OTHER)
        if found:
            return found
    return []


def read_files(files: Iterable[Path], allow_pickle: bool) -> dict[str, Lazy]:
    """The tensors of several files together. Raises WeightError for a name that is there twice."""
    state: dict[str, Lazy] = {}
    for path in files:
        for name, lazy in read_file(path, allow_pickle).items():
            if name in state:
                raise WeightError(f"{name} is there twice: {state[name].origin}, {lazy.origin}")
            state[name] = lazy
    return state


def read_file(path: Path, allow_pickle: bool) -> dict[str, Lazy]:
    """The tensors of one file, by its ending."""
    if path.suffix == ".safetensors":
        return safetensors_file.read(path)
    return torch_file.read(path, allow_pickle)


def has_index(folder: Path) -> bool:
    """Whether an index file says where the folder's tensors are."""
    return _index_file(folder) is not None


def _index_file(folder: Path) -> Path | None:
    for pattern in ("*.safetensors.index.json", "*.bin.index.json"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise WeightError(f"{folder}: has several index files: {[p.name for p in found]}")
        if found:
            return found[0]
    return None


def _read_index(
    folder: Path, index: Path, allow_pickle: bool
) -> tuple[dict[str, Lazy], list[Path]]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise WeightError(f"{index.name}: has no weight_map")
    for name, file in table.items():
        safetensors_file.check_name(name, index.name)
        # A path, or a link's name, could lead out of the folder; a hub cache's own links may.
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or "\\" in file
            or file in ("", "..")
        ):
            raise WeightError(
                f"{index.name}: {name} lies in {ascii(file)[:80]}, not a plain file name"
            )
        if not file.endswith((".safetensors", ".bin")):
            raise WeightError(f"{index.name}: {name} lies in {ascii(file)[:80]}, no weight file")
    files = [folder / f for f in sorted(set(table.values()))]
    for path in files:
        if not path.is_file():
            raise WeightError(f"{index.name}: the file {path.name} is missing")
    state = read_files(files, allow_pickle)
    for name, file in table.items():
        if name not in state:
            raise WeightError(f"{index.name}: lists {name}, which {file} does not hold")
        if not state[name].origin.startswith(f"{file}: "):
            raise WeightError(f"{index.name}: {name} is not in {file} but in another file")
    for name, lazy in state.items():
        if name not in table:
            raise WeightError(f"{lazy.origin} is not in {index.name}")
    return state, files


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def tokenizer_folder(*folders: Path | None) -> Path | None:
    """The first of `folders` that holds a sentencepiece or tokenizers model."""
    for folder in folders:
        if folder and any((folder / f).is_file() for f in ("tokenizer.model", "tokenizer.json")):
            return folder
    return None


def _no_doubles(pairs: list, file: str) -> dict:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))
        raise WeightError(f"{file}: {ascii(twice)[:120]} is there twice")
    return out


def _has_key(data: Any, key: str) -> bool:
    if isinstance(data, dict):
        return key in data or any(_has_key(v, key) for v in data.values())
    return isinstance(data, list) and any(_has_key(v, key) for v in data)
