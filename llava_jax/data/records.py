"""LLaVA's training files: JSON (or JSON lines) of conversations, beside a folder of images.

Format (docs/Finetune_Custom_Data.md of the original): a list of
{"id", "image"?: path below the image folder, "conversations": [{"from": "human"|"gpt", "value"}]}.
Here "image" may also be a list of paths, one for each "<image>" of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from llava_jax.errors import ImageError, SampleError
from llava_jax.images.decode import refuse_address
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.records import image_paths, read_turns
from llava_jax.util import Doubled

_PICTURE_KEYS = re.compile(
    r"(images?|imgs?|pictures?|photos?|videos?)([_-]?(paths?|files?|names?|urls?|filenames?))?",
    re.IGNORECASE,
)
_SECOND = re.compile(r"(images?|imgs?|pictures?|photos?)|videos?.*", re.IGNORECASE)
"""Beside `image`, the keys of other pictures. `image_url` and the like may be facts about the same one."""
_WEIGHT = re.compile(r"weight|loss_weight|train|trainable", re.IGNORECASE)
_TOLD = ("tool_calls", "function_call", "reasoning_content", "thinking")
_PICTURE = re.compile(r".+\.(jpe?g|png|webp|gif|bmp|tiff?|heic|mp4)", re.IGNORECASE)


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
    try:
        refuse_unknown(record, record["conversations"])
    except SampleError as e:
        raise SampleError(f"sample {where}: {e.message}", fix=e.fix) from None
    paths = image_paths(record, where)
    if not paths:
        _refuse_picture_elsewhere(record, turns, where)
    for path in paths:
        check_path(path, where)
    return turns, paths


def refuse_unknown(
    record: Mapping[str, Any], turns: Sequence[Any], keys: Sequence[str] = ("image",)
) -> None:
    """Raises SampleError, without a name, for a key of record or turn that says what nobody acts upon.

    That is a second place of pictures, pictures in a turn, a video, a weight other than 1, calls of
    tools and thoughts: the record would be trained, but not as it was meant. keys: of its pictures.
    """
    found = next((key for key in keys if record.get(key)), None)
    own = record[found] if found else None
    own = own if isinstance(own, list) else [own]
    for key, value in record.items():
        if key in ("id", "conversations", found) or not isinstance(key, str):
            continue
        same = (value if isinstance(value, list) else [value]) == own
        if found and value and not same and _SECOND.fullmatch(key) and _holds(value):
            fix = f"put all pictures under `{found}`, in the order of their tags"
            raise SampleError(f"pictures are under `{found}` and `{key}`", fix=fix)
        _refuse_weight(key, value)
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or len(turn) <= 2:
            continue
        for key, value in turn.items():
            if not isinstance(key, str):
                continue
            if value and (key in _TOLD or (_PICTURE_KEYS.fullmatch(key) and _holds(value))):
                raise SampleError(f"turn {i} has `{key}`, which is not trained")
            _refuse_weight(key, value, f"turn {i}: ")


def _refuse_weight(key: str, value: Any, where: str = "") -> None:
    if value is not None and value != 1 and _WEIGHT.fullmatch(key):
        fix = "leave the key out, or the record where it should not be trained"
        raise SampleError(f"{where}`{key}` is {value!r:.60}: every answer counts once", fix=fix)


def is_picture_key(key: Any, value: Any) -> bool:
    """Whether a key is called as those of pictures are, and its value may be one."""
    return isinstance(key, str) and bool(_PICTURE_KEYS.fullmatch(key)) and _holds(value)


def _holds(value: Any) -> bool:
    """Whether a value may be pictures, and is no number of them."""
    return isinstance(value, (str, bytes, list, dict))


def _refuse_picture_elsewhere(record: Mapping[str, Any], turns: Any, where: str) -> None:
    """Without `image`, a key that names a picture would be passed over and the text trained alone."""
    if key := picture_key(record, turns):
        raise SampleError(
            f"sample {where}: the picture is under `{key}`, not `image`",
            fix=f"rename the key `{key}` to `image`",
        )


def picture_key(record: Mapping[str, Any], turns: Sequence[tuple[Any, str]]) -> str | None:
    """The key of a record without `image` that names a picture all the same; None for none."""
    tagged = None
    for key, value in record.items():
        if key in ("id", "conversations", "image") or not value or not isinstance(key, str):
            continue
        known = _PICTURE_KEYS.fullmatch(key)
        if not known and tagged is None:
            tagged = any(IMAGE_TAG in text for _, text in turns)
        if (known and _holds(value)) or (tagged and _names_pictures(value)):
            return key
    return None


def _names_pictures(value: Any) -> bool:
    """Whether a value, or the first of a list, looks like an image's path, bytes or description."""
    if isinstance(value, list):
        return bool(value) and _names_pictures(value[0])
    if isinstance(value, Mapping):
        return any(_names_pictures(v) for v in value.values())
    return isinstance(value, str) and bool(_PICTURE.fullmatch(value))


def check_path(path: str, where: str) -> None:
    """Raises SampleError for a path that is an address or leaves the image folder."""
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
