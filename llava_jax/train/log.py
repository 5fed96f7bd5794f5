"""What a run writes while it trains: a progress bar or lines, JSON lines, trackers, loss.png."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llava_jax.progress import progress
from llava_jax.report.figure import plot_losses
from llava_jax.report.files import EVAL, METRICS, SAMPLES, SYSTEM, keep_until
from llava_jax.report.files import read_rows as read_metrics
from llava_jax.train.distributed import is_main, together
from llava_jax.train.meter import Compiled, Compiling, Meter, device_memory
from llava_jax.train.resume import shared_settings
from llava_jax.train.trackers import open_trackers
from llava_jax.util import LineFile

log = logging.getLogger(__name__)

__all__ = ["METRICS", "NoLog", "RunLog", "read_metrics", "status"]

EXPECT = 10
"""After so many steps of a process it is said how long all will take."""
_EACH_STEP = ("loss", "grad_norm", "lr")
"""What trackers are given after every step; the rest of a row now and then, with the rates."""
_GROUPED = {"losses": "loss", "lrs": "lr", "grad_norms": "grad_norm", "update_norms": "update_norm"}


class RunLog:
    """Writes one JSON line per step. On a resumed run, lines after step `start` are cut off first.

    Fields: step, loss, grad_norm, lr, tokens and samples (of the step), ok, and what else is in a row.
    Only the `..._seconds` and `seconds` of the step differ between two equal runs: how long it took, and
    a save or a validation before it. The first step of a process compiles: it counts in no rate.

    meter: makes the rows of system.jsonl. trackers: words of the setting of that name; settings: shown
    there.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start: int,
        total: int,
        name: str,
        quiet: bool = False,
        meter: Meter | None = None,
        trackers: Sequence[str] = (),
        settings: Mapping[str, Any] | None = None,
    ):
        from tqdm.contrib.logging import logging_redirect_tqdm

        self.workdir, self.name, self.total = workdir, name, total
        self.path = workdir / METRICS
        keep_until(workdir / METRICS, start)
        validated = {row["step"] for row in keep_until(workdir / EVAL, start)}
        keep_until(
            workdir / SAMPLES, start, validated
        )  # a validation that was cut off begins again
        self._files = {METRICS: LineFile(self.path)}
        self._trackers = open_trackers(trackers, workdir, name, start, settings or {})
        self._bar = progress(total, name, "step", quiet=quiet, initial=start)
        self._redirect = contextlib.ExitStack()
        self._redirect.enter_context(logging_redirect_tqdm())  # warnings stand above the bar
        self._meter, self._compiled = meter, Compiled()
        self._rate: dict[str, float] = {}
        self._steps, self._clean, self._said = 0, 0, False
        self._aside: defaultdict[str, float] = defaultdict(float)
        self._last, self._row = time.perf_counter(), {}

    def step(self, row: dict[str, Any], ended: float | None = None) -> None:
        """Records one finished step. ended: when, by time.perf_counter; None: now."""
        now = time.perf_counter() if ended is None else ended
        seconds = max(now - self._last - sum(self._aside.values()), 1e-9)
        aside = dict(self._aside)
        self._aside.clear()
        self._last, self._row = now, row
        times = {"seconds": seconds, **{f"{name}_seconds": value for name, value in aside.items()}}
        self._write(METRICS, row | {name: round(value, 4) for name, value in times.items()})
        self._trackers.scalars(row["step"], {key: row[key] for key in _EACH_STEP})
        self._steps += 1
        compiled, clean = self._compiled.step(seconds)
        # The first one compiles, or reads what was compiled before.
        clean = clean and self._steps > 1 and seconds > 1e-9
        if clean:
            self._smooth({"seconds": seconds, "tokens": row["tokens"], "samples": row["samples"]})
        if self._meter:
            self._meter.add(row, seconds, aside, compiled, clean)
            if self._meter.due:
                self._system()
        self._bar.set_postfix_str(status(row, self.total, self._rate), refresh=False)
        self._bar.update()
        if self._steps >= EXPECT and self._rate and not self._said:
            self._said = True
            self.note(self._expected(row["step"]))
        if self._steps == 1:  # compiling took long: say that the run goes
            self._bar.refresh()

    def _smooth(self, step: dict[str, float]) -> None:
        """Takes a step into the rates: the mean of the first ten, from then on the last ones count most."""
        self._clean += 1
        new = max(0.1, 1 / self._clean)
        self._rate = {
            k: (1 - new) * self._rate.get(k, 0) + new * value for k, value in step.items()
        }

    def _expected(self, step: int) -> str:
        """How long the run will take, and the memory it needs, now that some steps have run."""
        seconds = self._rate["seconds"]
        left = datetime.timedelta(seconds=round(seconds * (self.total - step)))
        peak = device_memory(jax.local_devices()).get("device_memory_peak")
        memory = f"; {peak / 1e9:.1f} GB at most on a device" if peak else ""
        return f"about {left} of steps are left, at {seconds:.3g} s a step{memory}"

    def validation(self, row: dict[str, Any]) -> None:
        """Records a validation: see llava_jax.train.validate."""
        self._write(EVAL, row)
        scores = {
            f"eval/{name}/{key}": value
            for name, found in row["sets"].items()
            for key, value in found.items()
            if isinstance(value, float)
        }
        self._trackers.scalars(row["step"], scores)

    def answer(self, row: dict[str, Any]) -> None:
        """Records what the model said to a question that is asked again and again."""
        self._write(SAMPLES, row)
        text = f"{row['question']}\n\n{row['answer']}\n\n(in the data: {row['truth']})"
        image = self.workdir / row["picture"] if row.get("picture") else None
        self._trackers.picture(row["step"], f"{row['set']}/{row['id']}", text, image)

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """Within the context, time is that of `what` ("save", "eval") and not of a step."""
        start, compiled = time.perf_counter(), Compiling.seconds
        try:
            yield
        finally:
            self._aside[what] += time.perf_counter() - start
            self._compiled.aside(Compiling.seconds - compiled)

    def note(self, text: str) -> None:
        """A line above the progress bar."""
        self._bar.write(text)

    def sync(self) -> None:
        """Makes what was logged so far durable, before a checkpoint of the same step is."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Closes the files and draws the curve."""
        self._redirect.close()
        self._bar.close()
        self._system()
        self._trackers.close()
        try:
            for file in self._files.values():
                file.close()
            plot_losses({self.name: self.path}, self.workdir / "loss.png")
        except OSError as error:  # what the run ends with is worse, or it ends well
            log.error("%s is not whole: %s", self.path, error.strerror)

    def _write(self, name: str, row: Mapping[str, Any]) -> None:
        if name not in self._files:
            try:
                self._files[name] = LineFile(self.workdir / name)
            except OSError as error:  # it stops no training
                log.error("%s cannot be written: %s", name, error.strerror)
                return
        self._files[name].add(json.dumps(row))

    def _system(self) -> None:
        """A row of system.jsonl, if there is anything to say."""
        row = self._meter.row(self._row["step"]) if self._meter and self._row else None
        if not row:
            return
        self._write(SYSTEM, row)
        shown = {f"system/{n}": v for n, v in row.items()
                 if v is not None and n not in ("step", "time", "started")}  # fmt: skip
        for key, title in _GROUPED.items():
            shown |= {f"{title}/{group}": v for group, v in self._row.get(key, {}).items()}
        self._trackers.scalars(row["step"], shown)


def open_log(
    config: Any, workdir: Path, start: int, total: int, devices: int, began: float, *, quiet: bool
) -> Any:
    """The log of a run that goes on after step `start` of `total`: a RunLog in the main process.

    devices: of all processes. began: when this process began with the run, by time.perf_counter.
    """
    if not is_main():
        return together(NoLog)
    meter, settings = Meter(devices, began), shared_settings(config)
    more: Any = {"quiet": quiet, "meter": meter, "trackers": config.trackers, "settings": settings}
    return together(lambda: RunLog(workdir, start=start, total=total, name=config.name, **more))


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
