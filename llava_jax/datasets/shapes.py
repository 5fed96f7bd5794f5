"""Records of other programs turned into ours: Hugging Face's messages, ShareGPT, rows of parquet.

A tag stands where the picture stood; pictures without a place come before the first question. A
system text, which a record has no place for, is put before the first question.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from llava_jax.datasets import stream
from llava_jax.datasets.source import Record
from llava_jax.errors import SampleError
from llava_jax.images.decode import format_of
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.util import need

ROLES = {
    **dict.fromkeys(("human", "user"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "gpt"),
}
_TURNS = ("conversations", "messages", "conversation")
_PICTURES = ("image", "images")
_SUFFIX = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp"}

Save = Callable[[bytes], str]
"""Keeps the bytes of a picture that came inside of a record; the path that the record then has."""


def read_rows(path: Path, told: stream.Told | None = None) -> Iterator[Any]:
    """Rows of a JSON list, JSON lines or parquet file. Raises SampleError for one that is neither."""
    if path.suffix != ".parquet":
        yield from stream.rows(path, told=told)
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

    save: see Save. Raises SampleError, without a name, for a row that cannot be a conversation.
    """
    if not isinstance(row, Mapping):
        raise SampleError(f"{row!r:.60} is not a record")
    key = next((k for k in _TURNS if isinstance(row.get(k), (list, str)) and row[k]), None)
    if key is None:
        keys = ", ".join(map(str, list(row)[:8]))
        raise SampleError(f"no conversation under {' or '.join(_TURNS)}; its keys: {keys}")
    turns = json.loads(row[key]) if isinstance(row[key], str) else row[key]
    placed: list[Any] = []
    system, texts = "", []
    for turn in turns:
        role, text = _turn(turn, placed)
        if role == "system":
            system = text
        else:
            texts.append({"from": role, "value": text})
    if system.strip() and texts:
        texts[0]["value"] = f"{system.strip()}\n{texts[0]['value']}"
    pictures = [_path(p, save) for p in _pictures(row, placed)]
    if pictures and texts and not any(IMAGE_TAG in t["value"] for t in texts):
        tags = f"{IMAGE_TAG}\n" * len(pictures)
        texts[0]["value"] = tags + texts[0]["value"]
    record: Record = {"id": str(row["id"]) if row.get("id") not in (None, "") else str(index)}
    if pictures:
        record["image"] = pictures[0] if len(pictures) == 1 else pictures
    if isinstance(row.get("turns"), str):
        record["turns"] = row["turns"]
    return record | {"conversations": texts}


def _turn(turn: Any, placed: list[Any]) -> tuple[str, str]:
    """(role, text) of one turn; pictures among its parts are added to `placed`."""
    if not isinstance(turn, Mapping):
        raise SampleError(f"a turn is {turn!r:.60}")
    said = str(turn.get("from") or turn.get("role") or "").lower()
    role = "system" if said == "system" else ROLES.get(said)
    if role is None:
        raise SampleError(f"a turn is from {said!r}, which is neither user nor assistant")
    content = turn.get("value") if "value" in turn else turn.get("content")
    if isinstance(content, str):
        return role, content
    if not isinstance(content, list):
        raise SampleError(f"a turn has no text but {content!r:.60}")
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(part, str) or kind == "text":
            parts.append(part if isinstance(part, str) else part.get("text") or "")
        elif kind in ("image", "image_url"):
            own = next(
                (part[k] for k in ("image", "image_url", "url", "path") if part.get(k)), None
            )
            placed.append(own["url"] if isinstance(own, Mapping) and "url" in own else own)
            parts.append(f"{IMAGE_TAG}\n")
        else:
            raise SampleError(f"a part of a turn is {kind!r}, which is neither text nor image")
    return role, "".join(parts)


def _pictures(row: Mapping[str, Any], placed: list[Any]) -> list[Any]:
    """The pictures of a row. placed: of each image part of its turns, the picture or nothing."""
    own = next((row[k] for k in _PICTURES if row.get(k)), None)
    listed = own if isinstance(own, list) else [] if own is None else [own]
    if not placed:
        return listed
    inside = [picture for picture in placed if picture]
    if len(inside) == len(placed) and len(listed) in (0, len(placed)):
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
            temporary = target.with_suffix(".tmp")
            temporary.write_bytes(data)
            temporary.replace(target)
        return f"{folder.name}/{name}"

    return save
