"""How long a checkpoint of 1 GB takes, against a copy of the same bytes and against orbax alone.

    python -m bench checkpoint --out bench/results/checkpoint.json

Blocked is what a save adds to the steps of training: the call that begins it, and by how much the next
step, which donates the state while it is being written, is longer than one without a save. All parts are
run in turn, --repeats times; a row has the median in seconds, in seconds of CPU, and in seconds of CPU of
the threads that do not write checkpoints: these do not depend on how many cores are free.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import frame

ARRAY = (2048, 4096)


WRITERS = "ts_"
"""How the names of tensorstore's threads begin, which write checkpoints."""


def own_seconds() -> float:
    """Seconds of CPU of the threads of this process that do not write checkpoints (Linux)."""
    total = 0
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it ended
            if not (task / "comm").read_text().startswith(WRITERS):
                total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


class Clock:
    """Seconds, seconds of CPU of the process, and of its threads that write no checkpoints, by name."""

    def __init__(self):
        self._times: defaultdict[str, list[list[float]]] = defaultdict(list)

    def time(self, name: str, work: Callable, *args: Any, **more: Any) -> Any:
        clocks = time.perf_counter, time.process_time, own_seconds
        before = [clock() for clock in clocks]
        found = work(*args, **more)
        self._times[name].append([clock() - b for clock, b in zip(clocks, before)])
        return found

    def rows(self) -> dict[str, dict[str, float]]:
        names = "s", "cpu s", "own cpu s"
        return {
            name: {n: round(statistics.median(v), 3) for n, v in zip(names, zip(*rounds))}
            for name, rounds in self._times.items()
        }


def plain_write(path: Path, arrays: list) -> None:
    """The bytes into one file, on the disk when this returns."""
    with open(path, "wb") as file:
        for array in arrays:
            file.write(memoryview(array).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def run(folder: Path, gigabytes: float, times: int) -> dict[str, Any]:
    """The medians of all parts."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import orbax.checkpoint as ocp

    from llava_jax.digests import damages
    from llava_jax.train.checkpoint import Checkpointer
    from llava_jax.train.step import TrainState

    count = round(gigabytes * 1e9 / 4 / np.prod(ARRAY))
    make = jax.jit(lambda key: jax.random.normal(key, ARRAY))
    params = {f"p{i}": make(jax.random.key(i)) for i in range(count)}
    state = TrainState(jnp.int32(0), params, ())
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    place = next(iter(params.values())).sharding
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)
    clock, ready = Clock(), jax.block_until_ready
    next_step = lambda state: ready(step(state))  # noqa: E731
    state = next_step(state)
    for n in range(times + 1):
        if n == 1:
            clock = Clock()  # the first round warms up
        clock.time("copy in memory", lambda state: ready(jax.tree.map(jnp.copy, state)), state)
        state = clock.time("step", next_step, state)
        ours = Checkpointer(folder / "ours", keep=1)
        clock.time("save: begin", ours.begin, n + 1, state, {"step": n})
        state = clock.time("save: next step", next_step, state)
        clock.time("save: rest", ours.settle)
        clock.time("digests", damages, folder / "ours" / str(n + 1))
        clock.time("restore", lambda from_: ready(from_.restore(like)[0]), ours)
        ours.close()

        theirs = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        shutil.rmtree(folder / "orbax", ignore_errors=True)
        save = ocp.args.PyTreeSave(state.params)
        clock.time("orbax: begin", theirs.save, folder / "orbax", args=save)
        del save
        state = clock.time("orbax: next step", next_step, state)
        clock.time("orbax: rest", theirs.wait_until_finished)
        how = ocp.checkpoint_utils.construct_restore_args(like.params)
        load = ocp.args.PyTreeRestore(like.params, restore_args=how)
        clock.time(
            "orbax: restore",
            lambda *a: ready(a[0](a[1], args=a[2])),
            theirs.restore,
            folder / "orbax",
            load,
        )
        theirs.close()

        arrays = [np.array(value) for value in state.params.values()]
        clock.time("plain write", plain_write, folder / "plain", arrays)
        clock.time("plain read", np.fromfile, folder / "plain", np.float32)
        del arrays
    return clock.rows()


def blocked(rows: dict[str, dict[str, float]], who: str, unit: str) -> float:
    """What a save adds to the steps, in copies of the state in memory."""
    parts = sum(rows[f"{who}: {part}"][unit] for part in ("begin", "next step"))
    return round((parts - rows["step"][unit]) / rows["copy in memory"][unit], 2)


def main(name: str, words: list[str]) -> int:
    """Prints the medians."""
    parser = frame.parser(__doc__, repeats=3)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: a temporary one)"
    )
    args = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rows = run(folder, args.gigabytes, args.repeats)
    finally:
        shutil.rmtree(folder)
    frame.show(["part", "s", "cpu s", "own cpu s"], [[n, *row.values()] for n, row in rows.items()])
    over = {
        unit: {who: blocked(rows, who, unit) for who in ("save", "orbax")}
        for unit in ("s", "own cpu s")
    }
    print(f"blocked / copy in memory: {over}")
    frame.record(name, args, rows=rows, **{"blocked / copy in memory": over})
    return 0
