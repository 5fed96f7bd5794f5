"""How long a checkpoint of 1 GB takes, against a copy of the same bytes and against orbax alone.

    python bench/checkpoint.py --out bench/results/checkpoint.json

Blocked is what a save adds to the steps of training: the call that begins it, and by how much the next
step, which donates the state while it is being written, is longer than one without a save. All parts are
run in turn, --times times; a row has the median in seconds and in seconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ARRAY = (2048, 4096)


class Clock:
    """Seconds, and seconds of CPU of the process, by name."""

    def __init__(self):
        self.wall, self.cpu = defaultdict(list), defaultdict(list)

    def time(self, name: str, work: Callable, *args: Any, **more: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work(*args, **more)
        self.wall[name].append(time.perf_counter() - wall)
        self.cpu[name].append(time.process_time() - cpu)
        return found

    def rows(self) -> dict[str, dict[str, float]]:
        median = lambda values: round(statistics.median(values), 3)  # noqa: E731
        return {n: {"s": median(self.wall[n]), "cpu s": median(self.cpu[n])} for n in self.wall}


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


def main(words: list[str] | None = None) -> int:
    """Prints the medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure (default: a temporary one)"
    )
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    args = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        rows = run(folder, args.gigabytes, args.times)
    finally:
        shutil.rmtree(folder)
    blocked = {
        who: round(
            sum(rows[f"{who}: {part}"]["s"] for part in ("begin", "next step")) - rows["step"]["s"],
            3,
        )
        for who in ("save", "orbax")
    }
    copy = rows["copy in memory"]["s"]
    result = {
        "gigabytes": args.gigabytes,
        "rows": rows,
        "blocked, s": blocked,
        "blocked / copy in memory": {who: round(s / copy, 2) for who, s in blocked.items()},
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, load {os.getloadavg()[0]:.0f}",
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
