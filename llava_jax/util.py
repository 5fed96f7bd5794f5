"""Files and text that every room handles alike: JSON as people have it, atomic writes, printable text."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llava_jax import storage
from llava_jax.errors import LlavaError, SampleError, instead_of_file

_SPACE = (
    " \t\r\n"  # JSON's white space; str.isspace and splitlines take U+2028 and the like as well
)
_PACKED = {b"\x1f\x8b": "gzip", b"PK": "zip", b"PAR1": "parquet"}  # by their first bytes


def write_text(path: str | Path, text: str) -> None:
    """Writes `path` as UTF-8; a kill at any moment leaves what was there, or all of the new text.

    A link is written through. Half of a surrogate pair, which UTF-8 has no form for, is written as
    \\udXXX, which JSON reads back. Raises OSError that names `path`.
    """
    path, data = Path(path), text.encode("utf-8", "backslashreplace")
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)  # a pipe or a device, such as /dev/stdout
        return
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Within it, an OSError that names no file, as those of an open file do not, names `path`."""
    try:
        yield
    except OSError as error:
        error.filename = str(path) if error.filename is None else error.filename
        raise


class LineFile:
    """A text file that lines are added to. A full disk raises nothing and loses none of them.

    What cannot be written now is kept, and written with a later line, or by `sync`.
    """

    def __init__(self, path: str | Path):
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._left = b""

    def add(self, line: str) -> None:
        """Adds a line."""
        self._left += f"{line}\n".encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            self._write()

    def sync(self) -> None:
        """Makes all lines durable. Raises OSError where there is no room."""
        with naming(self._path):
            self._write()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file. Raises OSError where lines are left that cannot be written."""
        with self._file, naming(self._path):
            self._write()

    def _write(self) -> None:
        while self._left:
            self._left = self._left[self._file.write(self._left) :]


def sync_tree(root: Path) -> None:
    """fsync of every file and folder under `root`, and of itself."""
    for base, _, files in os.walk(root):
        for name in files:
            sync_path(Path(base) / name)
        sync_path(Path(base))


def sync_path(path: Path) -> None:
    """fsync of one file or folder; of a folder it makes the names in it durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def take_lock(file: Any, *, wait: bool = False) -> bool | None:
    """Takes the system's lock of an open file, which goes with the file or the process.

    True: it is ours. False: another process has it, which `wait` waits for. None: no such locks here.
    """
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return None
    return True


def write_json(path: str | Path, value: Any, **how: Any) -> None:
    """Writes `value` as JSON by `write_text`. how: arguments of json.dumps, such as indent."""
    write_text(path, json.dumps(value, **how))


def refuse_input(
    out: str | Path, inputs: Iterable[str | Path | None], error: type[LlavaError] = LlavaError
) -> None:
    """Raises `error` where writing `out` would replace one of `inputs`, through whatever links.

    Those are files and folders that exist, or None. In a folder no file is replaced that is there
    already; an output folder may not hold an input.
    """
    out, fix = expanded(out), "give another name for the output"
    at, file = _places(out), out.is_file()
    for given in (expanded(path) for path in inputs if path is not None):
        if not given.exists():
            continue
        theirs = _places(given)
        if at & theirs or (file and given.is_file() and out.samefile(given)):
            raise error(f"{out} is an input, and is not replaced", fix=fix)
        if file and any(t in place.parents for place in at for t in theirs):
            raise error(f"{out} belongs to the input {given}, and is not replaced", fix=fix)
        if any(place in t.parents for place in at for t in theirs):
            raise error(f"{out} holds the input {given}, and is not replaced", fix=fix)


def _places(path: Path) -> set[Path]:
    """Where a path is: with its own name, and where that leads if it is a link."""
    path = expanded(path)
    return {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name}


def expanded(path: str | Path) -> Path:
    """A path with the home folder for ~; "~nobody", where there is no such user, is a name like others."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def read_json(path: str | Path, error: type[LlavaError] = LlavaError) -> Any:
    """The one JSON value in a file. Raises `error` with file, line and column where it is not JSON."""
    values = parse_values(read_text(path, error), path, error)
    if len(values) != 1:
        found = "several values, not one" if values else "no JSON value"
        raise error(f"{path}: the file holds {found}")
    return values[0]


def read_object(path: str | Path, error: type[LlavaError] = LlavaError) -> dict[str, Any]:
    """`read_json` of a file that must hold an object. Raises `error` where it holds another value."""
    found = read_json(path, error)
    if not isinstance(found, dict):
        raise error(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def printable(text: str, *, keep: str = "\n\t") -> str:
    """Control characters written as escapes: text from a file must not steer the terminal.

    keep: control characters that stay as they are; pass "" for text that must fit on one line.
    """
    return "".join(c if c in keep or not _is_control(c) else ascii(c)[1:-1] for c in text)


def sentence(text: str) -> str:
    """A summary as a sentence; names in it keep their capitals, which str.capitalize takes away."""
    return f"{text[:1].upper()}{text[1:]}."


def _is_control(c: str) -> bool:
    category = unicodedata.category(c)
    return category.startswith("C") or category in ("Zl", "Zp")  # U+2028 and U+2029 end lines


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Package -> its version, of those that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def need(module: str, purpose: str, install: str) -> Any:
    """Imports a library of an extra, or raises LlavaError that says how to install it.

    Args:
      purpose: completes "X is needed", as in "to read .xlsx files".
      install: what pip installs, such as "llava_jax[eval]".
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        fix = f"pip install '{install}'"
        raise LlavaError(f"{module} is needed {purpose}", fix=fix) from None


class Doubled(dict):
    """An object of the file that has a key twice; `key` names it. The last value counts."""

    key: str


def read_text(path: str | Path, error: type[LlavaError] = SampleError) -> str:
    """The text of a UTF-8, UTF-16 or UTF-32 file or address, without its byte order mark.

    Raises `error`, naming the file, where it cannot be read or is not such text.
    """
    try:
        data = storage.read(path)
    except IsADirectoryError:
        raise error(f"{path}: this is a folder, not a file") from None
    except OSError as e:
        raise error(f"{path}: cannot be read ({e.strerror})") from None
    if found := instead_of_file(data):
        raise error(f"{path} {found[0]}", fix=found[1])
    encoding = json.detect_encoding(data[:64])
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as e:
        kind = next((name for start, name in _PACKED.items() if data.startswith(start)), None)
        what = f"is a {kind} file, not" if kind else f"byte {e.start} cannot be read as"
        fix = (
            '`llava-jax data build` reads parquet (source = "records")'
            if kind == "parquet"
            else "save it as UTF-8 JSON"
        )
        raise error(f"{path}: {what} UTF-8 or UTF-16 text", fix=fix) from None


def refuse_special(path: str | Path, error: type[LlavaError] = SampleError) -> None:
    """Raises `error` for a pipe, socket or device, whose reading may never end; for nothing else."""
    with contextlib.suppress(OSError, ValueError):
        if not (stat.S_ISREG(mode := os.stat(path).st_mode) or stat.S_ISDIR(mode)):
            raise error(f"{path}: this is a pipe or a device, not a file", fix="save it as a file")


def json_lines(text: str) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank, from 1. Only line feeds end a line.

    str.splitlines would cut a JSON string at U+2028, U+2029 or U+0085, which stand in it unescaped.
    """
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip(_SPACE)]


def parse_values(
    text: str, path: str | Path, error: type[LlavaError] = SampleError, *, doubled: bool = False
) -> list[Any]:
    """Every JSON value of a text: one list or object, or many after each other (JSON lines).

    doubled: an object with a key twice comes as Doubled.
    Raises `error` with the line and column where the text of `path` is not JSON.
    """
    decoder = json_decoder(doubled)
    values: list[Any] = []
    at = _after_space(text, 0)
    try:
        while at < len(text):
            value, end = decoder.raw_decode(text, at)
            values.append(value)
            at = _after_space(text, end)
    except json.JSONDecodeError as e:
        cut_off = not text[e.pos :].strip(_SPACE)
        fix = "the file ends too early: was it copied whole?" if cut_off else None
        line = f"line {e.lineno}: " if values else ""  # of JSON lines
        where = f"{path}: {line}not JSON at line {e.lineno}, column {e.colno}"
        raise error(where, fix=fix) from None
    except RecursionError:
        raise error(f"{path}: JSON nested too deeply") from None
    except ValueError as e:  # a number of more digits than Python converts
        line = text.count("\n", 0, at) + 1
        raise error(f"{path}: line {line}: a number cannot be read ({e})") from None
    return values


def may_go_on(text: str, end: int) -> bool:
    """Whether a JSON number that ends at `end` of a window may go on in the next one.

    "0.5" and "1e-3" can be cut behind the mark that follows their whole part.
    """
    return text[end : end + 3] in ("", ".", "e", "E", "e+", "e-", "E+", "E-")


def json_decoder(doubled: bool = False) -> json.JSONDecoder:
    """A decoder; with `doubled`, an object with a key twice comes as Doubled."""
    return json.JSONDecoder(object_pairs_hook=_object if doubled else None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    doubled = Doubled(found)
    seen: set[str] = set()
    doubled.key = next(k for k, _ in pairs if k in seen or seen.add(k))
    return doubled


def _after_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in _SPACE:
        at += 1
    return at
