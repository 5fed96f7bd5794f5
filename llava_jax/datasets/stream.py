"""Values of large JSON files one at a time, so that no file lies whole in memory.

The owners' files reach 1 GB, which Python's json turns into several.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llava_jax.errors import SampleError, instead_of_file
from llava_jax.util import json_decoder, may_go_on

CHUNK = 1 << 20
_SPACE = " \t\r\n"
Told = Callable[[int], Any]
"""Takes the number of bytes that were read since it was called last."""


def rows(
    path: str | Path, key: str | None = None, *, told: Told | None = None, doubled: bool = False
) -> Iterator[Any]:
    """The elements of a list, or of the list under `key` of an object; or values after each other.

    told: see Told. doubled: an object with a key twice comes as llava_jax.util.Doubled.
    Raises SampleError, with the file and line, where it cannot be read or is not JSON.
    """
    with _Text(path, told, doubled) as text:
        if text.peek() == "[":
            yield from text.elements()
            text.end()
        elif key is None:
            while text.peek():
                yield text.value()
        else:
            found = False
            for name in text.names():
                if name == key and text.peek() == "[":
                    found = True
                    yield from text.elements()
                else:
                    text.value()
            text.end()
            if not found:
                raise SampleError(f"{path}: there is no list under {key!r}")


def entries(path: str | Path, *, told: Told | None = None) -> Iterator[tuple[str, Any]]:
    """(key, value) of an object; of a value that is a list, (key, element) for each element."""
    with _Text(path, told) as text:
        if text.peek() != "{":
            raise SampleError(f"{path}: expected an object")
        for name in text.names():
            if text.peek() == "[":
                for element in text.elements():
                    yield name, element
            else:
                yield name, text.value()
        text.end()


class _Text:
    """The text of a JSON file, of which a window is in memory."""

    def __init__(self, path: str | Path, told: Told | None, doubled: bool = False):
        self._path, self._told = path, told
        self._decode = json_decoder(doubled).raw_decode
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False
        try:
            self._file = open(path, "rb")  # noqa: SIM115, closed by __exit__
            head = self._file.read(200)
            self._file.seek(0)
        except FileNotFoundError:
            raise SampleError(f"{path}: no such data file") from None
        except OSError as e:
            raise SampleError(f"{path}: cannot be read ({e.strerror})") from None
        if found := instead_of_file(head):
            raise SampleError(f"{path} {found[0]}", fix=found[1])
        self._text = codecs.getincrementaldecoder(json.detect_encoding(head[:64]))()

    def __enter__(self) -> _Text:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if self._buffer[self._at] not in _SPACE:
                    return self._buffer[self._at]
                self._at += 1
            if not self._more():
                return ""

    def value(self) -> Any:
        """The JSON value that comes next."""
        self.peek()
        while True:
            try:
                found, end = self._decode(self._buffer, self._at)
            except json.JSONDecodeError as e:
                # Only what can be the window's end, and not a mistake, is worth reading on for.
                open_text = e.msg.startswith("Unterminated")
                if (open_text or e.pos > len(self._buffer) - 16) and self._more():
                    continue
                raise self._error(e.pos, open_text) from None
            except (RecursionError, ValueError):
                raise self._error(self._at) from None
            if may_go_on(self._buffer, end) and self._more():
                continue
            self._at = end
            return found

    def elements(self) -> Iterator[Any]:
        """The elements of the list that comes next."""
        self._take("[")
        if self.peek() == "]":
            self._at += 1
            return
        while True:
            yield self.value()
            if self._take(",]") == "]":
                return

    def names(self) -> Iterator[str]:
        """The keys of the object that comes next; the caller takes each one's value."""
        self._take("{")
        if self.peek() == "}":
            self._at += 1
            return
        seen: set[int] = set()  # of hashes: GQA has a million keys
        while True:
            name = self.value()
            if hash(name) in seen:
                raise SampleError(f"{self._path}: the key {name!r:.60} is duplicated")
            seen.add(hash(name))
            self._take(":")
            yield name
            if self._take(",}") == "}":
                return

    def end(self) -> None:
        """Raises SampleError unless nothing is left."""
        if self.peek():
            raise self._error(self._at)

    def _take(self, wanted: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            raise self._error(self._at)
        self._at += 1
        return found

    def _more(self) -> bool:
        if self._ended:
            return False
        self._line += self._buffer.count("\n", 0, self._at)
        kept = self._buffer[self._at :]
        data = self._file.read(max(CHUNK, len(kept)))  # doubled: one long value is read once over
        self._ended = not data
        try:
            self._buffer, self._at = kept + self._text.decode(data, final=self._ended), 0
        except UnicodeDecodeError:
            raise SampleError(
                f"{self._path}: cannot be read as UTF-8 or UTF-16 text", fix="save it as UTF-8 JSON"
            ) from None
        if self._told:
            self._told(len(data))
        return True

    def _error(self, at: int, open_text: bool = False) -> SampleError:
        line = self._line + self._buffer.count("\n", 0, at)
        cut_off = self._ended and (open_text or not self._buffer[at:].strip(_SPACE))
        fix = "the file ends too early: was it copied whole?" if cut_off else None
        return SampleError(f"{self._path}: not JSON at line {line}", fix=fix)
