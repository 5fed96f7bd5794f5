"""Where built records go. A writer takes them one at a time and makes nothing visible before its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from llava_jax.datasets.source import Record
from llava_jax.errors import LlavaError
from llava_jax.util import sync_path, take_lock

Tell = Callable[[dict[str, Any]], Any]


class Writer(Protocol):
    """A format that records are written in. Leaving the `with` block by an error undoes everything."""

    def __enter__(self) -> Writer: ...

    def __exit__(self, *error: object) -> None: ...

    def write(self, record: Record) -> None:
        """Takes the next record."""

    def finish(self, tell: Tell | None = None) -> dict[str, Any]:
        """Makes what was written visible; facts about it for the manifest ("path", "bytes", ...).

        tell: takes the facts just before that.
        """
        ...


class JsonWriter:
    """A JSON list with a record on each line; the file appears as a whole or not at all.

    Until then it is `.NAME.tmp`, which one process at a time holds locked; what a killed one left there
    is begun anew. Raises LlavaError where another process writes it, or where something is at `path`.
    """

    def __init__(self, path: Path):
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._digest = hashlib.sha256()
        self._bytes, self._records = 0, 0

    def __enter__(self) -> JsonWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("ab")
        try:
            if not self._is_ours():
                raise LlavaError(
                    f"{self._path}: another process is writing it",
                    fix="wait for it, or give another --out",
                )
            refuse_there(self._path)  # it may have come since
            self._file.truncate(0)
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._temporary.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):  # a full disk again, which the error has said
                self._file.close()

    def _is_ours(self) -> bool:
        """Whether the temporary file is locked now, and still the one of that name."""
        if (taken := take_lock(self._file)) is not True:
            return taken is None  # a file system without locks
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat())
        except FileNotFoundError:
            return False  # its holder has just come to its end

    def write(self, record: Record) -> None:
        text = json.dumps(record, ensure_ascii=False)
        self._put(("[\n" if not self._records else ",\n") + text)
        self._records += 1

    def finish(self, tell: Tell | None = None) -> dict[str, Any]:
        self._put("\n]\n" if self._records else "[]\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        digest = self._digest.hexdigest()
        facts = {"path": self._path.name, "bytes": self._bytes, "sha256": digest}
        if tell:
            tell(facts)
        try:
            os.link(self._temporary, self._path)  # as a rename, but it replaces nothing
        except FileExistsError:
            refuse_there(self._path)
        except OSError:  # a file system without links
            refuse_there(self._path)
            self._temporary.replace(self._path)
        sync_path(self._path.parent)
        return facts

    def _put(self, text: str) -> None:
        data = text.encode("utf-8", "backslashreplace")  # half of a surrogate pair
        self._digest.update(data)
        self._bytes += len(data)
        self._file.write(data)


def open_writer(out: Path) -> Writer:
    """A writer to `out`. Raises LlavaError where something is there already."""
    refuse_there(out)
    return JsonWriter(out)


def refuse_there(path: Path, fix: str = "give another name for the output") -> None:
    """Raises LlavaError where something is at `path`, a link to nothing too."""
    if os.path.lexists(path):
        raise LlavaError(f"{path} is there already, and is not replaced", fix=fix)
