"""When a run saves, and when it stops: signals, the clock, and what another process asks for.

A wish travels with the batch of a step, is joined over all processes within the step, and comes back
with the step's metrics. So every process learns of it after the same step, and none waits for another.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


class Wishes(NamedTuple):
    """What some process wants after a step. Fields are bools here, int32[] within the step."""

    stop: Any = False
    save: Any = False
    failed: Any = (
        False  # this process could not make its part of the batch: the step must not count
    )

    @property
    def any(self) -> bool:
        return bool(self.stop or self.save or self.failed)


def put_wishes(wishes: Wishes, mesh: Mesh) -> jax.Array:
    """int32[devices, 3]: the wishes of this process at each of its devices."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    row = np.array([list(map(int, wishes))], np.int32)
    return jax.make_array_from_callback((mesh.size, len(wishes)), sharding, lambda _: row)


def with_wishes(step: Callable) -> Callable:
    """step(state, frozen, batch) -> the same with wishes: joined in metrics["wishes"] (int32[3]).

    A step in which some process failed leaves everything as it was, its number too.
    """

    def run(state: Any, frozen: Any, batch: Any, wishes: jax.Array):
        new, metrics = step(state, frozen, batch)
        joined = wishes.max(0)
        failed = joined[Wishes._fields.index("failed")] > 0
        new = jax.tree.map(lambda after, before: jnp.where(failed, before, after), new, state)
        return new, {**metrics, "wishes": joined}

    return run


class Timer:
    """Says when a save by the clock is due: `minutes` after the last one of any kind; 0 is never."""

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes
        self.reset()

    def reset(self) -> None:
        """Starts anew, as after a save."""
        self._since = time.monotonic()

    @property
    def due(self) -> bool:
        return bool(self._seconds) and time.monotonic() - self._since >= self._seconds


class StopFlag:
    """Within the context, SIGTERM and SIGINT only set `asked`; a second one acts at once."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: the caller keeps its own handlers
                break
        return self

    def _ask(self, number, frame):
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None: not set from Python; jax.distributed puts one for SIGTERM into C++.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __exit__(self, *exc):
        self._restore()
