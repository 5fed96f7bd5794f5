"""Steps that were skipped: counted, listed with their samples, and a reason to stop when many follow each other."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax

from llava_jax.errors import Diverged
from llava_jax.report.files import keep_until
from llava_jax.util import LineFile

SKIPPED = "skipped.jsonl"
LAST_GOOD = "last_good"
"""The folder of the model before the skipped steps that ended a run."""


class Skips:
    """Lists each skipped step with the ids of its samples in skipped.jsonl of `workdir`.

    Fields of a line: step, why ("not finite", "spike"), loss, grad_norm, ids. Each further process lists
    the ids of its own rows in skipped.jsonl.1 and so on. start: the step that the run goes on from; lines
    after it are cut off. limit: how many in a row stop the run. meta: as `meta` gave it for that step.
    """

    def __init__(self, workdir: Path, limit: int, start: int, meta: dict[str, Any]):
        process = jax.process_index()
        self._path = workdir / (f"{SKIPPED}.{process}" if process else SKIPPED)
        self._limit = limit
        self._file: LineFile | None = None
        self.total, self.row = meta.get("skipped", 0), meta.get("skipped_row", 0)
        keep_until(self._path, start)

    def meta(self) -> dict[str, int]:
        """What a checkpoint keeps: how many steps were skipped, and how many of them just now in a row."""
        return {"skipped": self.total, "skipped_row": self.row}

    def see(self, number: int, values: Any, info: dict[str, Any]) -> str | None:
        """Takes the metrics of a step; where it was skipped, a line that says so."""
        if values["ok"]:
            self.row = 0
            return None
        self.total, self.row = self.total + 1, self.row + 1
        loss, norm = float(values["loss"]), float(values["grad_norm"])
        why = "spike" if math.isfinite(loss) and math.isfinite(norm) else "not finite"
        found = {
            "step": number,
            "why": why,
            "loss": loss,
            "grad_norm": norm,
            "ids": info.get("ids", []),
        }
        self._file = self._file or LineFile(self._path)
        self._file.add(json.dumps(found))
        what = (
            "loss or gradient is not finite"
            if why == "not finite"
            else "a spike of loss or gradient"
        )
        return f"step {number}: {what}, update skipped; its samples are in {self._path}"

    def check(self) -> None:
        """Raises Diverged when too many steps in a row were skipped."""
        if self.row >= self._limit:
            model = self._path.with_name(LAST_GOOD)
            raise Diverged(
                f"{self.row} steps in a row were skipped; the last of them are in {self._path}",
                fix=f"look at their samples with llava-jax data show; begin another --workdir with "
                f"--config.model.init={model}, the model before them, and a lower --config.lr; "
                f"or go on here with --config.max_skipped above {self.row}",
            )
