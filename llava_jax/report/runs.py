"""Reads work directories for the report; whatever is missing, torn or still being written is left out."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, TypeGuard

from llava_jax.errors import LlavaError
from llava_jax.report.files import EVAL, FACTS, METRICS, SAMPLES, SYSTEM, read_rows
from llava_jax.settings import flat
from llava_jax.util import read_object

SHOWN = 50
"""Bad samples and skipped steps that are listed."""


@dataclasses.dataclass
class Run:
    """What a work directory holds. Lists are of rows, see docs/training.md; the rest is {} where absent.

    problems: files that could not be read, in words.
    """

    name: str
    folder: Path
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    system: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    settings: dict[str, Any]
    facts: dict[str, Any]
    data: dict[str, Any]
    done: dict[str, Any]
    problems: list[str]

    skips: list[dict[str, Any]]

    @property
    def skipped(self) -> list[dict[str, Any]]:
        """Steps that changed nothing, with the ids of their samples where those are known."""
        ids: dict[Any, list[Any]] = {}
        for row in self.skips:
            if number(step := row.get("step")) and isinstance(row.get("ids"), list):
                ids.setdefault(step, []).extend(row["ids"])
        found = [row for row in self.metrics if row.get("ok") is False]
        return [{**row, "ids": ids.get(row["step"], [])} for row in found]

    @property
    def sets(self) -> list[str]:
        """The names of its validation sets, in order."""
        return list(dict.fromkeys(name for row in self.evals for name in sets_of(row)))


def find_runs(paths: list[Path]) -> list[Run]:
    """The runs of work directories; one with stages is as many runs as stages.

    Raises LlavaError for a path that is no work directory.
    """
    folders = []
    for path in paths:
        if not path.is_dir():
            raise LlavaError(f"{path}: no such folder", fix="name the work directory of a run")
        stages = sorted(path.glob(f"*/{METRICS}"), key=lambda file: file.stat().st_mtime)
        found = [path] if (path / METRICS).exists() else [file.parent for file in stages]
        if not found and (path / "config.json").exists():
            found = [path]  # not a step yet
        if not found:
            raise LlavaError(f"{path}: no run was started here", fix="it has no metrics.jsonl")
        folders += found
    return [read_run(folder, name) for folder, name in zip(folders, _names(folders))]


def _names(folders: list[Path]) -> list[str]:
    """The shortest ends of paths that tell folders apart."""
    for count in itertools.count(1):
        names = ["/".join(folder.absolute().parts[-count:]) for folder in folders]
        if len(set(names)) == len(set(folders)) or count > 8:
            return names
    raise AssertionError


def read_run(folder: Path, name: str) -> Run:
    """What is in one work directory."""
    problems: list[str] = []

    def rows(file: str) -> list[dict[str, Any]]:
        try:
            return read_rows(folder / file)
        except OSError as error:
            problems.append(f"{file}: {error.strerror}")
            return []

    def record(file: str) -> dict[str, Any]:
        if not (folder / file).exists():
            return {}
        try:
            return read_object(folder / file)
        except (LlavaError, OSError) as error:
            problems.append(f"{file} is damaged: {error}")
            return {}

    metrics = [row for row in rows(METRICS) if number(row.get("step"))]
    samples = {
        str([r.get(key) for key in ("step", "set", "id", "question")]): r for r in rows(SAMPLES)
    }
    bad = {json.dumps(r, sort_keys=True): r for file in sorted(folder.glob("bad.jsonl*"))
           for r in rows(file.name)}  # fmt: skip
    return Run(
        name,
        folder,
        metrics,
        [row for row in rows(EVAL) if number(row.get("step"))],
        list(samples.values()),
        [_timed(row) for row in rows(SYSTEM) if number(row.get("step"))],
        list(bad.values()),
        dict(flat(record("config.json"))),
        record(FACTS),
        record("data_report.json"),
        record("done.json"),
        problems,
        [row for file in sorted(folder.glob("skipped.jsonl*")) for row in rows(file.name)],
    )


# Curves --------------------------------------------------------------------------------------------


def curves(run: Run) -> dict[str, dict[str, list[Any]]]:
    """{name: {"x": steps, "h": hours of steps until then, "y": values}} of everything that was logged."""
    hours: dict[int, float] = {}
    total = 0.0
    for row in run.metrics:
        total += (row["seconds"] if number(row.get("seconds")) else 0) / 3600
        hours[row["step"]] = total
    found: dict[str, list[tuple[int, float]]] = {}

    def add(name: str, step: int, value: Any) -> None:
        if number(value):
            found.setdefault(name, []).append((step, value))

    for row in run.metrics:
        for key in ("loss", "grad_norm", "lr"):
            add(key, row["step"], row.get(key))
        add("padding", row["step"], 1 - row["real"] if number(row.get("real")) else None)
        for group in ("losses", "lrs", "grad_norms", "update_norms"):
            for part, value in _part(row, group).items():
                add(f"{group}/{part}", row["step"], value)
    for row in run.evals:
        for name, numbers in sets_of(row).items():
            for key, value in numbers.items():
                if key not in ("samples", "tokens", "asked"):
                    add(f"eval/{name}/{key}", row["step"], value)
    for row in run.system:
        for key, value in row.items():
            if key not in ("step", "time", "started"):
                scale = 1e-9 if "memory" in key else 1
                add(f"system/{key}", row["step"], value * scale if number(value) else None)
    steps = sorted(hours)
    return {name: _thinned(points, hours, steps) for name, points in found.items()}


POINTS = 2000
"""Of a curve, about; of longer ones the smallest and largest value of each piece are kept."""


def _thinned(points: list[tuple[int, float]], hours: dict[int, float], steps: list[int]) -> Any:
    if len(points) > POINTS:
        size = -(-2 * len(points) // POINTS)
        pieces = (points[i : i + size] for i in range(0, len(points), size))
        points = [p for piece in pieces for p in sorted({min(piece, key=_y), max(piece, key=_y)})]
    x = [step for step, _ in points]
    return {
        "x": x,
        "h": [round(hours[s], 5) if s in hours else None for s in x],
        "y": [float(f"{y:.6g}") for _, y in points],
    }


def _y(point: tuple[int, float]) -> float:
    return point[1]


def _part(row: dict[str, Any], key: str) -> dict[str, Any]:
    value = row.get(key)
    return value if isinstance(value, dict) else {}


def sets_of(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{validation set: its numbers} of a row of eval.jsonl."""
    return {name: v for name, v in _part(row, "sets").items() if isinstance(v, dict)}


def _timed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of system.jsonl, without rates over no time, which earlier versions wrote."""
    seconds = row.get("seconds")
    if not number(seconds) or seconds >= 0.001:
        return row
    return {k: v for k, v in row.items() if k not in ("data", "mfu") and "_per_" not in k}


def number(value: Any) -> TypeGuard[float]:
    """Whether a value of a row is a finite number, of a size that can be drawn."""
    return type(value) in (int, float) and abs(value) < 1e30
