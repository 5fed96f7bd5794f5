"""The files that a run writes while it trains: their names, and reading what a kill left of them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from llava_jax.util import json_lines, write_text

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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; a last line torn by a kill, and what follows it, is left out.

    Empty where there is no such file.
    """
    rows = []
    if path.exists():
        for _, line in json_lines(path.read_text(encoding="utf-8", errors="replace")):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(row, dict):
                rows.append(row)
    return rows


def keep_until(path: Path, step: int, known: Collection[int] | None = None) -> list[dict[str, Any]]:
    """Cuts off the lines of steps after `step`, which a resumed run writes again; returns the others.

    known: where it is given, only lines of these steps are kept.
    """
    rows = [row for row in read_rows(path) if row["step"] <= step]
    rows = [row for row in rows if known is None or row["step"] in known]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
