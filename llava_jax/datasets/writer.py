"""Where built records go. A writer takes them one at a time and makes nothing visible before its end."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

from llava_jax.datasets.source import Record
from llava_jax.errors import LlavaError


class Writer(Protocol):
    """A format that records are written in. Leaving the `with` block by an error undoes everything."""

    def __enter__(self) -> Writer: ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, record: Record) -> None:
        """Takes the next record."""

    def finish(self) -> dict[str, Any]:
        """Makes what was written visible; facts about it for the manifest ("path", "bytes", ...)."""
        ...


class JsonWriter:
    """A JSON list with a record on each line; the file appears as a whole or not at all."""

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._digest = hashlib.sha256()
        self._bytes, self._records = 0, 0

    def __enter__(self) -> JsonWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def write(self, record: Record) -> None:
        text = json.dumps(record, ensure_ascii=False)
        self._put(("[\n" if not self._records else ",\n") + text)
        self._records += 1

    def finish(self) -> dict[str, Any]:
        self._put("\n]\n" if self._records else "[]\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._temporary.replace(self._path)
        digest = self._digest.hexdigest()
        return {"path": self._path.name, "bytes": self._bytes, "sha256": digest}

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")  # half of a surrogate pair
        self._digest.update(data)
        self._bytes += len(data)
        self._file.write(data)


def open_writer(out: Path) -> Writer:
    """A writer to `out`. Raises LlavaError where something is there already."""
    if out.exists():
        raise LlavaError(f"{out} is there already, and is not replaced", fix="give another --out")
    return JsonWriter(out)
