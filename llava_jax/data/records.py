"""LLaVA's training files: JSON (or JSON lines) of conversations, beside a folder of images.

Format (docs/Finetune_Custom_Data.md of the original): a list of
{"id", "image"?: path below the image folder, "conversations": [{"from": "human"|"gpt", "value"}]}.
Here "image" may also be a list of paths, one for each "<image>" of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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
