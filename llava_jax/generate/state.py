"""What the compiled programs of generation share: what stays on the device, what a call takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from llava_jax.generate.sampling import Controls
from llava_jax.llama import KVCache
from llava_jax.sharding import constrain

if TYPE_CHECKING:
    from llava_jax.generate.job import Job


class State(NamedTuple):
    """What stays on the device. N slots of S entries, F picture places, V tokens."""

    cache: KVCache
    features: jax.Array  # dtype[F, I, D], of pictures
    stands: jax.Array  # int32[F, I], how many positions behind its picture's first each stands
    positions: jax.Array  # int32[N], where `token` stands
    token: jax.Array  # int32[N], the last chosen token: not in the cache yet
    alive: jax.Array  # bool[N]: is being answered
    ahead: jax.Array  # int32[N], by how much a slot's RoPE positions are ahead of its entries
    step: jax.Array  # int32[N], tokens given so far
    controls: Controls  # [N]
    counts: jax.Array  # int32[N, V]
    asked: jax.Array  # bool[N, V]
    bias: jax.Array  # float32[N, V]


class Chunk(NamedTuple):
    """The next C positions of B prompts. Rows may repeat each other.

    places: rows of the picture features, F * I of them; -1: a token. positions: as in batch.
    ahead: how far the position after the prompt is ahead of its entry.
    length: of what is real in `tokens`. last: whether the prompt ends here.
    """

    tokens: Any  # int32[B, C]
    places: Any  # int32[B, C]
    positions: Any  # int32[B, C]
    ahead: Any  # int32[B]
    slots: Any  # int32[B]
    start: Any  # int32[B]
    length: Any  # int32[B]
    last: Any  # bool[B]

    @classmethod
    def of(cls, jobs: Sequence[Job], places: Sequence[np.ndarray], length: int) -> Chunk:
        """The next `length` positions of each job's prompt. places: of each, from Pictures.see."""
        tokens = np.zeros((len(jobs), length), np.int32)
        positions = np.zeros((len(jobs), length), np.int32)
        at = np.full((len(jobs), length), -1, np.int32)
        many = np.zeros(len(jobs), np.int32)
        for i, job in enumerate(jobs):
            part = job.tokens[job.read : job.read + length]
            many[i] = len(part)
            tokens[i, : len(part)] = part
            positions[i, : len(part)] = job.positions[job.read : job.read + length]
            at[i, : len(part)] = places[i]
        ahead = np.array([job.ahead for job in jobs], np.int32)
        start = np.array([job.read for job in jobs], np.int32)
        last = start + many == [job.length for job in jobs]
        slots = np.array([job.slot for job in jobs], np.int32)
        return cls(tokens, at, positions, ahead, slots, start, many, last)


class Limits(NamedTuple):
    """Of a constrained answer: which tokens may come next, a bit for each."""

    constrained: Any  # bool[B]
    allowed: Any  # uint32[B, ceil(V / 32)]


class Given(NamedTuple):
    """Tokens of one call: n is 1 after reading, STEPS after decoding, of which `count` are real."""

    tokens: Any  # int32[B, n], -1 in rows that were done
    logprobs: Any  # float32[B, n]
    top_ids: Any  # int32[B, n, TOPS]
    top_logprobs: Any  # float32[B, n, TOPS]
    logits: Any  # float32[B, n, V] if asked for
    count: Any  # int32[]
    passes: Any = None  # int32[]: how often the model ran for them, where that is fewer


def everywhere(given: Any) -> Any:
    """A copy on every device, so that every process can read it."""
    return jax.tree.map(lambda x: constrain(x, P()), given)
