"""Attention of new tokens over a slot cache, in key blocks of one size.

A cache is [J, N, K, C, H]: J blocks of C entries, of N slots. Entry i of a slot, C entries a block, holds
the key of its i-th token or feature. Blocks come first so that what a step of the loop takes out of the
cache, which XLA copies, lies in one piece: for 8 slots on a CPU that is a third faster than slots first. A block of which
a query sees nothing changes no bit of its result, so that what a row gives depends neither on the length
of the cache nor on how far the other rows have come: the loop runs as far as the longest of them needs.
On a GPU the host waits for each turn of a loop whose end is not known, and many small kernels take longer
than their work: there one kernel takes a new token over each row's own blocks, and a prompt's chunk attends to
all blocks at once.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.attention.choice import PLAIN, Choice, takes
from llava_jax.attention.kernels import flash_decode
from llava_jax.attention.plain import MASKED

AT_ONCE = 2**29
"""Bytes of float32 scores up to which a GPU has a prompt's chunk attend to all blocks at once."""

_FLOOR = 0.1 * MASKED  # where the running maximum starts: above MASKED, so that exp gives 0 there


class Places(NamedTuple):
    """Where the T new tokens of B rows go in a cache of N slots.

    slots: int32[B], or None where row b is slot b and B is N. write_at: int32[B], the entry that takes a
    row's first token; with slots the first of a block. blocks: int32[], how many key blocks are
    looked at. apart: static; rows one after another, each over its own blocks alone.
    """

    slots: jax.Array | None
    write_at: jax.Array
    blocks: jax.Array
    apart: bool = False


def write(cache_JNKCH: jax.Array, new_BTKH: jax.Array, places: Places) -> jax.Array:
    """The cache with T new keys (or values) of each row in it; what follows them in their block is lost."""
    size = cache_JNKCH.shape[3]
    new = new_BTKH.astype(cache_JNKCH.dtype)
    if places.slots is None:
        rows, entry = jnp.arange(len(new)), places.write_at
        if new.shape[1] == 1:
            return cache_JNKCH.at[entry // size, rows, :, entry % size].set(new[:, 0])
        entry = entry[:, None] + jnp.arange(new.shape[1])  # [B, T]; beyond the cache: dropped
        return cache_JNKCH.at[entry // size, rows[:, None], :, entry % size].set(new)
    b, t, kv, h = new.shape
    new = jnp.pad(new, [(0, 0), (0, -t % size), (0, 0), (0, 0)])
    new = new.reshape(b, -1, size, kv, h).swapaxes(2, 3)  # [B, ceil(T / C), K, C, H]
    for row, slot, at in zip(new, places.slots, places.write_at // size):  # slots may repeat
        cache_JNKCH = jax.lax.dynamic_update_slice(cache_JNKCH, row[:, None], (at, slot, 0, 0, 0))
    return cache_JNKCH


def attend(
    q_BTNH: jax.Array,
    keys_JNKCH: jax.Array,
    values_JNKCH: jax.Array,
    entries_BT: jax.Array,
    places: Places,
    window: int | None,
    choice: Choice = PLAIN,
) -> jax.Array:
    """Softmax attention with float32 weights over the entries up to each query's own -> [B, T, N, H].

    entries_BT: int32. window: entries this far or further behind are not seen (Mistral).
    """
    one_each = places.slots is None and q_BTNH.shape[1] == 1 and not places.apart
    if one_each and choice.decode == "flash" and takes("triton", q_BTNH.shape[-1]):
        how = {"window": window, "interpret": choice.interpret}
        return flash_decode(q_BTNH, keys_JNKCH, values_JNKCH, entries_BT, **how)
    if choice.decode == "flash":
        if places.slots is not None and not places.apart:
            entries = keys_JNKCH.shape[0] * keys_JNKCH.shape[3]
            if 4 * q_BTNH.size // q_BTNH.shape[-1] * entries <= AT_ONCE:
                return _at_once(q_BTNH, keys_JNKCH, values_JNKCH, entries_BT, places.slots, window)
        # A loop whose end is known: the host waits for none of its turns.
        places = places._replace(blocks=len(keys_JNKCH))
    if not places.apart:
        return _looped(q_BTNH, keys_JNKCH, values_JNKCH, entries_BT, places, window)

    def one(row: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        slot, q, at = row
        own = Places(slot[None], at[:1], at.max() // keys_JNKCH.shape[3] + 1)
        return _looped(q[None], keys_JNKCH, values_JNKCH, at[None], own, window)[0]

    slots = jnp.arange(len(q_BTNH)) if places.slots is None else places.slots
    return jax.lax.map(one, (slots, q_BTNH, entries_BT))


def _at_once(q_BTNH, keys_JNKCH, values_JNKCH, entries_BT, slots_B, window: int | None):
    """`attend` over all entries of the rows' slots: a few large kernels where the loop has many small."""
    kv = keys_JNKCH.shape[2]
    b, t, n, h = q_BTNH.shape

    def row(cache: jax.Array) -> jax.Array:
        return jnp.take(cache, slots_B, axis=1).astype(q_BTNH.dtype)  # [J, B, K, C, H]

    q = q_BTNH.reshape(b, t, kv, n // kv, h)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = product("BTKGH,JBKCH->BKGTJC", q, row(keys_JNKCH)) * h**-0.5
    j, c = scores.shape[-2:]
    behind = entries_BT[:, :, None, None] - jnp.arange(j * c).reshape(j, c)  # [B, T, J, C]
    seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
    scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=(-2, -1)).astype(q.dtype)
    out = product("BKGTJC,JBKCH->BTKGH", weights, row(values_JNKCH))
    return out.astype(q.dtype).reshape(b, t, n, h)


def _looped(q_BTNH, keys_JNKCH, values_JNKCH, entries_BT, places: Places, window: int | None):
    """`attend` by a loop over the key blocks."""
    kv, size = keys_JNKCH.shape[2:4]
    b, t, n, h = q_BTNH.shape
    g = n // kv
    q = q_BTNH.reshape(b, t, kv, g, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    q = q.reshape(b, kv, g * t, h)

    def block(cache: jax.Array, j: jax.Array) -> jax.Array:
        if places.slots is None:
            return jax.lax.dynamic_index_in_dim(cache, j, keepdims=False)

        def rows(slot):
            return jax.lax.dynamic_slice(cache, (j, slot, 0, 0, 0), (1, 1, kv, size, h))[0, 0]

        return jax.vmap(rows)(places.slots)

    def step(j, carry):
        largest, total, mixed = carry
        k, v = (block(c, j).astype(q.dtype) for c in (keys_JNKCH, values_JNKCH))  # [B, K, C, H]
        scores = jnp.matmul(q, k.swapaxes(2, 3), preferred_element_type=jnp.float32) * h**-0.5
        behind = entries_BT[:, :, None] - (j * size + jnp.arange(size))  # [B, T, C]
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
