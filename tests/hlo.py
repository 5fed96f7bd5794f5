"""The matrix products that a compiled program runs, those of a loop as often as it goes round."""

import math
import re
from typing import Any, NamedTuple

from llava_jax.plan.hlo import parse, runs


class Dot(NamedTuple):
    """A matrix product: its output's sizes, and those that are summed over; how often it runs."""

    out: tuple[int, ...]
    summed: tuple[int, ...]
    times: int

    @property
    def flops(self) -> int:
        """Of all its runs; a multiplication and an addition are two."""
        return 2 * math.prod(self.out) * math.prod(self.summed) * self.times

    @property
    def sizes(self) -> set[int]:
        return {*self.out, *self.summed}


def dots(compiled: Any) -> list[Dot]:
    """All products of a jax.stages.Compiled."""
    module, found = parse(compiled.as_text()), []
    for name, run in runs(module).items():
        held = module.computations[name]
        for one in held.values():
            if one.op == "dot":
                axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
                left = held[one.operands[0]].arrays[0].dims
                summed = tuple(left[int(i)] for i in axes[1].split(",")) if axes else ()
                found.append(Dot(one.arrays[0].dims, summed, run.times))
    return found


def flops(compiled: Any) -> int:
    """Operations of all products."""
    return sum(dot.flops for dot in dots(compiled))
