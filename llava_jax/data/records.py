"""LLaVA's training files: JSON (or JSON lines) of conversations, beside a folder of images.

Format (docs/Finetune_Custom_Data.md of the original): a list of
{"id", "image"?: path below the image folder, "conversations": [{"from": "human"|"gpt", "value"}]}.
Here "image" may also be a list of paths, one for each "<image>" of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from llava_jax.data.settings import DataFile
from llava_jax.errors import ImageError, SampleError
from llava_jax.images.decode import refuse_address
from llava_jax.storage import is_address
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.records import image_paths, read_turns
from llava_jax.util import Doubled, parse_values, read_text

_PICTURE_KEYS = re.compile(
    r"(images?|imgs?|pictures?|photos?|videos?)([_-]?(paths?|files?|names?|urls?|filenames?))?",
    re.IGNORECASE,
)
_PICTURE = re.compile(r".+\.(jpe?g|png|webp|gif|bmp|tiff?|heic|mp4)", re.IGNORECASE)


def read_records(path: str | Path) -> list[Any]:
    """The records of one file, unchecked. A record or turn with a duplicated key comes as Doubled.

    A list, JSON lines and concatenated objects are distinguished by content, not by the name.
    Raises SampleError if the file is missing, is not JSON, or holds no list of samples.
    """
    if not is_address(path):
        path = Path(path)
        if not path.exists():
            raise SampleError(f"{path}: no such data file")
    text = read_text(path)
    records = _records_of(parse_values(text, path), path)
    if _may_have_doubled_keys(text, records):
        records = _records_of(parse_values(text, path, doubled=True), path)
    return records


def _records_of(values: list[Any], path: str | Path) -> list[Any]:
    if len(values) == 1 and isinstance(values[0], list):
        return values[0]
    lines = str(path).endswith((".jsonl", ".ndjson"))
    alone = values[0] if len(values) == 1 else None
    if isinstance(alone, Mapping) and not (lines or "conversations" in alone):
        lists = [repr(k) for k, v in alone.items() if isinstance(v, list)]
        inside = f"an object with a list under {', '.join(lists)}" if lists else "one object"
        raise SampleError(
            f"{path}: expected a list of samples, found {inside}", fix="save the list itself"
        )
    if any(isinstance(v, list) for v in values):
        raise SampleError(f"{path}: there are several lists", fix="join them into one")
    if alone is not None and not isinstance(alone, Mapping):
        raise SampleError(f"{path}: expected a list of samples, found {alone!r:.60}")
    return values


def _may_have_doubled_keys(text: str, records: list[Any]) -> bool:
    """Whether a key is in the text more often than in what was read. Cheap; yes may be wrong.

    Within a string quotes are escaped, so `"image":` in the raw text is a key.
    """
    dicts = [r for r in records if isinstance(r, Mapping)]
    turns = sum(len(c) for r in dicts if isinstance(c := r.get("conversations"), list))
    counts = {key: sum(key in r for r in dicts) for key in ("image", "conversations")}
    return any(
        text.count(f'"{k}":') + text.count(f'"{k}" :') > n
        for k, n in {**counts, "value": turns}.items()
    )


def read_files(files: Sequence[DataFile]) -> tuple[list[Any], list[str], list[int]]:
    """(records, "file[index]" of each, which file each is of); files of weight 0 are not opened."""
    records: list[Any] = []
    places: list[str] = []
    file_of: list[int] = []
    for n, file in enumerate(files):
        if file.weight:
            found = read_records(file.path)
            records += found
            places += [f"{Path(file.path).name}[{i}]" for i in range(len(found))]
            file_of += [n] * len(found)
    if not records:
        paths = ", ".join(f.path for f in files)
        raise SampleError(f"{paths}: there are no samples", fix="set data.path")
    return records, places, file_of


def record_name(record: Any, place: str) -> str:
    """How errors call a record of a file: its place, and its id where it has one."""
    own = record.get("id") if isinstance(record, Mapping) else None
    return place if own is None else f"{place} (id {own!r})"


def check_record(record: Any, place: str) -> tuple[list[tuple[int, str]], tuple[str, ...]]:
    """(role, text) of its turns and the paths of its images.

    Raises SampleError, naming the place and the id, if a record cannot be a conversation, or would be
    trained without the picture it means: a picture under another key, an address, or a path that
    leaves the image folder.
    """
    where = record_name(record, place)
    turns = read_turns(record, where)
    for part in (record, *record["conversations"]):
        if isinstance(part, Doubled):
            raise SampleError(f"sample {where}: the key {part.key!r} is duplicated")
    paths = image_paths(record, where)
    if not paths:
        _refuse_picture_elsewhere(record, turns, where)
    for path in paths:
        _check_path(path, where)
    return turns, paths


def _refuse_picture_elsewhere(record: Mapping[str, Any], turns: Any, where: str) -> None:
    """Without `image`, a key that names a picture would be passed over and the text trained alone."""
    tagged = None
    for key, value in record.items():
        if key in ("id", "conversations", "image") or not value:
            continue
        known = _PICTURE_KEYS.fullmatch(key)
        if not known and tagged is None:
            tagged = any(IMAGE_TAG in text for _, text in turns)
        if (known and isinstance(value, (str, list, dict))) or (tagged and _names_pictures(value)):
            raise SampleError(
                f"sample {where}: the picture is under `{key}`, not `image`",
                fix=f"rename the key `{key}` to `image`",
            )


def _names_pictures(value: Any) -> bool:
    """Whether a value, or the first of a list, looks like an image's path, bytes or description."""
    if isinstance(value, list):
        return bool(value) and _names_pictures(value[0])
    if isinstance(value, Mapping):
        return any(_names_pictures(v) for v in value.values())
    return isinstance(value, str) and bool(_PICTURE.fullmatch(value))


def _check_path(path: str, where: str) -> None:
    try:
        refuse_address(path, f"{path:.100}")
    except ImageError as e:
        raise SampleError(f"sample {where}: {e.message}", fix=e.fix) from None
    if path.startswith("data:"):
        raise SampleError(
            f"sample {where}: {path[:30]!r}... is not a path", fix="save the picture as a file"
        )
    if path[0] == "/" or (".." in path and ".." in PurePosixPath(path).parts):
        raise SampleError(
            f"sample {where}: image path {path!r} leaves the image folder",
            fix="make it relative to data.image_folder",
        )
