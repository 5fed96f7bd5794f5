"""Attention of new tokens over a slot cache, in key blocks of one size.

Entry i of a slot holds the key of position i. A block of which a query sees nothing changes no bit of
its result, so that what a row gives depends neither on the length of the cache nor on how far the
other rows have come: the loop simply runs as far as the longest of them needs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.attention.plain import MASKED

_FLOOR = 0.1 * MASKED  # where the running maximum starts: above MASKED, so that exp gives 0 there


class Places(NamedTuple):
    """Where the T new tokens of B rows go in a cache of N slots.

    slots: int32[B], or None where row b is slot b and B is N. write_at: int32[B], the entry that takes
    a row's first token. blocks: int32[], how many key blocks are looked at. block: keys of a block,
    static; it divides the length of the cache.
    """

    slots: jax.Array | None
    write_at: jax.Array
    blocks: jax.Array
    block: int


def write(cache_NKSH: jax.Array, new_BTKH: jax.Array, places: Places) -> jax.Array:
    """The cache with T new keys (or values) of each row in it."""
    new = new_BTKH.swapaxes(1, 2).astype(cache_NKSH.dtype)  # [B, K, T, H]
    if places.slots is None:

        def put(row, one, at):
            return jax.lax.dynamic_update_slice(row, one, (0, at, 0))

        return jax.vmap(put)(cache_NKSH, new, places.write_at)
    for b in range(len(new)):  # slots may repeat; there are few of them
        at = (places.slots[b], 0, places.write_at[b], 0)
        cache_NKSH = jax.lax.dynamic_update_slice(cache_NKSH, new[b : b + 1], at)
    return cache_NKSH


def attend(
    q_BTNH: jax.Array,
    keys_NKSH: jax.Array,
    values_NKSH: jax.Array,
    positions_BT: jax.Array,
    places: Places,
    window: int | None,
) -> jax.Array:
    """Softmax attention with float32 weights over the entries up to each query's position -> [B, T, N, H].

    positions_BT: int32. window: entries this far or further behind are not seen (Mistral).
    """
    b, t, n, h = q_BTNH.shape
    kv = keys_NKSH.shape[1]
    g, size = n // kv, places.block
    q = q_BTNH.reshape(b, t, kv, g, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    q = q.reshape(b, kv, g * t, h)

    def block(cache: jax.Array, j: jax.Array) -> jax.Array:
        if places.slots is None:
            return jax.lax.dynamic_slice_in_dim(cache, j * size, size, axis=2)

        def rows(slot):
            return jax.lax.dynamic_slice(cache, (slot, 0, j * size, 0), (1, kv, size, h))[0]

        return jax.vmap(rows)(places.slots)

    def step(j, carry):
        largest, total, mixed = carry
        k, v = (block(c, j).astype(q.dtype) for c in (keys_NKSH, values_NKSH))  # [B, K, C, H]
        scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32) * h**-0.5
        behind = positions_BT[:, :, None] - (j * size + jnp.arange(size))  # [B, T, C]
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        grouped = scores.reshape(b, kv, g, t, size)
        scores = jnp.where(seen[:, None, None], grouped, MASKED).reshape(scores.shape)
        new = jnp.maximum(largest, scores.max(-1, keepdims=True))
        weights, keep = jnp.exp(scores - new), jnp.exp(largest - new)
        part = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return new, total * keep + weights.sum(-1, keepdims=True), mixed * keep + part

    start = (
        jnp.full((b, kv, g * t, 1), _FLOOR, jnp.float32),
        jnp.zeros((b, kv, g * t, 1), jnp.float32),
        jnp.zeros((b, kv, g * t, h), jnp.float32),
    )
    _, total, mixed = jax.lax.fori_loop(0, places.blocks, step, start)
    out = (mixed / jnp.where(total > 0, total, 1)).astype(q_BTNH.dtype)  # [B, K, G*T, H]
    return out.reshape(b, kv, g, t, h).transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)
