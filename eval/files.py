"""Reading rows from jsonl, json, csv, tsv, txt and xlsx, and finding a benchmark's files.

Every row comes with the line it stands on, so that an error can say where to look.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.util import need

Row = tuple[int, dict[str, Any]]


def read_rows(
    path: Path, *, error: type[LlavaError] = DataError, bad_lines: list[int] | None = None
) -> list[Row]:
    """All rows of a file as (line number from 1, dict).

    A .json file may be a list of objects, an object id -> text, or (as POPE's label files are)
    jsonl under another name. An object id -> x becomes rows {"id": id, "text" or fields of x}.

    Args:
      error: the class raised for a file that cannot be read.
      bad_lines: if given, jsonl lines that are not JSON objects are noted here instead of raising.
    """
    if not path.is_file():
        raise error(f"{path}: no such file")
    try:
        match path.suffix.lower():
            case ".xlsx":
                return list(_xlsx_rows(path, error))
            case ".tsv" | ".csv":
                return list(_table_rows(path, error))
            case ".json":
                return _json_rows(path, error, bad_lines)
            case _:
                return list(_jsonl_rows(path, error, bad_lines))
    except UnicodeDecodeError as e:
        raise error(f"{path}: not UTF-8 text (byte {e.start})") from None


def read_json(path: Path, error: type[LlavaError] = DataError) -> Any:
    """The value in a JSON file; raises with line and column where it is broken."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return json.load(f)
    except FileNotFoundError:
        raise error(f"{path}: no such file") from None
    except json.JSONDecodeError as e:
        raise error(f"{path} line {e.lineno} column {e.colno}: not JSON ({e.msg})") from None
    except UnicodeDecodeError as e:
        raise error(f"{path}: not UTF-8 text (byte {e.start})") from None


def _jsonl_rows(path: Path, error: type[LlavaError], bad_lines: list[int] | None) -> Iterator[Row]:
    # Not str.splitlines: answers contain U+2028 and form feeds.
    with open(path, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            row: Any = None
            try:
                row = json.loads(line)
                problem = None if isinstance(row, dict) else "not a JSON object"
            except json.JSONDecodeError as e:
                problem = f"not JSON ({e.msg} at column {e.colno})"
            if problem is None:
                yield number, row
            elif bad_lines is not None:
                bad_lines.append(number)
            else:
                raise error(f"{path} line {number}: {problem}: {line.strip()[:60]!r}")


def _json_rows(path: Path, error: type[LlavaError], bad_lines: list[int] | None) -> list[Row]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as e:
        if e.msg == "Extra data" and e.colno == 1:  # a second value: this is jsonl
            return list(_jsonl_rows(path, error, bad_lines))
        raise error(f"{path} line {e.lineno} column {e.colno}: not JSON ({e.msg})") from None
    if isinstance(value, dict):
        if "question_id" in value:  # a jsonl file of one line
            return [(1, value)]
        value = [{"id": k, **(v if isinstance(v, dict) else {"text": v})} for k, v in value.items()]
    if not isinstance(value, list):
        raise error(f"{path}: expected a list or an object, found {type(value).__name__}")
    for i, row in enumerate(value, 1):
        if not isinstance(row, dict):
            raise error(f"{path} entry {i}: expected an object, found {type(row).__name__}")
    return list(enumerate(value, 1))


def _table_rows(path: Path, error: type[LlavaError]) -> Iterator[Row]:
    csv.field_size_limit(1 << 30)  # MMBench keeps whole images in a cell
    with open(path, encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        for row in reader:
            if None in row or None in row.values():
                raise error(
                    f"{path} line {reader.line_num}: not as many cells as the header has columns"
                )
            # As pandas: an empty cell is not a value. "None" stays text here, see mmbench.
            yield reader.line_num, {k: (v if v != "" else None) for k, v in row.items()}


def _xlsx_rows(path: Path, error: type[LlavaError]) -> Iterator[Row]:
    openpyxl = need("openpyxl", "to read .xlsx files", "llava_jax[eval]")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as e:  # openpyxl raises KeyError, BadZipFile, InvalidFileException …
        raise error(f"{path}: not an Excel file ({type(e).__name__})") from None
    rows = book.active.iter_rows(values_only=True)
    header = [str(h) for h in next(rows, [])]
    for number, cells in enumerate(rows, 2):
        if any(c is not None for c in cells):
            yield number, dict(zip(header, cells))


def write_xlsx(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    """Writes one sheet. Control characters that Excel cannot hold are dropped."""
    openpyxl = need("openpyxl", "to write .xlsx files", "llava_jax[eval]")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as the submission servers take it (ASCII JSON, like json.dump)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def find(data: Path, patterns: Sequence[str], what: str, split: str | None = None) -> Path:
    """The one file under `data` that matches the first pattern that matches anything.

    Args:
      data: a folder, or the file itself.
      patterns: globs, most specific first; searched in `data`, then one folder below.
      what: what the file is, for the error.
      split: keeps only names that contain this ("val2014", "test-dev2015").
    Raises:
      DataError: none or several files match.
    """
    found = find_optional(data, patterns, what, split)
    if found is None:
        where = f"{data}" + (f" for split {split!r}" if split else "")
        if not data.exists():
            raise DataError(f"{data}: no such file or folder")
        raise DataError(f"{where}: no {what}; looked for {', '.join(patterns)}")
    return found


def find_optional(
    data: Path, patterns: Sequence[str], what: str, split: str | None = None
) -> Path | None:
    """As `find`, but None where nothing matches; several matches are still an error."""
    if data.is_file():
        return data if any(data.match(p) for p in patterns) else None
    for pattern in (*patterns, *(f"*/{p}" for p in patterns)):
        files = sorted(f for f in data.glob(pattern) if not split or split in f.name)
        if len(files) > 1:
            names = ", ".join(str(f.relative_to(data)) for f in files[:6])
            raise DataError(
                f"{data}: several files could be the {what}: {names}", fix="use --split"
            )
        if files:
            return files[0]
    return None


ID = (str, int)  # an id in a JSON file
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object", ID: "an id"}


def expect(
    row: Any,
    where: str,
    fields: Mapping[str, Any],
    error: type[LlavaError] = DataError,
) -> dict[str, Any]:
    """`row` if it is an object whose fields are of these types; else raises, naming the field.

    Args:
      where: the file and the line or id, for the error.
      fields: name -> str, int, list, dict or ID.
    """
    if not isinstance(row, dict):
        raise error(f"{where}: {_shown(row)}, not an object")
    for name, kind in fields.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "missing" if name not in row else _shown(value)
            raise error(f"{where}: {name} is {found}, not {_KINDS[kind]}")
    return row


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def text_of(value: Any, where: str, error: type[LlavaError] = AnswerError) -> str:
    """`value` as the text of an answer; numbers become their digits, other types raise."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise error(f"{where}: the answer is {value!r}, not text")
