"""What a run writes while it trains: a progress bar or lines, metrics.jsonl, TensorBoard, loss.png."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.progress import progress
from llava_jax.util import LineFile, json_lines, write_text

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class RunLog:
    """Writes one JSON line per step. On a resumed run, lines after step `start` are cut off first.

    Fields: step, loss, grad_norm, lr, tokens and samples (of the step), ok. Only `seconds` of the step
    and `save_seconds` of a save before it, if there was one, differ between two equal runs. The first
    step of a process compiles: it counts in no rate.
    """

    def __init__(self, workdir: Path, *, start: int, total: int, name: str, quiet: bool = False):
        from tensorboardX import SummaryWriter
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.workdir, self.name, self.total = workdir, name, total
        self.path = workdir / METRICS
        _truncate(self.path, start)
        self._file = LineFile(self.path)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self._bar = progress(total, name, "step", quiet=quiet, initial=start)
        self._redirect = contextlib.ExitStack()
        self._redirect.enter_context(logging_redirect_tqdm())  # warnings stand above the bar
        self._rate: dict[str, float] = {}
        self._steps, self._saved = 0, 0.0
        self._last = time.perf_counter()

    def step(self, row: dict[str, Any], ended: float | None = None) -> None:
        """Records one finished step. ended: when, by time.perf_counter; None: now."""
        now = time.perf_counter() if ended is None else ended
        seconds = max(now - self._last - self._saved, 1e-9)
        times = {"seconds": round(seconds, 4)}
        if self._saved:
            times["save_seconds"] = round(self._saved, 4)
        self._last, self._saved = now, 0.0
        self._file.add(json.dumps({**row, **times}))
        for key in ("loss", "grad_norm", "lr"):
            self._board.add_scalar(key, row[key], row["step"])
        self._steps += 1
        if self._steps > 1:  # the first one compiles
            step = {"seconds": seconds, "tokens": row["tokens"], "samples": row["samples"]}
            old = self._rate or step
            self._rate = {key: 0.9 * old[key] + 0.1 * step[key] for key in step}
            self._board.add_scalar("tokens_per_second", row["tokens"] / seconds, row["step"])
        if "save_seconds" in times:
            self._board.add_scalar("save_seconds", times["save_seconds"], row["step"])
        self._bar.set_postfix_str(status(row, self.total, self._rate), refresh=False)
        self._bar.update()
        if self._steps == 1:  # compiling took long: say that the run goes
            self._bar.refresh()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Within the context, time is that of a save and not of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._saved += time.perf_counter() - start

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        self._bar.write(text)

    def sync(self) -> None:
        """Makes what was logged so far durable, before a checkpoint of the same step is."""
        self._file.sync()

    def close(self) -> None:
        """Closes the files and draws the curve."""
        self._redirect.close()
        self._bar.close()
        self._board.close()
        try:
            self._file.close()
            plot_losses({self.name: self.path}, self.workdir / "loss.png")
        except OSError as error:  # what the run ends with is worse, or it ends well
            log.error("%s is not whole: %s", self.path, error.strerror)


class NoLog:
    """Stands in for RunLog in a process that writes none: every method does nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: contextlib.nullcontext()


def status(row: dict[str, Any], total: int, rate: dict[str, float]) -> str:
    """What a bar or line says of a step. rate: smoothed seconds, samples and tokens of a step; empty
    while only the first step is known."""
    text = f"loss {row['loss']:.4f}, lr {row['lr']:.3g}"
    if not rate:
        return text
    seconds = rate["seconds"]
    samples, tokens = rate["samples"] / seconds, rate["tokens"] / seconds
    left = datetime.timedelta(seconds=round(seconds * (total - row["step"])))
    return f"{text}, {samples:.1f} samples/s, {tokens:,.0f} tokens/s, {left} left"


# Afterwards ----------------------------------------------------------------------------------------


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
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


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
        axes.plot(steps, smooth(losses), lw=1.8, color=f"C{i}", label=name)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(target, dpi=120)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean around each value, over about a twentieth of them all, as many before as after it.

    Of 40 values it takes 3 at a time, of 5,000 it takes 251; near the ends fewer, so that the curve
    begins and ends where the values do and a straight line stays one.
    """
    total = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    reach = np.minimum(round(len(values) / 40), np.minimum(i, i[::-1]))
    return ((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)).tolist()
