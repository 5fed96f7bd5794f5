"""The records of a JSON file, of which only their places are in memory: parsed when they are needed.

A list, JSON lines and concatenated objects are distinguished by content, not by the name. `scan` reads
the file once, from front to back, a window at a time; after it any record is one read and one parse.
A file of UTF-16 or UTF-32 is read from a copy in UTF-8, as one at an address is from a copy on this host.
"""

from __future__ import annotations

import array
import codecs
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from llava_jax import storage
from llava_jax.errors import SampleError
from llava_jax.util import json_decoder, may_go_on, parse_values, read_text, refuse_special

WINDOW = 2**20
"""Bytes of a file that are looked at together; more where a record is longer."""

_SPACE = " \t\r\n"
_DECODER = json_decoder(doubled=True)
_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")


class JsonFile(Sequence[Any]):
    """A sequence of the records of a file, once `scan` has come to its end. Threads may share it.

    lines: it is known to be one value a line, whatever each is (packed data).
    Raises SampleError where the file is missing, or is a pipe or a device.
    """

    def __init__(self, path: str | Path, *, lines: bool = False):
        if not storage.is_address(path) and not os.path.exists(path):
            raise SampleError(f"{path}: no such data file")
        refuse_special(path)
        self.path, self._lines = path, lines
        self._whole: list[Any] | None = None
        self._file: Any = None
        self._places = np.zeros((0, 2), np.int64)

    def scan(self) -> Iterator[Any]:
        """Every record in order, unchecked; one with a duplicated key comes as Doubled.

        Raises SampleError if the file cannot be read, is not JSON, or holds no list of samples.
        """
        places = array.array("q")
        try:
            self._file = self._open()
            yield from self._windows(self._file, places)
        except (_Unusual, UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError):
            if places:  # a list, or objects, with a mistake further on: reading it all says which
                read_records(self.path)
                raise SampleError(f"{self.path}: the file changed while it was read") from None
            self._whole = read_records(self.path)
            yield from self._whole
        self._places = np.frombuffer(places, np.int64).reshape(-1, 2)

    def position(self) -> int:
        """How many bytes of the file `scan` has read so far."""
        return self._file.tell() if self._file else 0

    def __len__(self) -> int:
        return len(self._places) if self._whole is None else len(self._whole)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._whole is not None:
            return self._whole[index]
        start, size = self._places[index].tolist()
        try:
            return _DECODER.decode(os.pread(self._file.fileno(), size, start).decode())
        except (ValueError, OSError):
            fix = "leave the data as it is while it is used"
            raise SampleError(f"{self.path}: the file changed since it was read", fix=fix) from None

    def text(self, index: int) -> bytes:
        """The JSON of a record as it stands in the file, on one line."""
        if self._whole is not None:
            return json.dumps(self._whole[index]).encode()
        start, size = self._places[index].tolist()
        # Line ends in JSON are spaces between values: in a string they are escaped.
        return os.pread(self._file.fileno(), size, start).translate(_ONE_LINE)

    def digest(self) -> str:
        """SHA-256 of the bytes as they are now, of the file that was scanned."""
        found, at = hashlib.sha256(), 0
        while block := os.pread(self._file.fileno(), 2**22, at):
            found.update(block)
            at += len(block)
        return found.hexdigest()

    def state(self) -> tuple[int, int]:
        """(size, time of the last change) of the file that was scanned."""
        found = os.fstat(self._file.fileno())
        return found.st_size, found.st_mtime_ns

    def _open(self) -> BinaryIO:
        """The file; of an address a copy on this host, which is gone when the process ends."""
        try:
            if storage.is_address(self.path):
                with storage.reading(str(self.path)) as stored:
                    file = _copy(iter(lambda: stored.read(2**24), b""))
            else:
                file: Any = open(self.path, "rb")  # noqa: SIM115, it lives as long as the records
            encoding = json.detect_encoding(os.pread(file.fileno(), 64, 0))
            if not encoding.startswith("utf-8"):
                with file, io.TextIOWrapper(file, encoding, newline="") as text:
                    return _copy(part.encode() for part in iter(lambda: text.read(2**22), ""))
            return file
        except OSError as error:
            raise _Unusual from error  # reading it all says what it is

    def _windows(self, file: BinaryIO, places: array.array[int]) -> Iterator[Any]:
        text = _Text(file)
        listed = not self._lines and text.starts()
        while (found := text.value(listed)) is not None:
            record, start, size = found
            if not (listed or self._lines) and isinstance(record, list):
                raise _Unusual
            places.extend((start, size))
            yield record
        if (
            not (listed or self._lines) and len(places) == 2
        ):  # a sample, or something around samples
            records_of([json.loads(os.pread(file.fileno(), places[1], places[0]))], self.path)


def _copy(parts: Iterable[bytes]) -> Any:
    """A file of this host that is gone when the process ends."""
    copy = tempfile.TemporaryFile()  # noqa: SIM115, it lives as long as the records
    copy.writelines(parts)
    copy.seek(0)
    return copy


class _Unusual(Exception):
    """A text that windows do not read: read_records knows what to do with it."""


class _Text:
    """The text of a UTF-8 file, of which a window is in memory."""

    def __init__(self, file: BinaryIO):
        self._file = file
        head = os.pread(file.fileno(), 64, 0)
        self._byte = (
            3 if head.startswith(codecs.BOM_UTF8) else 0
        )  # of the file, at `_at` of the text
        self._file.seek(self._byte)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text, self._at, self._ended = "", 0, False
        self._first = True

    def starts(self) -> bool:
        """Whether it begins as a list does, which is then entered; else it must be objects."""
        first = self._next()
        if first not in ("[", "{"):
            raise _Unusual
        if first == "[":
            self._step()
        return first == "["

    def value(self, listed: bool) -> tuple[Any, int, int] | None:
        """(the next value, its first byte, its bytes); None at the end."""
        c = self._next()
        if listed:
            if c == "]":
                self._step()
                if self._next():
                    raise _Unusual
                return None
            if not self._first:
                if c != ",":
                    raise _Unusual
                self._step()
                c = self._next()
        if not c:
            if listed:
                raise _Unusual
            return None
        self._first = False
        if self._at > WINDOW:
            self._forget()
        while True:
            try:
                record, end = _DECODER.raw_decode(self._text, self._at)
                if self._ended or not may_go_on(self._text, end):
                    break
            except json.JSONDecodeError:
                if self._ended:
                    raise
            self._more(max(WINDOW, len(self._text) - self._at))
        text, at, start = self._text, self._at, self._byte
        own = text[at:end]
        size = len(own) if own.isascii() else len(own.encode())
        self._at, self._byte = end, start + size
        return record, start, size

    def _next(self) -> str:
        """The next character that is no space, not taken; "" at the end."""
        while True:
            while self._at < len(self._text):
                c = self._text[self._at]
                if c not in _SPACE:
                    return c
                self._step()
            if self._ended:
                return ""
            self._forget()
            self._more(WINDOW)

    def _step(self) -> None:
        """Past a space or a sign, a byte each."""
        self._at += 1
        self._byte += 1

    def _forget(self) -> None:
        """Drops what is behind."""
        self._text, self._at = self._text[self._at :], 0

    def _more(self, count: int) -> None:
        data = self._file.read(count)
        self._ended = not data
        self._text += self._decoder.decode(data, final=self._ended)


def read_records(path: str | Path) -> list[Any]:
    """All records of a file at once, unchecked. A record or turn with a duplicated key comes as Doubled.

    Raises SampleError if the file is missing, is not JSON, or holds no list of samples.
    """
    if not storage.is_address(path):
        if not os.path.exists(path):
            raise SampleError(f"{path}: no such data file")
        refuse_special(path)
    return records_of(parse_values(read_text(path), path, doubled=True), path)


def records_of(values: list[Any], path: str | Path) -> list[Any]:
    """The records among the JSON values of a file. Raises SampleError where they are no list of them."""
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
