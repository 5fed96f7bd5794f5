"""What a run leaves behind while it goes: a progress bar, metrics.jsonl, TensorBoard, loss.png."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from llava_jax.text.json_files import json_lines

METRICS = "metrics.jsonl"


class RunLog:
    """Writes one JSON line a step. On a resumed run, lines beyond step `start` are cut off first.

    Fields: step, loss, grad_norm, lr, tokens and samples (of the step), ok; `seconds` is the only
    one that differs between two equal runs.
    """

    def __init__(self, workdir: Path, *, start: int, total: int, name: str, quiet: bool = False):
        from tensorboardX import SummaryWriter
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.workdir, self.name = workdir, name
        self.path = workdir / METRICS
        _truncate(self.path, start)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self._bar = tqdm(
            total=total, initial=start, desc=name, unit="step", disable=quiet, dynamic_ncols=True
        )
        self._redirect = contextlib.ExitStack()  # warnings stand above the bar, not within it
        self._redirect.enter_context(logging_redirect_tqdm())
        self._rate: float | None = None
        self._steps = 0
        self._last = time.perf_counter()

    def step(self, row: dict[str, Any]) -> None:
        """Records one finished step."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._file.write(json.dumps({**row, "seconds": round(seconds, 4)}) + "\n")
        self._file.flush()
        for key in ("loss", "grad_norm", "lr"):
            self._board.add_scalar(key, row[key], row["step"])
        # An exponential mean that leaves the first step out: it compiles.
        if self._rate is None or self._steps < 2:
            self._rate = seconds
        self._rate, self._steps = 0.9 * self._rate + 0.1 * seconds, self._steps + 1
        self._board.add_scalar("tokens_per_second", row["tokens"] / max(seconds, 1e-9), row["step"])
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4f}, {row['samples'] / self._rate:.1f} samples/s, "
            f"{row['tokens'] / self._rate:.0f} tokens/s",
            refresh=False,
        )
        self._bar.update()

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        self._bar.write(text)

    def sync(self) -> None:
        """Makes what was logged so far durable, before a checkpoint of the same step is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files and draws the curve."""
        self._redirect.close()
        self._bar.close()
        self._file.close()
        self._board.close()
        plot_losses({self.name: self.path}, self.workdir / "loss.png")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line torn by a kill is left out."""
    rows = []
    if path.exists():
        for _, line in json_lines(path.read_text(encoding="utf-8")):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def _truncate(path: Path, start: int) -> None:
    rows = [row for row in read_metrics(path) if row["step"] <= start]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
    temporary.replace(path)


def plot_losses(curves: dict[str, Path], target: Path) -> None:
    """Draws the loss of each metrics.jsonl (raw and smoothed) into one PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (mean over supervised tokens)")
    for i, (name, path) in enumerate(curves.items()):
        rows = [r for r in read_metrics(path) if r["loss"] == r["loss"]]
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        axes.plot(steps, losses, alpha=0.3, lw=0.8, color=f"C{i}")
        axes.plot(steps, _smooth(losses), lw=1.8, color=f"C{i}", label=name)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(target, dpi=120)


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Exponential mean, corrected for its start."""
    out, mean, norm = [], 0.0, 0.0
    for v in values:
        mean, norm = weight * mean + (1 - weight) * v, weight * norm + (1 - weight)
        out.append(mean / norm)
    return out
