"""Rates, memory and goodput of a run, from what the host knows already: nothing here waits for a device."""

from __future__ import annotations

import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from llava_jax.chips import peak_of
from llava_jax.config import LlavaConfig
from llava_jax.flops import Work, count

SECONDS = 5.0
"""The shortest time between two rows; it grows to a five-hundredth of the run's."""

SHORTEST = 0.001
"""Seconds; over less no rate is a rate."""


class Compiling:
    """Seconds that jax spent on compiling in this process."""

    seconds = 0.0
    _listens = False

    @classmethod
    def listen(cls) -> None:
        """From now on they are counted. jax has no way to stop listening, so there is one listener."""
        if not cls._listens:
            cls._listens = True
            jax.monitoring.register_event_duration_secs_listener(cls._heard)

    @classmethod
    def _heard(cls, event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            cls.seconds += duration_secs


class Compiled:
    """Which steps compiled. A step is read once the next was handed to the device: what compiled since
    the last one was read took the time of this step or of the next, so that neither says how fast steps are.
    """

    def __init__(self) -> None:
        Compiling.listen()
        self._known, self._left, self._before = Compiling.seconds, 0.0, False

    def aside(self, seconds: float) -> None:
        """So many seconds of compiling were not of steps."""
        self._known += seconds

    def step(self, seconds: float) -> tuple[float, bool]:
        """(how many of the seconds of a step went to compiling, whether it and its neighbour compiled
        nothing)."""
        new, self._known = max(Compiling.seconds - self._known, 0.0), Compiling.seconds
        taken = min(self._left + new, seconds)
        self._left = min(self._left + new - taken, new)
        clean, self._before = not (new or self._before), bool(new)
        return taken, clean


def flops_of_steps(
    model: LlavaConfig, params: Mapping[str, Any], trained: Iterable[str]
) -> Callable[[Mapping[str, Any]], float]:
    """info of a step -> its model FLOPs (llava_jax.flops), over all devices. params: shapes by name."""
    shapes = {n: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for n, leaf in params.items()}
    learns = set(trained)

    def flops(info: Mapping[str, Any]) -> float:
        if not info.get("tokens"):
            return 0.0
        keys = info["pairs"] / info["tokens"]
        work = Work(info["tokens"], info["targets"], info["images"], keys, info["targets"])
        return count(model, shapes, learns, work).total

    return flops


class Meter:
    """Sums up steps, and makes a row of them from time to time.

    devices: of the run, all processes. started: when the process began with this run, by
    time.perf_counter.
    """

    def __init__(self, devices: int, started: float):
        local = jax.local_devices()
        peak = peak_of(local[0].device_kind)
        self._peak = peak * devices if peak else None
        self._local, self._started, self._last = local, started, time.perf_counter()
        self._since = time.time() - (time.perf_counter() - started)
        self._sums: Counter[str] = Counter()
        self._timed: Counter[str] = Counter()  # of steps that no compiling disturbed
        self._aside: defaultdict[str, float] = defaultdict(float)
        self._trained = 0.0

    def add(
        self,
        row: Mapping[str, Any],
        seconds: float,
        aside: Mapping[str, float],
        compiled: float = 0.0,
        clean: bool = True,
    ) -> None:
        """One step: its row of metrics.jsonl, how long it took, and what else took time before it.

        compiled, clean: of Compiled; a step that is not clean counts in no rate.
        """
        for name, taken in aside.items():
            self._aside[name] += taken
        self._aside["compile"] += compiled
        self._trained += seconds - compiled
        positions = row["tokens"] / row["real"] if row.get("real") else 0
        self._sums.update({"steps": 1, "tokens": row["tokens"], "positions": positions})
        if clean:
            counts = ("tokens", "samples", "flops", "data_seconds")
            self._timed.update({"seconds": seconds, **{n: row.get(n, 0) for n in counts}})

    @property
    def due(self) -> bool:
        """Whether it is time for a row."""
        now = time.perf_counter()
        return now - self._last >= max(SECONDS, (now - self._started) / 500)

    def row(self, step: int) -> dict[str, Any] | None:
        """What the steps since the last row were like, JSON-ready; None if there were none.

        Rates are over the `seconds` of steps that no compiling disturbed, without saving and validation;
        None where those are no real interval. data: the share of them that the host waited for a batch. goodput: the part of all time since the run began in
        this process in which steps ran.
        """
        if not self._sums["steps"]:
            return None
        sums, self._sums, self._last = self._sums, Counter(), time.perf_counter()
        timed, self._timed = self._timed, Counter()
        seconds, whole = timed["seconds"], time.perf_counter() - self._started

        def rate(name: str, digits: int, parts: float = 1.0) -> float | None:
            return round(timed[name] / seconds / parts, digits) if seconds >= SHORTEST else None

        waited = rate("data_seconds", 4)
        row = {
            "step": step,
            "time": round(time.time(), 1),
            "started": round(self._since, 1),
            "steps": sums["steps"],
            "seconds": round(seconds, 3),
            "tokens_per_second": rate("tokens", 1),
            "samples_per_second": rate("samples", 3),
            "padding": round(1 - sums["tokens"] / sums["positions"], 4) if sums["positions"] else 0,
            "data": None if waited is None else min(waited, 1.0),
            "goodput": round(self._trained / max(whole, self._trained, SHORTEST), 4),
            "trained_seconds": round(self._trained, 1),
            "elapsed_seconds": round(whole, 1),
            **{f"{name}_seconds": round(value, 1) for name, value in sorted(self._aside.items())},
            "host_memory": host_memory(),
        }
        if self._peak:
            row["mfu"] = rate("flops", 4, self._peak)
        return row | device_memory(self._local)


def host_memory() -> int:
    """Bytes of this process that are in memory; at most so far, where the system has no /proc."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        return int(statm.read_text().split()[1]) * resource.getpagesize()
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_memory(devices: Iterable[Any]) -> dict[str, int]:
    """{"device_memory", "device_memory_peak"}: bytes on the fullest of the devices; {} where they do
    not say."""
    stats = [found for device in devices if (found := device.memory_stats())]
    names = {"bytes_in_use": "device_memory", "peak_bytes_in_use": "device_memory_peak"}
    return {
        title: max(s[name] for s in stats)
        for name, title in names.items()
        if stats and all(name in s for s in stats)
    }
