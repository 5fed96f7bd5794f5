"""A benchmark's own files: how they are found, and their rows with the line each stands on.

JSON itself is read by llava_jax.util; here are the rows of jsonl, json, csv, tsv and xlsx files.
"""

import contextlib
import csv
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError
from llava_jax.eval.errors import AnswerError, DataError, NoTruthError
from llava_jax.reader import shown
from llava_jax.util import (
    Doubled,
    json_decoder,
    json_lines,
    need,
    parse_values,
    read_json,
    read_text,
    take_lock,
)

logger = logging.getLogger(__name__)
TABLES = (".csv", ".tsv", ".xlsx")
Row = tuple[int, dict[str, Any]]  # line number from 1 (of a JSON list: entry), row


def read_rows(
    path: Path,
    *,
    inside: str = "",
    error: type[LlavaError] = DataError,
    bad_lines: list[int] | None = None,
) -> list[Row]:
    """All rows of a file, each with its number.

    A .json file may be a list of objects, an object id -> text, or (as POPE's label files are)
    jsonl under another name. An object id -> x becomes rows {"id": id, "text" or fields of x}.

    Args:
      inside: key under which a .json file's object may hold all this ("outputs").
      error: the class raised for a file that cannot be read.
      bad_lines: if given, receives the numbers of jsonl lines that are not JSON objects, which
        raise otherwise.
    """
    if not path.exists() or path.is_dir():  # a pipe is read as a file
        raise error(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    kind = path.suffix.lower()
    if kind == ".gz":
        raise error(f"{path}: is compressed", fix=f"gunzip {path.name}")
    if kind in _KINDS:
        return list(_KINDS[kind](path, error))
    lines = json_lines(text := read_text(path, error))
    jsonl = kind != ".json"
    if len(lines) > 1 and not jsonl:
        with contextlib.suppress(ValueError, RecursionError):
            jsonl = isinstance(json.loads(lines[0][1]), dict)
    if jsonl:
        return list(_jsonl_rows(path, lines, error, bad_lines))
    return list(_json_rows(path, text, inside, error))


def _jsonl_rows(
    path: Path, lines: list[tuple[int, str]], error: type[LlavaError], bad_lines: list[int] | None
) -> Iterator[Row]:
    decoder = json_decoder(doubled=True)
    for number, line in lines:
        row: Any = None
        try:
            row = decoder.decode(line)
            problem = None if isinstance(row, dict) else "not a JSON object"
            problem = f"the key {row.key!r} twice" if isinstance(row, Doubled) else problem
        except json.JSONDecodeError as e:
            problem = f"not JSON ({e.msg} at column {e.colno})"
        except (ValueError, RecursionError) as e:  # a number of too many digits, too deep a list
            problem = f"not JSON ({e})"
        if problem is None:
            yield number, row
        elif bad_lines is not None:
            bad_lines.append(number)
        else:
            raise error(f"{path} line {number}: {problem}: {line.strip()[:60]!r}")


def _json_rows(path: Path, text: str, inside: str, error: type[LlavaError]) -> Iterator[Row]:
    values = parse_values(text, path, error, doubled=True)
    if len(values) != 1:
        raise error(f"{path}: the file holds {len(values)} JSON values, not one")
    (value,) = values
    if isinstance(value, dict) and isinstance(value.get(inside), dict | list):
        value = value[inside]
    if isinstance(value, dict):
        for one in (value, *value.values()):
            if isinstance(one, Doubled):
                raise error(f"{path}: the key {one.key!r} stands twice")
        rows = [{"id": k, **(v if isinstance(v, dict) else {"text": v})} for k, v in value.items()]
        value = [value] if "question_id" in value else rows  # a jsonl file of one line
    if not isinstance(value, list):
        raise error(f"{path}: expected a list or an object, found {type(value).__name__}")
    for i, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise error(f"{path} entry {i}: expected an object, found {type(row).__name__}")
        if isinstance(row, Doubled):
            raise error(f"{path} entry {i}: the key {row.key!r} stands twice")
        yield i, row


def _table_rows(path: Path, error: type[LlavaError]) -> Iterator[Row]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    csv.field_size_limit(1 << 30)  # MMBench keeps whole images in a cell
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter=delimiter)
        try:
            _refuse_twice(reader.fieldnames or (), f"{path}: the column {{!r}} stands twice", error)
            for row in reader:
                if None in row or None in row.values():
                    where = f"{path} line {reader.line_num}"
                    raise error(f"{where}: not as many cells as the header has columns")
                # As pandas: an empty cell is not a value. "None" stays text here, see mmbench.
                yield reader.line_num, {k: (v if v != "" else None) for k, v in row.items()}
        except (UnicodeDecodeError, csv.Error) as e:
            raise error(f"{path}: not a table of UTF-8 text ({e})") from None


def _refuse_twice(names: Sequence[str], words: str, error: type[LlavaError] = DataError) -> None:
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise error(words.format(twice))


def _xlsx_rows(path: Path, error: type[LlavaError]) -> Iterator[Row]:
    openpyxl = need("openpyxl", "to read .xlsx files", "llava_jax[eval]")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as e:  # openpyxl raises KeyError, BadZipFile, InvalidFileException …
        raise error(f"{path}: not an Excel file ({type(e).__name__})") from None
    rows = book.active.iter_rows(values_only=True)
    header = [str(h) for h in next(rows, [])]
    shown = [h for h in header if h != "None"]
    _refuse_twice(shown, f"{path}: the column {{!r}} stands twice", error)
    for number, cells in enumerate(rows, 2):
        if any(c is not None for c in cells):
            yield number, dict(zip(header, cells))


def _parquet_rows(path: Path, error: type[LlavaError]) -> Iterator[Row]:
    """Rows of a parquet file; a picture, which datasets keeps as {bytes, path}, comes as its bytes."""
    parquet = need("pyarrow.parquet", "to read .parquet files", "llava_jax[eval]")
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(batch_size=64) for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield number, {k: _without_path(v) for k, v in row.items()}
    except (OSError, ValueError, LookupError) as e:  # pyarrow's errors are all of these
        raise error(f"{path}: is not a parquet file ({' '.join(str(e).split())[:80]})") from None


_KINDS = {
    ".parquet": _parquet_rows, ".xlsx": _xlsx_rows, ".tsv": _table_rows, ".csv": _table_rows
}  # fmt: skip


def _without_path(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"bytes", "path"}:
        return value["bytes"] or value["path"]
    return [_without_path(v) for v in value] if isinstance(value, list) else value


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Keeps other processes from asking the same questions into one file. Raises AnswerError where one
    does so now, which `wait` waits for. The lock file stays: removing it would let two processes lock
    two files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        if (taken := take_lock(file, wait=wait)) is False:
            what = f"{path.parent}: another process asks the same questions now"
            raise AnswerError(what, fix="wait for it, stop it, or name another --out")
        if taken is None:
            logger.warning("%s: cannot be locked: run nothing else into it", path.parent)
        yield


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML or JSON file; raises DataError where it is none, or holds no keys."""
    import yaml

    try:
        text = read_text(path, DataError)
        value, node = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        raise DataError(f"{path}: is not YAML or JSON ({' '.join(str(e).split())[:80]})") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds no keys, name: value")
    names = [key.value for key, _ in node.value if isinstance(key.value, str)]
    _refuse_twice(names, f"{path}: the key {{!r}} stands twice")
    return value


def need_xlsx() -> Any:
    """What writes .xlsx files; raises LlavaError where it is not installed."""
    return need("openpyxl", "to write .xlsx files", "llava_jax[eval]")


def write_xlsx(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    """Writes one sheet. Control characters that Excel cannot hold are dropped."""
    openpyxl = need_xlsx()
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = openpyxl.Workbook()
    sheet = book.active
    sheet.append(header)
    for row in rows:
        clean = [ILLEGAL_CHARACTERS_RE.sub("", c) if isinstance(c, str) else c for c in row]
        sheet.append(clean)
        for cell in sheet[sheet.max_row]:
            if cell.data_type == "f":  # an answer that begins with "=" is not a formula
                cell.data_type = "s"
    book.save(path)


def check_folder(option: str, folder: Path | None) -> None:
    """Raises LlavaError for a folder that an option names and that is not there."""
    if folder is not None and not folder.is_dir():
        raise LlavaError(f"{option} {folder}: there is no such folder")


def find(data: Path, patterns: Sequence[str], what: str, split: str | None = None) -> Path:
    """The one file under `data` that matches the first pattern that matches anything.

    Args:
      data: a folder, or the file itself.
      patterns: globs, most specific first; searched in `data`, then one folder below.
      what: what the file is, for the error.
      split: only names that contain this count ("val2014", "test-dev2015").
    Raises:
      DataError: several files match. NoTruthError: none does.
    """
    if (found := find_optional(data, patterns, what, split)) is not None:
        return found
    if not data.exists():
        raise DataError(f"{data}: no such file or folder")
    where = f" for split {split!r}" if split else ""
    raise NoTruthError(f"{data}{where}: no {what}; looked for {', '.join(patterns)}")


def find_optional(
    data: Path, patterns: Sequence[str], what: str, split: str | None = None
) -> Path | None:
    """As `find`, but None where nothing matches; several matches are still an error."""
    if data.is_file():
        return data if any(data.match(p) for p in patterns) else None
    files = find_all(data, (*patterns, *(f"*/{p}" for p in patterns)), split)
    if len(files) > 1:
        names = ", ".join(str(f.relative_to(data)) for f in files[:6])
        raise DataError(f"{data}: several files could be the {what}: {names}", fix="use --split")
    return files[0] if files else None


def find_all(data: Path, places: Sequence[str], split: str | None) -> list[Path]:
    """The files of a folder that fit the first of `places` (globs) that fits any, see `find`. Raises
    DataError where only a compressed one does."""
    for place in (*places, *(f"{p}.gz" for p in places)):
        files = sorted(f for f in data.glob(place) if (split or "") in f.name)
        if files and place.endswith(".gz"):
            raise DataError(f"{files[0]}: is compressed", fix=f"gunzip {files[0].name}")
        if files:
            return files
    return []


ID = (str, int)  # an id in a JSON file
_NAMES = {str: "text", int: "a whole number", list: "a list", dict: "an object", ID: "an id"}


def expect(row: Any, where: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`row` if it is an object whose fields are of these types; else raises DataError, naming the field.

    Args:
      where: the file and the line or id, for the error.
      fields: name -> str, int, list, dict or ID.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: {shown(row)}, not an object")
    for name, kind in (fields or {}).items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if name not in row else shown(value)
            raise DataError(f"{where}: {name} is {found}, not {_NAMES[kind]}")
    return row


def read_checked(path: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`read_rows` without the numbers; raises DataError naming the line whose `fields` (see expect)
    are missing or of another type."""
    return [expect(row, f"{path} line {line}", fields) for line, row in read_rows(path)]


def by_id(rows: Iterable[dict[str, Any]], key: str, path: Path) -> dict[str, dict[str, Any]]:
    """Rows by their ids; raises DataError where two have one: a truth would be lost in silence."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if found.setdefault(str(row[key]), row) is not row:
            raise DataError(f"{path}: {key} {row[key]!r} stands twice")
    return found


def read_list(path: Path, key: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """A JSON file's object, and the objects in its list `key`, checked as in `read_checked`."""
    value = read_json(path, DataError)
    rows = value.get(key) if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: no list {key!r} in it")
    for n, row in enumerate(rows, 1):
        expect(row, f"{path}: {key} entry {n}", fields)
    return value, rows
