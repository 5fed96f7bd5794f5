"""Beam search over the slots of one engine: the answers whose tokens are likeliest together.

The rules are transformers' with `early_stopping=False`, so that ids are equal: of the best continuations
(twice as many as beams, more where several tokens end an answer) those among the first `beams` that end
are finished, scored by their log-probability over length ** length_penalty; the others go on. It ends
when no beam that goes on scores better, at its present length, than the worst of `beams` finished ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_jax.errors import ConfigError
from llava_jax.generate.engine import Engine
from llava_jax.generate.job import Job
from llava_jax.generate.request import Request

MOST = 64
"""Answers or beams of one request."""


@dataclass(frozen=True)
class Beam:
    """A beginning or a whole answer. total: the sum of its log-probabilities. slot: that holds it."""

    total: np.float32
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    slot: int = 0


def check(request: Request, n: int, beams: int, length_penalty: float) -> None:
    """Raises ConfigError for numbers out of range, and settings that beam search does not know."""
    for name, value, most in (("n", n, MOST), ("num_beams", beams, MOST)):
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ConfigError(f"{name} is {value!r}, not a whole number from 1 to {most}")
    if not isinstance(length_penalty, int | float) or not abs(length_penalty) <= 100:
        raise ConfigError(f"length_penalty is {length_penalty!r}, not a number from -100 to 100")
    if beams == 1:
        return
    if n > beams:
        raise ConfigError(f"n is {n}, but there are {beams} beams", fix="raise num_beams")
    given = request.not_greedy() + ["prompt_lookup"] * bool(request.prompt_lookup)
    if given:
        raise ConfigError(f"{given[0]} cannot be given with num_beams", fix="leave one of them out")


def run(engine: Engine, make: Callable[[], Job], beams: int, length_penalty: float) -> list[Job]:
    """`search` as jobs that have ended, best first. make: a job of the request."""
    asked, found = make(), []
    for _, beam in search(engine, asked, beams, length_penalty):
        job = make()
        job.ids, job.logprobs, job.length = list(beam.ids), list(beam.logprobs), asked.length
        stopped = job.ids[-1] in engine.generator.eos_ids
        if job.text is not None:
            job.text.push(job.ids)
            job.text.finish()
            stopped |= job.text.stopped
        job.reason = "stop" if stopped else "length"
        found.append(job)
    return found


def search(engine: Engine, job: Job, beams: int, length_penalty: float) -> list[tuple[float, Beam]]:
    """The `beams` best answers, best first, with their scores; takes the engine's state.

    engine: keeps logits, has at least `beams` slots and nothing else to do.
    Raises what `Engine.submit` and `Engine.run` do.
    """
    generator = engine.generator
    engine.submit(job)
    budget = job.budget
    while not (job.ids or job.done):
        engine.step()
    if job.error is not None:
        raise job.error
    keep = max(2, 1 + len(generator.eos_ids)) * beams
    keep = min(keep, generator.config.language.vocab_size)
    first = _log_softmax(job.logits[0])
    tokens = np.argsort(-first, kind="stable")[:keep]
    found = [(tokens, first[tokens])]
    going, done = [Beam(np.float32(0), slot=job.slot)], []
    for length in range(1, budget + 1):
        best = _continuations(going, found, keep)
        ended = [b.ids[-1] in generator.eos_ids or length == budget for b in best]
        new = [
            (float(b.total) / length**length_penalty, b) for b, e in zip(best[:beams], ended) if e
        ]
        done = sorted(done + new, key=lambda pair: -pair[0])[:beams]
        going = [b for b, e in zip(best, ended) if not e][:beams]
        if not going or (
            len(done) == beams and going[0].total / length**length_penalty <= done[-1][0]
        ):
            break
        found = _read(engine, going, keep)
        going = [replace(b, slot=i) for i, b in enumerate(going)]
    engine.cancel(job)
    return done


def _continuations(going: list[Beam], found: list[Any], keep: int) -> list[Beam]:
    """The `keep` likeliest beams of one more token."""
    made = [
        Beam(np.float32(b.total + value), (*b.ids, int(token)), (*b.logprobs, float(value)), b.slot)
        for b, (tokens, values) in zip(going, found)
        for token, value in zip(tokens, values)
    ]
    return sorted(made, key=lambda b: -b.total)[:keep]


def _read(engine: Engine, going: list[Beam], keep: int) -> list[Any]:
    """(likeliest tokens, their log-probabilities) after the last token of each beam."""
    rows = [*going, *[going[0]] * (engine.slots - len(going))]
    source = np.array([b.slot for b in rows], np.int32)
    token = np.array([b.ids[-1] for b in rows], np.int32)
    g = engine.generator
    state, engine.state = engine.state, None
    with g.scope():
        engine.state, values, tokens = g.beam(g.leaves, state, *g.put((source, token)), keep=keep)
    engine.held = [[] for _ in engine.held]  # slots no longer hold what they were read for
    return list(zip(np.asarray(tokens), np.asarray(values)))[: len(going)]


def _log_softmax(logits_V: np.ndarray) -> np.ndarray:
    shifted = logits_V - logits_V.max()
    return shifted - np.log(np.exp(shifted).sum())
