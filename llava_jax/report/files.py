"""The files that a run writes while it trains: their names, and reading what a kill left of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava_jax.util import write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
"""A line per step: what two equal runs have in common, and seconds."""
EVAL = "eval.jsonl"
"""A line per validation."""
SAMPLES = "samples.jsonl"
"""A line per question that was answered to be looked at; its pictures are in samples/."""
SYSTEM = "system.jsonl"
"""A line every few seconds: rates, memory, goodput."""
TRACKED = "trackers.json"
"""What W&B and MLflow call the run, so that a resumed one is one there too."""
FACTS = "run.json"
"""What a run ran on: versions, commit, devices, mesh, data."""


DAMAGED = "damaged"
"""Lines that are none of ours are set aside in a file whose name ends so."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines. A last line torn by a kill is left out; of others that are none,
    a warning says so. Empty where there is no such file."""
    rows, bad = [], []
    for number, line in _lines(path):
        row = _row(line)
        if row is not None:
            rows.append(row)
        elif line.endswith(b"\n"):
            bad.append(number)
    if bad:
        log.warning("%s: %s cannot be read and is left out", path, _numbers(bad))
    return rows


def keep_until(path: Path, step: int, known: Collection[int] | None = None) -> list[dict[str, Any]]:
    """Cuts off the lines of steps after `step`, which a resumed run writes again; returns the others.

    known: where it is given, only lines of these steps are kept. A line that is no object with a step is
    moved to `path`.damaged, with a warning; a last one torn by a kill is dropped.
    """
    rows, kept, bad = [], [], []
    for number, line in _lines(path):
        row = _row(line)
        if row is None and not line.endswith(b"\n"):
            continue
        if row is None or type(row.get("step")) is not int:
            bad.append((number, line))
        elif row["step"] <= step and (known is None or row["step"] in known):
            rows.append(row)
            kept.append(line.rstrip(b"\n") + b"\n")
    if bad:
        aside = path.with_name(f"{path.name}.{DAMAGED}")
        with aside.open("ab") as file:
            file.writelines(line.rstrip(b"\n") + b"\n" for _, line in bad)
        numbers = _numbers([number for number, _ in bad])
        log.warning("%s: %s is no row of a run; moved to %s", path, numbers, aside.name)
    if path.exists():
        write_text(path, b"".join(kept).decode("utf-8"))
    return rows


def _lines(path: Path) -> list[tuple[int, bytes]]:
    """(number, line with its end) of the lines that are not blank, from 1."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    ended = [*(line + b"\n" for line in lines[:-1]), lines[-1]]
    return [(number, line) for number, line in enumerate(ended, 1) if line.strip()]


def _row(line: bytes) -> dict[str, Any] | None:
    """The object in a line, or None."""
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _numbers(lines: list[int]) -> str:
    """ "line 3", "line 3 (and 2 more)"."""
    return f"line {lines[0]}" + (f" (and {len(lines) - 1} more)" if len(lines) > 1 else "")
