"""`--profile FROM:TO`: a trace of some steps by jax's profiler, and the operations that took longest."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import jax

from llava_jax.errors import ConfigError

log = logging.getLogger(__name__)

SHOWN = 10


def parse_steps(text: str) -> tuple[int, int]:
    """ "10:12" as (10, 12): the first and last step. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+):(\d+)", text)
    first, last = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ConfigError(
            f"--profile {text!r} is not FROM:TO", fix="steps from 1 on, such as 10:12"
        )
    return first, last


class Profile:
    """Traces the steps "FROM:TO" into `folder`, as they come; "" as steps: none.

    A run goes on after step `start` of `total`: a warning says if that leaves out all or some of them.
    """

    def __init__(self, steps: str, folder: Path, start: int, total: int):
        self._first, self._last = parse_steps(steps) if steps else (0, 0)
        self._folder, self._runs, self._words = folder, False, f"--profile {steps}"
        if self._first and (self._last <= start or self._first > total):
            goes = (
                f"the run has steps {start + 1:,} to {total:,}"
                if start < total
                else "no step is left"
            )
            log.warning("%s traces nothing: %s", self._words, goes)
            self._first = 0
        elif self._first and (self._first <= start or self._last > total):
            first, last = max(self._first, start + 1), min(self._last, total)
            log.warning("%s traces steps %d to %d only", self._words, first, last)

    def between(self, done: int, metrics: Any) -> None:
        """To be called after `done` steps, whose last gave `metrics`."""
        if not self._runs and self._first and self._first - 1 <= done < self._last:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self._folder))
            self._runs = True
        elif self._runs and done >= self._last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is being made, and logs what took longest; or that there was none."""
        if self._runs:
            jax.profiler.stop_trace()
            log.info("what took longest:\n%s", dearest(self._folder))
        elif self._first:
            log.warning("%s traced nothing: the run ended before these steps", self._words)
        self._first, self._runs = 0, False


def dearest(folder: Path) -> str:
    """A table of the operations of the newest trace in `folder` that took longest, of all devices."""
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        return f"the profiler wrote no trace into {folder}"
    seconds, calls = operations(jax.profiler.ProfileData.from_file(str(files[-1])))
    total = sum(seconds.values())
    if not total:
        return f"the trace in {folder} has no operations of a device"
    names = sorted(seconds, key=lambda name: -seconds[name])[:SHOWN]
    wide = max(map(len, names))
    rows = [f"{'operation':{wide}}        ms   share   calls"]
    rows += [
        f"{n:{wide}}  {1e3 * seconds[n]:8.2f}  {seconds[n] / total:6.1%}  {calls[n]:6,}"
        for n in names
    ]
    return "\n".join([*rows, f"the trace: {files[-1].parent}"])


def operations(data: Any) -> tuple[dict[str, float], dict[str, int]]:
    """({operation: its own seconds}, {operation: calls}) of a trace. An operation that contains others,
    such as a loop, counts without them."""
    seconds: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for plane in data.planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if (
                on_device
                and line.name not in ("XLA Ops", "")
                and not line.name.startswith("Stream")
            ):
                continue
            # On the CPU operations run in threads of the host, and say which program they are of.
            events = [e for e in line.events if on_device or any(k == "hlo_op" for k, _ in e.stats)]
            for name, own in _own_times(events):
                seconds[name] += own * 1e-9
                calls[name] += 1
    return seconds, calls


def _own_times(events: list[Any]) -> list[tuple[str, float]]:
    """(name, nanoseconds without those of events inside) of the events of one line."""
    found: list[list[Any]] = []
    open_: list[tuple[float, int]] = []  # (end, place in found)
    for event in sorted(events, key=lambda e: (e.start_ns, -e.duration_ns)):
        while open_ and open_[-1][0] <= event.start_ns:
            open_.pop()
        if open_:
            found[open_[-1][1]][1] -= event.duration_ns
        open_.append((event.start_ns + event.duration_ns, len(found)))
        found.append([_title(event.name), event.duration_ns])
    return [(name, max(own, 0.0)) for name, own in found]


def _title(name: str) -> str:
    """%fusion.12 = f32[...] fusion(...) -> fusion.12"""
    return name.removeprefix("%").partition(" = ")[0][:60]
