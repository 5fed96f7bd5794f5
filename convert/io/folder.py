"""The tensors and small files of a checkpoint folder, read without trusting the folder.

Which files hold the weights is decided here; source.py and formats/ decide what they mean.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava_jax.convert.io import safetensors, torch_file
from llava_jax.convert.io.lazy import Lazy
from llava_jax.errors import WeightError
from llava_jax.params import unique

log = logging.getLogger(__name__)

MAX_JSON = 50_000_000  # bytes
PROJECTOR_FILE = "mm_projector.bin"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
NON_LORA_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
# Beside the weights, and not weights of the model.
_OTHER = (PROJECTOR_FILE, "training_args.bin", "optimizer.bin", "scheduler.bin")
_OTHER = (*_OTHER, *ADAPTER_FILES, *NON_LORA_FILES)
EXPECTED = "expected .safetensors or .bin files (the hub's .bin need --allow-pickle), or an index"
_SAVES = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # what save_pretrained writes


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object from a checkpoint folder; {} when the file is absent and not `required`.

    Raises WeightError naming the file when it is malformed, has a duplicated key, or asks for code
    (`auto_map`): nothing in a checkpoint is ever run.
    """
    if not path.is_file():
        if required:
            raise WeightError(f"{path.parent}: there is no {path.name}")
        return {}
    if path.stat().st_size > MAX_JSON:
        raise WeightError(f"{path} is larger than {MAX_JSON} bytes")
    raw = path.read_bytes()
    safetensors.refuse_stand_in(raw, str(path))
    try:  # some editors begin a file with a byte order mark
        text = raw.decode("utf-8-sig")
        data = json.loads(text, object_pairs_hook=lambda p: unique(p, str(path)))
        code = _has_key(data, "auto_map")
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise WeightError(f"{path} is not valid JSON (at {place})") from None
    except (ValueError, RecursionError):  # no UTF-8, or more digits or depth than Python reads
        raise WeightError(f"{path} is not valid JSON") from None
    if not isinstance(data, dict):
        raise WeightError(f"{path} is not a JSON object")
    if code:
        raise WeightError(f"{path} asks for code of its own (auto_map), which is never run")
    return data


def _has_key(data: Any, key: str) -> bool:
    if isinstance(data, dict):
        return key in data or any(_has_key(v, key) for v in data.values())
    return isinstance(data, list) and any(_has_key(v, key) for v in data)


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model whose weights lie beside it.

    Raises WeightError without one, and for one that says that the weights are quantised.
    """
    data = read_json(folder / "config.json", required=True)
    _refuse_quantised_config(data, folder / "config.json")
    return data


def read_folder(folder: Path, allow_pickle: bool) -> tuple[dict[str, Lazy], list[Path]]:
    """All weight tensors of a folder by name, and the files that hold them.

    Which files those are is decided as transformers decides it: see `weight_files`. Raises
    WeightError for a tensor that is duplicated, that an index and its files do not agree on, or
    (in an export of ours) that was transposed since.
    """
    files, left_over = weight_files(folder)
    if not files:
        raise WeightError(
            f"{folder}: there are no weights",
            fix=EXPECTED,
        )
    if left_over:
        names = [p.name for p in left_over]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning(
            "%s: %s is read, as transformers does; not read: %s%s",
            folder, files[0].name, ", ".join(names[:3]), more,
        )  # fmt: skip
    if files[0].suffix == ".json":
        state, files = _read_index(folder, files[0], allow_pickle)
    else:
        state = read_files(files, allow_pickle)
    _refuse_quantised_tensors(state, folder)
    safetensors.check_orientation(read_json(folder / safetensors.SQUARES), state)
    return state, files


def weight_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """(the files to read, or the one index that lists them; files of other saves, which are not read).

    The order is that of transformers' _get_resolved_checkpoint_files: model.safetensors, its index,
    pytorch_model.bin, its index. After those, what other tools write: any index, else every
    .safetensors, or every .bin, file. Raises WeightError for several indexes of other names.
    """
    saves = [
        (
            folder / f"{stem}{ending}",
            folder / f"{stem}{ending}.index.json",
            sorted(folder.glob(f"{stem}-[0-9]*-of-[0-9]*{ending}")),
        )
        for stem, ending in _SAVES
    ]
    for n, (whole, index, shards) in enumerate(saves):
        others = [path for w, _, s in saves[n + 1 :] for path in (w, *s)]
        if whole.is_file() and not (index.is_file() and _lists_only(index, whole.name)):
            return [whole], [p for p in (index, *shards, *others) if p.is_file()]
        if index.is_file():
            return [index], [p for p in others if p.is_file()]
    for ending in (".safetensors", ".bin"):
        found = sorted(folder.glob(f"*{ending}.index.json"))
        if len(found) > 1:
            raise WeightError(f"{folder}: there are several indexes: {[p.name for p in found]}")
        if found:
            return found, []
    for pattern in ("*.safetensors", "*.bin"):
        found = sorted(p for p in folder.glob(pattern) if p.is_file() and p.name not in _OTHER)
        if found:
            return found, []
    return [], []


def _lists_only(index: Path, name: str) -> bool:
    """Whether an index names the one file `name` and no other."""
    try:
        table = read_json(index).get("weight_map")
    except WeightError:  # malformed, so that nothing is read from it
        return False
    return isinstance(table, dict) and set(map(str, table.values())) == {name}


def read_files(files: Iterable[Path], allow_pickle: bool) -> dict[str, Lazy]:
    """The tensors of several files together. Raises WeightError for a duplicated name."""
    return unique(item for path in files for item in read_file(path, allow_pickle).items())


def read_file(path: Path, allow_pickle: bool) -> dict[str, Lazy]:
    """The tensors of one file, by its ending."""
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    return torch_file.read(path, allow_pickle)


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of `names` that `folder` has, as PEFT looks for them; others are named in the log."""
    found = [folder / n for n in names if (folder / n).is_file()]
    if len(found) > 1:
        log.warning("%s: %s is read, %s is not", folder, found[0].name, found[1].name)
    return found[0] if found else None


def _read_index(
    folder: Path, index: Path, allow_pickle: bool
) -> tuple[dict[str, Lazy], list[Path]]:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise WeightError(f"{index.name} has no weight_map")
    for name, file in table.items():
        safetensors.check_name(name, index.name)
        # A path, or a link's name, could lead out of the folder; a hub cache's own links may.
        plain = isinstance(file, str) and Path(file).name == file and "\\" not in file
        if not plain or not file.endswith((".safetensors", ".bin")):
            raise WeightError(
                f"{index.name}: {name} is in {ascii(file)[:80]}, expected the plain name of a "
                ".safetensors or .bin file"
            )
    files = [folder / f for f in sorted(set(table.values()))]
    for path in files:
        if path.suffix == ".bin" and not allow_pickle:  # even where the hub's was not fetched
            torch_file.refuse(path)
        if not path.is_file():
            raise WeightError(f"{index.name}: the file {path.name} is missing")
    state = read_files(files, allow_pickle)
    for name, file in table.items():
        if name not in state:
            raise WeightError(f"{index.name} lists {name}, which is missing in {file}")
        if not state[name].origin.startswith(f"{file}: "):
            raise WeightError(f"{index.name}: {name} is not in {file} but in another file")
    for name, lazy in state.items():
        if name not in table:
            raise WeightError(f"{lazy.origin} is not in {index.name}")
    return state, files


def find_beside(name: str, folder: Path, *files: str) -> Path | None:
    """The folder `name` that a checkpoint names: in its `folder`, beside it, or from where we run.

    files: it must hold one of these. A name that leads upwards is never followed.
    """
    if name and ".." not in Path(name).parts:
        for place in (folder / name, folder.parent / name, Path(name)):
            if any((place / file).is_file() for file in files):
                return place
    return None


def tokenizer_folder(*folders: Path | None) -> Path | None:
    """The first of `folders` that holds a sentencepiece or tokenizers model."""
    for folder in folders:
        if folder and any((folder / f).exists() for f in ("tokenizer.model", "tokenizer.json")):
            return folder
    return None


# Quantised weights, which are refused by the name of the method -----------------------------------

USE_16_BIT = "use the 16-bit weights"
# Where a config.json says it: transformers', compressed-tensors' older name, and MLX's.
_KEYS = ("quantization_config", "compression_config", "quantization")
# What the methods call their tensors (the names under which transformers 5 and vLLM load them).
_TENSORS = {
    "bitsandbytes": r"absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB",
    "GPTQ or AWQ": r"qweight|qzeros|g_idx",
    "compressed-tensors": r"weight_packed|weight_zero_point|weight_shape",
    "FP8": r"weight_scale|weight_scale_inv|input_scale",
    "HQQ": r"W_q",
    "AQLM": r"codebooks|codes",
    "quanto": r"weight\._(data|scale)",
    "EETQ": r"weight_scales",
}


def without_quantisation(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that no longer says its weights are quantised: the base's are, not these."""
    return {k: v for k, v in data.items() if k not in _KEYS}


def _refuse_quantised_config(data: Mapping[str, Any], file: Path) -> None:
    """Raises WeightError naming the method when a config.json, or a part of it, says it."""
    for part in (data, *(v for v in data.values() if isinstance(v, Mapping))):
        for key in _KEYS:
            if part is data or key in _KEYS[:2]:
                name = _method(part.get(key))
                if name:
                    raise WeightError(f"{file}: {key} {name} is not supported", fix=USE_16_BIT)


def _method(settings: Any) -> str | None:
    """The method that a quantization_config names; None where it quantises nothing."""
    if not isinstance(settings, Mapping) or not settings:
        return None
    loads = [v for k, v in settings.items() if k.lstrip("_") in ("load_in_4bit", "load_in_8bit")]
    if loads and not any(loads):
        return None
    name = settings.get("quant_method") or ("bitsandbytes" if loads else None)
    bits = settings.get("bits")
    name = name or (f"of {bits} bits" if isinstance(bits, int) else "of unknown method")
    return ascii(str(name))[1:-1][:40]


def _refuse_quantised_tensors(names: Iterable[str], where: Path) -> None:
    """Raises WeightError naming the method and a tensor when the names are those of quantised weights."""
    for name in names:
        for kind, endings in _TENSORS.items():
            if re.search(rf"\.({endings})$", name):
                raise WeightError(
                    f"{where}: {name[:200]} belongs to weights quantised by {kind}, "
                    "which are not supported",
                    fix=USE_16_BIT,
                )
