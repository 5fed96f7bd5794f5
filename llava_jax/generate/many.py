"""Many requests through one engine, with the pixels of few of them in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from llava_jax.generate.engine import Engine
from llava_jax.generate.job import Job


def answer_many(
    engine: Engine,
    order: Sequence[int],
    make: Callable[[int], Any],
    take: Callable[[Mapping[int, Any]], None],
) -> None:
    """Answers requests by their numbers. make: the Job of one, or a Reply in its place. take: what has ended."""
    ready, made, left = iter(order), {}, len(order)
    try:
        while left:
            # The pixels of what is being answered, and of what comes next, are in memory.
            for i in islice(ready, engine.slots + engine.rows - len(made)):
                made[i] = make(i)
                if isinstance(made[i], Job):
                    engine.submit(made[i])
            ended = {i: x for i, x in made.items() if not isinstance(x, Job) or x.done}
            if not ended:
                engine.step()
                continue
            left -= len(ended)
            for i in ended:
                del made[i]
            take(ended)
    except BaseException:  # nobody waits for the others any more
        for job in made.values():
            if isinstance(job, Job):
                engine.cancel(job)
        raise
