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
        Compiling.listen()
        local = jax.local_devices()
        peak = peak_of(local[0].device_kind)
        self._peak = peak * devices if peak else None
        self._local, self._started, self._last = local, started, time.perf_counter()
        self._since = time.time() - (time.perf_counter() - started)
        self._sums: Counter[str] = Counter()
        self._aside: defaultdict[str, float] = defaultdict(float)
        self._trained = 0.0
        self.compiled = (
            Compiling.seconds
        )  # of which the steps so far know, or which were not of steps

    def add(self, row: Mapping[str, Any], seconds: float, aside: Mapping[str, float]) -> None:
        """One step: its row of metrics.jsonl, how long it took, and what else took time before it."""
        for name, taken in aside.items():
            self._aside[name] += taken
        compiled, self.compiled = Compiling.seconds - self.compiled, Compiling.seconds
        self._aside["compile"] += compiled
        seconds = max(seconds - compiled, 0.0)
        self._trained += seconds
        self._sums.update(
            {
                "steps": 1,
                "seconds": seconds,
                "positions": row["tokens"] / row["real"] if row.get("real") else 0,
                **{n: row.get(n, 0) for n in ("tokens", "samples", "flops", "data_seconds")},
            }
        )

    @property
    def due(self) -> bool:
        """Whether it is time for a row."""
        now = time.perf_counter()
        return now - self._last >= max(SECONDS, (now - self._started) / 500)

    def row(self, step: int) -> dict[str, Any] | None:
        """What the steps since the last row were like, JSON-ready; None if there were none.

        Rates are over the seconds of steps, without compiling, saving and validation. data: the share
        of them that the host waited for a batch. goodput: the part of all time since the run began in
        this process in which steps ran.
        """
        if not self._sums["steps"]:
            return None
        sums, self._sums, self._last = self._sums, Counter(), time.perf_counter()
        seconds, whole = max(sums["seconds"], 1e-9), time.perf_counter() - self._started
        row = {
            "step": step,
            "time": round(time.time(), 1),
            "started": round(self._since, 1),
            "steps": sums["steps"],
            "seconds": round(seconds, 3),
            "tokens_per_second": round(sums["tokens"] / seconds, 1),
            "samples_per_second": round(sums["samples"] / seconds, 3),
            "padding": round(1 - sums["tokens"] / sums["positions"], 4) if sums["positions"] else 0,
            "data": round(sums["data_seconds"] / seconds, 4),
            "goodput": round(self._trained / whole, 4),
            "trained_seconds": round(self._trained, 1),
            "elapsed_seconds": round(whole, 1),
            **{f"{name}_seconds": round(value, 1) for name, value in sorted(self._aside.items())},
            "host_memory": host_memory(),
        }
        if self._peak:
            row["mfu"] = round(sums["flops"] / seconds / self._peak, 4)
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
