"""What this machine gives: matmul peak, and the bandwidths of a copy and of a matrix times a vector.

    python -m bench machine

The limits that the other benchmarks are held against, by jax and by torch, one thread on a CPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from bench import frame

SIDE = 1024, 8192  # of square matrices: on a CPU, on an accelerator
# Of the matrices that are copied and multiplied with a vector: on a CPU, on an accelerator, whose kernels must
# take far longer than the host needs to start them (32 of 4096 gave half of an H200's bandwidth).
_MATVEC = 4096, 16384
_MANY = 4, 8


def main(name: str, words: list[str]) -> int:
    """Prints the table."""
    args = frame.parser(__doc__).parse_args(words)
    kinds = {"jax": "bench.machine:Jax", "torch": "bench.machine:Torch"}
    if not frame.installed("torch"):
        del kinds["torch"]
    with frame.Systems(kinds, args) as systems:
        found = systems.each("rates")
    names = list(found["jax"])
    head = ["what", *(f"{s}, {k}" for s in found for k in ("best", "median"))]
    rows = [[n, *(found[s][n][k] for s in found for k in ("best", "median"))] for n in names]
    frame.show(head, rows)
    frame.record(name, args, rates=found)
    return 0


def rate(work: Callable[[], Any], amount: float, repeats: int = 11) -> dict[str, float]:
    """Amount a second, best and median; of processor time on a CPU."""
    now = time.process_time if frame.ON_CPU else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        start = now()
        work()
        times.append(now() - start)
    found = frame.spread(times[1:])
    return {"best": amount / found["min"], "median": amount / found["median"]}


def bandwidth() -> float:
    """Bytes a second of jax here: of a matrix times a vector on a CPU, of a copy elsewhere."""
    rates = Jax(argparse.Namespace(repeats=11)).rates()
    return 1e9 * rates["matvec, GB/s" if frame.ON_CPU else "copy, GB/s"]["best"]


class Jax:
    """The rates by jax."""

    def __init__(self, args: argparse.Namespace):
        self.repeats = args.repeats

    def rates(self) -> dict[str, Any]:
        """{what: {"best", "median"}}."""
        import jax
        import jax.numpy as jnp

        dtype = jnp.float32 if frame.ON_CPU else jnp.bfloat16
        n = SIDE[not frame.ON_CPU]
        square = jnp.ones((n, n), dtype)
        # Several matrices in turn, or a CPU would keep the one in its cache.
        side = _MATVEC[not frame.ON_CPU]
        big = [jnp.ones((side, side), dtype) for _ in range(_MANY[not frame.ON_CPU])]
        size = sum(x.nbytes for x in big)
        product = jax.jit(jnp.matmul)
        matvec = jax.jit(lambda x, many: [x @ w for w in many])
        copy = jax.jit(lambda many: [w + 1 for w in many], donate_argnums=0)  # new pages cost more
        x = jnp.ones((1, side), dtype)
        ready = jax.block_until_ready

        def moved() -> None:
            big[:] = ready(copy(big))

        return {
            "matmul, GFLOP/s": rate(
                lambda: ready(product(square, square)), 2e-9 * n**3, self.repeats
            ),
            "copy, GB/s": rate(moved, 2e-9 * size, self.repeats),
            "matvec, GB/s": rate(lambda: ready(matvec(x, big)), 1e-9 * size, self.repeats),
        }


class Torch:
    """The rates by torch."""

    def __init__(self, args: argparse.Namespace):
        import torch

        self.repeats = args.repeats
        if args.threads:
            torch.set_num_threads(args.threads)

    def rates(self) -> dict[str, Any]:
        """{what: {"best", "median"}}."""
        import torch

        on_gpu = torch.cuda.is_available()
        where: Any = {"device": "cuda" if on_gpu else "cpu"}
        where["dtype"] = torch.bfloat16 if on_gpu else torch.float32
        n = SIDE[on_gpu]
        square = torch.ones(n, n, **where)
        side = _MATVEC[on_gpu]
        big = [torch.ones(side, side, **where) for _ in range(_MANY[on_gpu])]
        size = sum(x.nbytes for x in big)
        x = torch.ones(1, side, **where)

        def ready(_: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()

        linear = torch.nn.functional.linear
        return {
            "matmul, GFLOP/s": rate(lambda: ready(square @ square), 2e-9 * n**3, self.repeats),
            "copy, GB/s": rate(lambda: ready([w.add_(1) for w in big]), 2e-9 * size, self.repeats),
            "matvec, GB/s": rate(
                lambda: ready([linear(x, w) for w in big]), 1e-9 * size, self.repeats
            ),
        }
