"""Who sees whom, and attention with whole score matrices: the definition the kernels are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

MASKED = -1e30
"""Score of a key that is not seen; not -inf: a row that sees nothing (padding) must not become NaN."""


class Tokens(NamedTuple):
    """What decides whether one token sees another, each int32[B, T]; None where it plays no part."""

    index: jax.Array  # place in the row
    segment: jax.Array  # n for the n-th example of the row, 0 for padding
    turn: jax.Array | None  # n for the n-th independent question, 0 for what all share
    position: jax.Array | None  # RoPE position


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Causal:
    """A query sees the earlier tokens of its own packed example (segment > 0).

    segments, positions, turns: int32[B, T]. Within an example, tokens of turn 0 are seen by all turns,
    those of turn n by turn n alone; None: there are no independent turns.
    window: a key whose RoPE position is this much or more behind the query's is not seen (Mistral).
    """

    segments: jax.Array
    positions: jax.Array
    turns: jax.Array | None = None
    window: int | None = field(default=None, metadata={"static": True})

    @property
    def tokens(self) -> Tokens:
        """The rows' tokens, as queries or as keys."""
        index = jnp.broadcast_to(jnp.arange(self.segments.shape[1]), self.segments.shape)
        return Tokens(index, self.segments, self.turns, self.positions if self.window else None)

    def mask(self) -> jax.Array:
        """bool[B, T, T]: whether query t sees key s."""
        return sees(self.tokens, self.tokens, self.window)


def sees(query: Tokens, key: Tokens, window: int | None) -> jax.Array:
    """bool[B, T, S]: whether each query sees each key, by the rules of `Causal`."""
    q = jax.tree.map(lambda x: x[:, :, None], query)  # each [B, T, 1]
    k = jax.tree.map(lambda x: x[:, None, :], key)  # each [B, 1, S]
    seen = (q.index >= k.index) & (q.segment == k.segment) & (k.segment > 0)
    if q.turn is not None and k.turn is not None:
        seen &= (q.turn == k.turn) | (k.turn == 0)
    if window and q.position is not None and k.position is not None:
        seen &= q.position - k.position < window
    return seen


def plain(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array | None
) -> jax.Array:
    """Softmax attention with float32 weights -> [B, T, N, H]. K divides N: grouped KV heads.

    mask_BTS: bool, True where query t sees key s; None for all. A query that sees nothing gets a
    meaningless but finite result. Holds [B, N, T, S] scores.
    """
    b, t, n, h = q_BTNH.shape
    s, kv = k_BSKH.shape[1:3]
    g = n // kv  # query heads per KV head
    # In named axes: softmax(einsum("BTKGH,BSKH->BKGTS", q, k)), then einsum("BKGTS,BSKH->BTKGH", ., v).
    # Written as transposes and batched matmuls because XLA's CPU einsums of these are 1.7 times slower.
    q = q_BTNH.reshape(b, t, kv, g, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    q = q.reshape(b, kv, g * t, h)  # [B, K, G*T, H]
    k = k_BSKH.transpose(0, 2, 3, 1)  # [B, K, H, S]
    v = v_BSKH.transpose(0, 2, 1, 3)  # [B, K, S, H]
    scores = jnp.matmul(q, k, preferred_element_type=jnp.float32) * h**-0.5  # [B, K, G*T, S]
    if mask_BTS is not None:
        grouped = scores.reshape(b, kv, g, t, s)
        scores = jnp.where(mask_BTS[:, None, None], grouped, MASKED).reshape(scores.shape)
    # Dividing after the second matmul writes the weights once, and the maximum needs no gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    mixed = (mixed / weights.sum(-1, keepdims=True)).astype(q_BTNH.dtype)  # [B, K, G*T, H]
    return mixed.reshape(b, kv, g, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
