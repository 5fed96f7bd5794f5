"""When a run stops: signals, and flags that all processes share.

Flags travel with the batch of a step, are joined over all processes within the step, and come back
with the step's metrics. So every process learns of them after the same step, without waiting.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.train.signals import stop_signals


class Flags(NamedTuple):
    """What a process raises before a step: save or stop after it, or do not count it; and how far its
    part of an open checkpoint is."""

    stop: bool = False
    save: bool = False
    failed: bool = False  # this process could not make its part of the batch
    writing: bool = False
    lost: bool = False  # the part could not be written


def put_flags(flags: Flags, mesh: Mesh) -> jax.Array:
    """int32[devices, flags]: the flags of this process on each of its devices."""
    sharding = NamedSharding(mesh, P(mesh.axis_names))
    row = np.array([flags], np.int32)
    return jax.make_array_from_callback((mesh.size, len(flags)), sharding, lambda _: row)


def with_flags(step: Callable) -> Callable:
    """step(state, frozen, batch) -> the same with flags; metrics["flags"] (int32[flags]) is their union.

    A step in which some process failed leaves everything as it was, its number included.
    """

    def run(state: Any, frozen: Any, batch: Any, flags: jax.Array):
        new, metrics = step(state, frozen, batch)
        joined = flags.max(0)
        failed = joined[Flags._fields.index("failed")] > 0
        new = jax.tree.map(lambda after, before: jnp.where(failed, before, after), new, state)
        return new, {**metrics, "flags": joined}

    return run


@contextlib.contextmanager
def stop_flag() -> Iterator[threading.Event]:
    """Within the context, SIGTERM, SIGINT and SIGHUP only set the event; one that comes after that, and
    not at once, acts as it did before."""
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        # Not the main thread: the caller keeps its own handlers.
        with contextlib.suppress(ValueError):
            stack.enter_context(stop_signals(stop.set))
        yield stop
