"""Records of other programs turned into ours: Hugging Face's messages, ShareGPT, rows of parquet.

A tag stands where the picture stood; pictures without a place come before the first question. A
system text, which a record has no place for, is put before the first question.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_jax.data.records import is_picture_key, picture_key, refuse_unknown
from llava_jax.datasets import stream
from llava_jax.datasets.source import Record
from llava_jax.errors import SampleError
from llava_jax.images.decode import format_of
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.util import Doubled, need, parse_values, refuse_special

ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "gpt"),
}
_TURNS = ("conversations", "messages", "conversation")
_PICTURES = ("image", "images")
_PART = ("image", "image_url", "url", "path")
"""The keys of an image part that may hold its picture."""
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}

Save = Callable[[bytes], str]
"""Keeps the bytes of a picture that came inside of a record; the path that the record then has."""


def read_rows(path: Path, told: stream.Told | None = None) -> Iterator[Any]:
    """Rows of a JSON list, JSON lines or parquet file. Raises SampleError for one that is neither."""
    refuse_special(path)
    with path.open("rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    if not is_parquet and path.suffix.lower() != ".parquet":
        yield from stream.rows(path, told=told, doubled=True)
        return
    parquet = need("pyarrow.parquet", f"to read {path}", "llava_jax[parquet]")
    try:
        file = parquet.ParquetFile(path)
        size, rows = path.stat().st_size, max(1, file.metadata.num_rows)
        for batch in file.iter_batches(batch_size=64):  # pictures may be inside
            yield from batch.to_pylist()
            if told:
                told(size * batch.num_rows // rows)
    except (OSError, ValueError) as e:  # pyarrow's own errors are of these kinds
        raise SampleError(f"{path}: not a parquet file ({e})") from None


def to_ours(row: Any, index: int, save: Save | None = None) -> Record:
    """One record in LLaVA's form. index: gives it an id where it has none.

    save: see Save. Raises SampleError, without a name, for a row that cannot be a conversation, or of
    which something would be lost: it is turned whole or not at all.
    """
    if not isinstance(row, Mapping):
        raise SampleError(f"{row!r:.60} is not a record")
    turns = _turns_of(row)
    placed: list[Any] = []
    systems, texts = [_system(row)], []
    for n, turn in enumerate(turns):
        role, text = _turn(turn, placed)
        if role != "system":
            texts.append({"from": role, "value": text})
        elif n:
            raise SampleError(f"turn {n} is from system, which only the first may be")
        else:
            systems.append(text)
    first = _first_question(texts)
    systems = [text.strip() for text in systems if text.strip()]
    if len(systems) > 1:
        raise SampleError("there are two system texts, the first turn's and that under `system`")
    if systems:
        first["value"] = f"{systems[0]}\n{first['value']}"
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in texts)
    if placed and tags != len(placed):
        raise SampleError(f"{len(placed)} image parts in its turns, and {tags} tags")
    pictures = [_path(p, save) for p in _pictures(row, placed)]
    if not pictures and (key := picture_key(row, [("", turn["value"]) for turn in texts])):
        raise SampleError(f"the picture is under `{key}`", fix=f"rename the key `{key}` to `image`")
    if pictures and not any(IMAGE_TAG in t["value"] for t in texts):
        first["value"] = f"{IMAGE_TAG}\n" * len(pictures) + first["value"]
    record: Record = {"id": str(row["id"]) if row.get("id") not in (None, "") else str(index)}
    if pictures:
        record["image"] = pictures[0] if len(pictures) == 1 else pictures
    if isinstance(row.get("turns"), str):
        record["turns"] = row["turns"]
    return record | {"conversations": texts}


def _turns_of(row: Mapping[str, Any]) -> list[Any]:
    """The turns of a row, once no other key of it says more than we know of."""
    keys = [k for k in (*_TURNS, "turns") if isinstance(row.get(k), (list, str)) and row[k]]
    if isinstance(row.get("turns"), str):
        keys.remove("turns")  # how they are trained
    if not keys or keys == ["turns"]:
        names = ", ".join(map(str, list(row)[:8]))
        raise SampleError(f"no conversation under {' or '.join(_TURNS)}; its keys: {names}")
    if len(keys) > 1:
        raise SampleError(f"there are turns under {' and '.join(keys)}")
    turns = row[keys[0]]
    if isinstance(turns, str):
        found = parse_values(turns, keys[0], doubled=True)
        turns = found[0] if len(found) == 1 else found
    if not isinstance(turns, list):
        raise SampleError(f"{keys[0]} is {turns!r:.60}, not a list of turns")
    for part in (row, *turns):
        if isinstance(part, Doubled):
            raise SampleError(f"the key {part.key!r} is duplicated")
    refuse_unknown(row, turns, _PICTURES)
    return turns


def _system(row: Mapping[str, Any]) -> str:
    """The system text beside the turns."""
    text = row.get("system")
    if text is not None and not isinstance(text, str):
        raise SampleError(f"system is {text!r:.60}, not a text")
    return text or ""


def _first_question(texts: list[dict[str, str]]) -> dict[str, str]:
    """The first turn of a user, where what has no place goes: training drops an answer before it."""
    for turn in texts:
        if turn["from"] == "human":
            return turn
        if IMAGE_TAG in turn["value"]:
            raise SampleError(
                "a picture is in an answer before the first question, which is dropped"
            )
    raise SampleError("no turn is from a user")


def _turn(turn: Any, placed: list[Any]) -> tuple[str, str]:
    """(role, text) of one turn; pictures among its parts are added to `placed`."""
    if not isinstance(turn, Mapping):
        raise SampleError(f"a turn is {turn!r:.60}")
    said = str(turn.get("from") or turn.get("role") or "").lower()
    role = "system" if said == "system" else ROLES.get(said)
    if role is None:
        raise SampleError(f"a turn is from {said!r}, which is neither user nor assistant")
    content = turn.get("value") if "value" in turn else turn.get("content")
    for one, other in (("value", "content"), ("from", "role")):
        if turn.get(one) and turn.get(other) and turn[one] != turn[other]:
            raise SampleError(f"a turn has both `{one}` and `{other}`")
    if isinstance(content, str):
        return role, content
    if not isinstance(content, list):
        raise SampleError(f"a turn has no text but {content!r:.60}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str) or kind == "text":
            text = part if isinstance(part, str) else part.get("text")
            if not isinstance(text, str):
                raise SampleError(f"a part of a turn has no text but {text!r:.60}")
            own = part if isinstance(part, Mapping) else {}
            if key := next((k for k, v in own.items() if v and is_picture_key(k, v)), None):
                raise SampleError(f"a part of a turn is a text, and has a picture under `{key}`")
            parts.append(text)
        elif kind in ("image", "image_url"):
            placed.append(_part_picture(part, len(placed)))
            parts.append(f"{IMAGE_TAG}\n")
        else:
            raise SampleError(f"a part of a turn is {kind!r}, which is neither text nor image")
    return role, "".join(parts)


def _part_picture(part: Mapping[str, Any], place: int) -> Any:
    """The picture of an image part, None where it stands beside the turns. place: among all of them."""
    keys = [k for k, v in part.items() if v and (k in _PART or is_picture_key(k, v))]
    own = part[keys[0]] if keys else None
    if part.get("text"):
        raise SampleError(f"a part of a turn is an image, and has the text {part['text']!r:.60}")
    if any(part[key] != own for key in keys):
        raise SampleError(f"a part of a turn has pictures under {' and '.join(keys)}")
    if keys and keys[0] not in _PART:
        fix = f"rename the key `{keys[0]}` to `image`"
        raise SampleError(f"the picture of a part of a turn is under `{keys[0]}`", fix=fix)
    if (index := part.get("index")) is not None and index != place:
        raise SampleError(f"image part {place} of its turns has index {index!r:.60}")
    return own["url"] if isinstance(own, Mapping) and "url" in own else own


def _pictures(row: Mapping[str, Any], placed: list[Any]) -> list[Any]:
    """The pictures of a row. placed: of each image part of its turns, the picture or nothing."""
    own = next((row[k] for k in _PICTURES if row.get(k)), None)
    listed = own if isinstance(own, list) else [] if own is None else [own]
    if not placed:
        return listed
    inside = [picture for picture in placed if picture]
    if len(inside) == len(placed) and listed in ([], inside):
        return inside
    if not inside and len(listed) == len(placed):
        return listed
    found = f"{len(inside)} of them with a picture, and {len(listed)} images beside the turns"
    raise SampleError(f"{len(placed)} image parts in its turns, {found}")


def _path(picture: Any, save: Save | None) -> str:
    """The path of a picture that is a path, or {"path", "bytes"} as datasets has it, or bytes."""
    data = picture.get("bytes") if isinstance(picture, Mapping) else picture
    if isinstance(data, bytes):
        if save is None:
            raise SampleError("a picture is inside of the record, and there is no folder for it")
        return save(data)
    path = picture.get("path") if isinstance(picture, Mapping) else picture
    if not isinstance(path, str) or not path:
        raise SampleError(f"a picture is {picture!r:.60}")
    return path.removeprefix("file://")


def saver(folder: Path) -> Save:
    """Keeps pictures in `folder` by their content, each once; paths are relative to its parent.

    Raises SampleError for bytes that are no picture of a kind that we read.
    """

    def save(data: bytes) -> str:
        kind = format_of(data)
        if kind is None:
            raise SampleError("a picture inside of the record is of no accepted format")
        name = f"{hashlib.sha256(data).hexdigest()[:24]}.{_SUFFIX[kind]}"
        target = folder / name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{name}.{os.getpid()}.tmp")  # others may build beside us
            try:
                temporary.write_bytes(data)
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)
        elif target.read_bytes() != data:
            fix = "remove it, and it is written anew"
            raise SampleError(f"{target} is not the picture that its name is a digest of", fix=fix)
        return f"{folder.name}/{name}"

    return save
