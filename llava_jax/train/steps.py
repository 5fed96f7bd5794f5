"""What stands around a step: batches in, metrics out one step later, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.data.account import join_counts
from llava_jax.data.loader import Loader, make_loader
from llava_jax.data.settings import DataSettings, padded_lengths
from llava_jax.errors import LlavaError, NotSaved, Stopped
from llava_jax.sharding import check_lengths, counted_row_parts, own_row_parts, row_parts
from llava_jax.train.checkpoint import Checkpointer, newest_meta, reason_of
from llava_jax.train.control import Flags
from llava_jax.train.distributed import gather, is_main, together
from llava_jax.train.meter import flops_of_steps
from llava_jax.train.model_io import Opened
from llava_jax.train.optim import warmup_cosine
from llava_jax.train.program import Program
from llava_jax.train.skips import Skips
from llava_jax.train.step import TrainState

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0
"""After a save that failed, how long until the next is tried; one that is due comes earlier."""


def open_loader(config: Any, model: Opened, mesh: Mesh, *, say: bool = True, **data: Any) -> Loader:
    """The loader of this process's rows of every global batch. data: data settings to change.
    say: see open_data.

    Raises as make_loader does, and ConfigError for lengths that the context axis does not divide.
    """
    settings = DataSettings.read({**config.data, "batch_size": config.batch_size} | data)
    check_lengths(padded_lengths(settings, model.config.max_length), mesh)
    return make_loader(
        settings,
        model.config,
        model.tokenizer,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        seed=config.seed,
        row_parts=row_parts(mesh, config.grad_accum),
        own_parts=own_row_parts(mesh, config.grad_accum),
        counted_parts=counted_row_parts(mesh, config.grad_accum),
        say=say,
        epochs=config.epochs,
        steps=config.steps,
    )


def kept_rows(config: Any, checkpoints: Path) -> dict[str, Any]:
    """{"pack_rows": those of the run's own plan}, where its settings leave them to the devices: on others,
    the number that is best for those would be another plan. {} where there is nothing to go on with."""
    if config.data.pack != "fill" or config.data.pack_rows:
        return {}
    found: Any = newest_meta(checkpoints)
    for key in ("data", "data", "pack_rows"):
        found = found.get(key) if isinstance(found, dict) else None
    return {"pack_rows": found} if isinstance(found, int) else {}


class Feed:
    """The loader's batches. With several processes, what one loader raises is stored as `error`, and
    its process continues with empty batches, so that it takes part in the step after which all stop.
    """

    def __init__(self, loader: Any):
        self.loader = loader
        self.error: LlavaError | None = None
        # Of the last steps: what was given for a step that did not count is taken back.
        self._counted: deque[tuple[int, dict[str, Any]]] = deque(maxlen=4)

    def next(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(batch, info) of the next step; raises what the loader does where this process is alone."""
        if jax.process_count() > 1:
            self._counted.append(self.loader.counted())
        if self.error is None:
            try:
                return next(self.loader)
            except LlavaError as error:
                if jax.process_count() == 1:
                    raise
                self.error = error
        return self.loader.blank(), {"samples": 0, "tokens": 0, "real": 0.0}

    def stop(self) -> None:
        """Raises, in every process, what the loader of one of them raised."""

        def fail() -> None:
            if self.error is not None:
                raise self.error

        together(fail)

    def state(self, step: int) -> dict[str, Any]:
        """The loader's state after `step` steps, with what all processes found."""
        counted = dict([*self._counted, self.loader.counted()]).get(step, {})
        states = gather({**self.loader.get_state(), **counted})
        if is_main():
            self.loader.take_bad([row for state in states[1:] for row in state["bad"]])
            states[0] = {**self.loader.get_state(), **counted}
        return {**states[0], "counts": join_counts([s["counts"] for s in states]), "step": step}

    def report(self) -> dict[str, Any]:
        """The loader's report, with what all processes found by the last `state`."""
        reports = gather(self.loader.report())
        return {**reports[0], **join_counts(reports)}


def _ended(value: jax.Array) -> float:
    """Waits until `value` is there; when that was, by time.perf_counter."""
    value.block_until_ready()
    return time.perf_counter()


class Metrics:
    """Logs each step after the next one has begun: reading a value blocks, and the device must not
    wait for us.

    lr: the largest rate of a step, by its number from 0. peaks: the peak rate of each group of parameters,
    in the order of metrics["norms"]. flops: model FLOPs of a step by its info. files: names of the
    data files, in the order of metrics["files"].

    loss: of the last step logged. failed: the first step that did not count, because some process
    had no batch for it.
    """

    def __init__(
        self,
        run_log: Any,
        skips: Skips,
        lr: Callable[[int], float],
        loss: float,
        peaks: Mapping[str, float] | None = None,
        flops: Callable[[Any], float] = lambda info: 0.0,
        files: Sequence[str] = (),
    ):
        self.loss, self.failed = loss, 0
        self._log, self._lr, self._skips = run_log, lr, skips
        self._peaks, self._flops, self._files = peaks or {}, flops, files
        self._pending: tuple[int, Any, Any, Future[float]] | None = None
        # A step is read after the next was dispatched, maybe long after its end: a thread times it.
        self._clock = ThreadPoolExecutor(1, "clock")

    def after(self, number: int, metrics: Any, info: Any, own: Flags) -> Flags:
        """Takes the metrics of step `number` and logs the step before it; the flags of that one.

        With a single process, its `own` flags count at once.
        """
        joined = self.drain()
        self._pending = (number, metrics, info, self._clock.submit(_ended, metrics["loss"]))
        return own if jax.process_count() == 1 else joined

    def drain(self) -> Flags:
        """Logs the pending step, if any, and returns its flags."""
        if self._pending is None:
            return Flags(writing=True)  # nobody knows yet
        (number, metrics, info, ended), self._pending = self._pending, None
        values = jax.device_get(metrics)
        flags = Flags(*map(bool, values["flags"]))
        if flags.failed:
            self.failed = self.failed or number
        else:
            self._record(number, values, info, ended.result())
        return flags

    def _record(self, number: int, values: Any, info: Any, ended: float) -> None:
        self.loss = float(values["loss"])
        lr, info = self._lr(number - 1), {"pairs": 0, **info}
        counts = ("samples", "tokens", "targets", "images", "real")
        row = {
            "step": number,
            "loss": self.loss,
            "micro_loss": [float(x) for x in values["micro_loss"]],
            "grad_norm": float(values["grad_norm"]),
            "lr": lr,
            **{name: info.get(name, 0) for name in counts},
            "flops": self._flops(info),
            "ok": bool(values["ok"]),
            "data_seconds": round(info.get("waited", 0.0), 4),
        }
        if self._peaks:
            highest = max(self._peaks.values()) or 1.0
            row["lrs"] = {name: lr * peak / highest for name, peak in self._peaks.items()}
            for name, norms in zip(("grad_norms", "update_norms"), values["norms"]):
                row[name] = dict(zip(self._peaks, map(float, norms)))
        if self._files:
            parts = zip(self._files, *values["files"])
            row["losses"] = {name: float(loss / count) for name, loss, count in parts if count}
        self._log.step(row, ended)
        if said := self._skips.see(number, values, info):
            self._log.note(said)


def make_metrics(
    config: Any,
    program: Program,
    model: LlavaConfig,
    steps: int,
    run_log: Any,
    skips: Skips,
    meta: Mapping[str, Any],
    files: Sequence[str] = (),
) -> Metrics:
    """The Metrics of a run of `steps` steps. meta: of the checkpoint that it goes on from, or empty.
    files: of the loader."""
    peaks = {name: group.peak for name, group in program.groups.items()}
    schedule = warmup_cosine(max(peaks.values()), steps, config.warmup_ratio, config.lr_end_ratio)
    # On the host: a step's line must not wait for the step after it, which the device is at.
    rates = np.asarray(schedule(np.arange(steps)))
    trained = program.state.params
    flops = flops_of_steps(model, {**trained, **program.frozen}, trained)
    loss = meta.get("loss", math.nan)
    return Metrics(run_log, skips, lambda count: float(rates[count]), loss, peaks, flops, files)


@contextlib.contextmanager
def room_for(what: Path) -> Iterator[None]:
    """Within it, a disk that takes nothing raises NotSaved, which names `what`, a file or folder."""
    try:
        yield
    except OSError as error:
        fix = "make room, and run the same command again"
        raise NotSaved(f"{what} cannot be written: {reason_of(error)}", fix=fix) from error


class Saver:
    """Writes checkpoints of a run, each step at most once.

    minutes: after so long without a checkpoint the next is `late`; 0 is never. saved: the step that the
    run begins from. A disk that takes none stops no training: the log says so, and the next save is tried
    when it is due, or after RETRY_SECONDS.
    """

    def __init__(self, checkpoints: Checkpointer, run_log: Any, minutes: float, saved: int):
        self._checkpoints, self._log, self._begun = checkpoints, run_log, saved
        self._seconds, self._since = 60 * minutes, time.monotonic()

    def flags(self, *, stop: bool, failed: bool) -> Flags:
        """What this process raises before a step."""
        wait = RETRY_SECONDS if self._checkpoints.failed else self._seconds
        late = is_main() and bool(wait) and time.monotonic() - self._since >= wait
        return Flags(stop, late, failed, self._checkpoints.writing, self._checkpoints.lost)

    def after(self, flags: Flags) -> None:
        """Takes the flags of all processes, after a step."""
        self._checkpoints.advance(flags.writing, flags.lost)

    def save(
        self, done: int, state: TrainState, feed: Feed, meta: dict[str, Any], *, last: bool = False
    ) -> None:
        """Starts writing the state after `done` steps, whose metrics were logged, unless it is written.

        last: of this run, as the log should say.
        """
        if last:
            self._checkpoints.ends = done
        with self._log.aside("save"):
            there = self._checkpoints.settle()
            if done <= self._begun and there:
                return
            meta = {"step": done, **meta, "data": feed.state(done)}
            self._checkpoints.begin(done, state, meta, self._log.sync)
        self._begun, self._since = done, time.monotonic()

    def settle(self) -> None:
        """Waits for the last save, whatever becomes of it."""
        with self._log.aside("save"):
            self._checkpoints.settle()

    def finish(self, error: LlavaError | None = None) -> None:
        """Waits for the last save. Raises NotSaved, in every process, where it failed.

        error: by which the run ends. If that is more than a stop, it is the one to raise: this logs.
        """
        if self._checkpoints.settle():
            return
        lost = NotSaved(
            f"the state after step {self._begun} is not saved; the log says why",
            fix="make room, and run the same command again: it resumes from the last checkpoint",
        )
        if error is None or isinstance(error, Stopped):
            raise lost
        log.error("%s", lost)
