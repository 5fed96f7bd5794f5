"""LLaVA's training files: JSON (or JSON lines) of conversations, beside a folder of images.

Format (docs/Finetune_Custom_Data.md of the original): a list of
{"id", "image"?: path below the image folder, "conversations": [{"from": "human"|"gpt", "value"}]}.
Here "image" may also be a list of paths, one for each "<image>" of the text.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from llava_jax.errors import SampleError
from llava_jax.text.records import read_images, read_turns

log = logging.getLogger(__name__)


def read_records(path: str | Path) -> list[Any]:
    """The records of one file, unchecked. Raises SampleError if the file is not JSON."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SampleError(f"{path}: no such data file", fix="set data.path") from None
    except (OSError, UnicodeDecodeError):
        raise SampleError(f"{path}: cannot be read as UTF-8 text") from None
    if path.suffix in (".jsonl", ".ndjson"):
        return [
            _parse(line, f"{path}: line {i}")
            for i, line in enumerate(text.splitlines(), 1)
            if line.strip()
        ]
    records = _parse(text, str(path))
    if not isinstance(records, list):
        raise SampleError(f"{path}: the file holds no list of samples")
    return records


def read_all(paths: str | Sequence[str]) -> tuple[list[Any], list[str]]:
    """(records of all files end to end, where each stands: "file[index]")."""
    records: list[Any] = []
    places: list[str] = []
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        found = read_records(path)
        records += found
        places += [f"{Path(path).name}[{i}]" for i in range(len(found))]
    if not records:
        raise SampleError(f"{paths}: there are no samples", fix="set data.path")
    return records, places


def record_id(record: Any, index: int) -> str:
    """The sample's own id, or its index where it has none."""
    own = record.get("id") if isinstance(record, Mapping) else None
    return str(index if own is None or own == "" else own)


def image_paths(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The relative paths of a checked record's images, in order."""
    image = record.get("image")
    if not image:
        return ()
    return (image,) if isinstance(image, str) else tuple(image)


def check_record(record: Any, place: str) -> None:
    """Raises SampleError, naming the place and the id, if a record cannot be a conversation."""
    own = record.get("id") if isinstance(record, Mapping) else None
    where = place if own is None else f"{place} (id {own!r})"
    read_turns(record, where)
    for path in read_images({**record, "image": record.get("image") or None}, where):
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise SampleError(
                f"sample {where}: image path {path!r} leaves the image folder",
                fix="make it relative to data.image_folder",
            )


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise SampleError(f"{where}: not JSON at line {e.lineno}, column {e.colno}") from None
    except RecursionError:
        raise SampleError(f"{where}: JSON nested too deeply") from None


class BadSamples:
    """Counts the samples that cannot be used, once each, and stops the run where there are too many.

    strict: raise at the first. limit: the largest number to put up with.
    report: a JSON lines file that lists them; what it already lists is not listed again.
    """

    def __init__(self, *, strict: bool, limit: int, report: str | Path | None = None):
        self._strict, self._limit = strict, limit
        self._report = Path(report) if report else None
        self._found: dict[int, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if self._report and self._report.exists():
            for line in self._report.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._found[row["index"]] = row

    def add(self, index: int, sample_id: str, reason: str) -> None:
        """Notes sample `index`. Raises SampleError if strict or if there are now too many."""
        with self._lock:
            known = index in self._found
            if not known:
                row = {"index": index, "id": sample_id, "reason": reason}
                self._found[index] = row
                log.warning("sample %s is left out: %s", sample_id, reason)
                if self._report:
                    with self._report.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count = len(self._found)
        if self._strict:
            raise SampleError(
                f"sample {sample_id}: {reason}", fix='data.bad_samples="skip" goes on without it'
            )
        if count > self._limit:
            raise SampleError(
                f"{count} samples are bad, more than data.bad_limit allows; the last, "
                f"{sample_id}: {reason}",
                fix="mend the data or raise data.bad_limit",
            )

    def restore(self, row: dict[str, Any]) -> None:
        """Takes over a row of an earlier `rows`, without logging or judging it again."""
        with self._lock:
            self._found.setdefault(row["index"], dict(row))

    def rows(self) -> list[dict[str, Any]]:
        """[{"index", "id", "reason"}], by index."""
        with self._lock:
            return [self._found[i] for i in sorted(self._found)]
