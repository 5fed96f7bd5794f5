"""What a run leaves behind while it goes: a progress bar or lines, metrics.jsonl, TensorBoard, loss.png."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.progress import LINE_SECONDS, progress
from llava_jax.util import json_lines, write_text

METRICS = "metrics.jsonl"


class RunLog:
    """Writes one JSON line per step. On a resumed run, lines beyond step `start` are cut off first.

    Fields: step, loss, grad_norm, lr, tokens and samples (of the step), ok. `seconds` of the step and
    `save_seconds` of a save before it, if there was one, are the only ones that differ between two
    equal runs. The first step of a process compiles: it counts in no rate.
    """

    def __init__(self, workdir: Path, *, start: int, total: int, name: str, quiet: bool = False):
        from tensorboardX import SummaryWriter

        self.workdir, self.name = workdir, name
        self.path = workdir / METRICS
        _truncate(self.path, start)
        self._file = self.path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self._shown = _shown(start, total, name, quiet)
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
        self._file.write(json.dumps({**row, **times}) + "\n")
        self._file.flush()
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
        self._shown.step(row, self._rate)

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
        self._shown.note(text)

    def sync(self) -> None:
        """Makes what was logged so far durable, before a checkpoint of the same step is."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files and draws the curve."""
        self._shown.close()
        self._file.close()
        self._board.close()
        plot_losses({self.name: self.path}, self.workdir / "loss.png")


class NoLog:
    """The log of a process that writes none: another one of the same run does."""

    def step(self, row: dict[str, Any], ended: float | None = None) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""

    def saving(self) -> contextlib.AbstractContextManager[None]:
        """A context that does nothing."""
        return contextlib.nullcontext()


# On the terminal, or in a file ---------------------------------------------------------------------


def _shown(start: int, total: int, name: str, quiet: bool) -> _Bar | _Lines:
    if quiet or sys.stderr.isatty():
        return _Bar(start, total, name, quiet)
    return _Lines(start, total, name)


class _Bar:
    """A progress bar; nothing but notes where `quiet`."""

    def __init__(self, start: int, total: int, name: str, quiet: bool):
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._bar = progress(total, name, "step", quiet=quiet, initial=start)
        self._redirect = contextlib.ExitStack()  # warnings stand above the bar, not within it
        self._redirect.enter_context(logging_redirect_tqdm())

    def step(self, row: dict[str, Any], rate: dict[str, float]) -> None:
        speed = ""
        if rate:
            samples, tokens = (rate[key] / rate["seconds"] for key in ("samples", "tokens"))
            speed = f", {samples:.1f} samples/s, {tokens:.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {row['loss']:.4f}{speed}", refresh=False)
        self._bar.update()

    def note(self, text: str) -> None:
        self._bar.write(text)

    def close(self) -> None:
        self._redirect.close()
        self._bar.close()


class _Lines:
    """Plain lines for a log file: the first and last step, each tenth of the run, and LINE_SECONDS."""

    def __init__(self, start: int, total: int, name: str):
        self._start, self._total, self._name = start, total, name
        self._last = time.monotonic()

    def step(self, row: dict[str, Any], rate: dict[str, float]) -> None:
        number, now = row["step"], time.monotonic()
        tenth = number * 10 // self._total > (number - 1) * 10 // self._total
        if number == self._start + 1 or tenth or now - self._last >= LINE_SECONDS:
            self._last = now
            self.note(progress_line(self._name, row, self._total, rate))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def progress_line(name: str, row: dict[str, Any], total: int, rate: dict[str, float]) -> str:
    """One step as a line. rate: seconds and tokens of a step; empty while only the first is known."""
    text = f"{name}: step {row['step']:,} of {total:,}, loss {row['loss']:.4f}, lr {row['lr']:.3g}"
    if not rate:
        return text
    seconds = rate["seconds"]
    left = _left(seconds * (total - row["step"]))
    return f"{text}, {rate['tokens'] / seconds:,.0f} tokens/s, {left} left"


def _left(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


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
    total = [0.0]
    for value in values:
        total.append(total[-1] + value)
    count, half = len(values), round(len(values) / 40)
    out = []
    for i in range(count):
        reach = min(half, i, count - 1 - i)
        out.append((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1))
    return out
