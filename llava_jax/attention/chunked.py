"""Attention in blocks of queries and keys, in plain XLA: memory linear in T, on every device.

The online softmax of FlashAttention (arXiv 2205.14135, and 2307.08691 for the backward pass): a block
of queries walks over the key blocks that it may see and keeps a running maximum, sum and mean; the
backward pass makes the weights anew from the saved log-sum. Key blocks that lie before the first
example or after the last query of a block of queries are never computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llava_jax.attention.plain import MASKED, Tokens, sees

_FLOOR = 0.1 * MASKED  # where the running maximum starts: above MASKED, so that exp gives 0 there


class Form(NamedTuple):
    """What is fixed when the program is compiled.

    causal: who sees whom is by `sees`; else all keys are seen. block: queries and keys of a block of
    `chunked`, at most.
    """

    causal: bool
    window: int | None
    block: int


def chunked(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    query: Tokens,
    key: Tokens,
    form: Form,
) -> jax.Array:
    """Softmax attention with float32 weights -> [B, T, N, H]; a query that sees nothing gets 0."""
    b, t, n, h = q_BTNH.shape
    kv = k_BSKH.shape[2]
    heads = q_BTNH.reshape(b, t, kv, n // kv, h).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    q = _blocks(heads, 3, form.block)  # [Q, B, K, G, C, H]
    k, v = (
        _blocks(x.transpose(0, 2, 1, 3), 2, form.block) for x in (k_BSKH, v_BSKH)
    )  # [P, B, K, C, H]
    query, key = jax.tree.map(lambda x: _blocks(x, 1, form.block), (query, key))
    out: Any = _attend(q, k, v, query, key, form)  # [Q, B, K, G, C, H]
    out = jnp.moveaxis(out, 0, 3).reshape(b, kv, n // kv, -1, h)[:, :, :, :t]
    return out.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h)


def _blocks(x: jax.Array, axis: int, most: int) -> jax.Array:
    """[..., T, ...] -> [blocks, ..., C, ...]: equal blocks of `axis`, the last filled with 0."""
    length = x.shape[axis]
    count = -(-length // most)
    size = -(-length // count)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, count * size - length)
    x = jnp.pad(x, pad).reshape(*x.shape[:axis], count, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _ranges(query: Tokens, key: Tokens, form: Form) -> tuple[jax.Array, jax.Array]:
    """(first, end): int32[Q], the key blocks that each block of queries has to look at."""
    count, _, size = key.segment.shape
    if not form.causal:
        return jnp.zeros(len(query.segment), jnp.int32), jnp.full(len(query.segment), count)
    row = jnp.moveaxis(key.segment, 0, 1).reshape(key.segment.shape[1], -1)  # [B, S]
    # The first key of each example, then of the example that each query belongs to.
    starts = jnp.full((len(row), row.shape[1] + 1), row.shape[1])
    places = jnp.broadcast_to(jnp.arange(row.shape[1]), row.shape)
    starts = jax.vmap(lambda a, i, x: a.at[i].min(x))(starts, row, places)  # [B, segments]
    start = jax.vmap(lambda a, i: a[i], in_axes=(0, 1), out_axes=1)(starts, query.segment)
    if form.window and query.turn is None:  # without turns, positions and places differ alike
        start = jnp.maximum(start, query.index - form.window + 1)
    real = query.segment > 0
    first = jnp.where(real, start, row.shape[1]).min((1, 2)) // size
    end = jnp.where(real, query.index, -1).max((1, 2)) // size + 1
    return first, end


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, query: Tokens, key: Tokens, form: Form) -> jax.Array:
    """q [Q, B, K, G, C, H]; k, v [P, B, K, C, H]; tokens [Q or P, B, C] -> as q."""
    return _forward(q, k, v, query, key, form)[0]


def _forward(q, k, v, query, key, form):
    """(output, log-sum of each query's weights float32[Q, B, K, G*C, 1])."""
    k_t = k.swapaxes(3, 4)  # [P, B, K, H, C]: XLA's CPU matmul wants it so

    def one(_, block):
        q, query, first, end = block
        q2 = _merge(q)  # [B, K, G*C, H]

        def add(j, carry):
            top, total, mean = carry
            scores = _scores(q2, k_t[j], query, _at(key, j), q.shape[2], form)  # [B, K, G*C, C]
            new = jnp.maximum(top, scores.max(-1, keepdims=True))
            weights, old = jnp.exp(scores - new), jnp.exp(top - new)
            more = jnp.matmul(weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new, total * old + weights.sum(-1, keepdims=True), mean * old + more

        top = jnp.full((*q2.shape[:3], 1), _FLOOR, jnp.float32)
        start = top, jnp.zeros_like(top), jnp.zeros(q2.shape, jnp.float32)
        top, total, mean = jax.lax.fori_loop(first, end, add, start)
        seen = total > 0
        out = (mean / jnp.where(seen, total, 1)).astype(q.dtype).reshape(q.shape)
        # Of a query that sees nothing it is large, so that the backward pass finds no weights.
        return None, (out, jnp.where(seen, top + jnp.log(jnp.where(seen, total, 1)), -MASKED))

    return jax.lax.scan(one, None, (q, query, *_ranges(query, key, form)))[1]


def _attend_forward(q, k, v, query, key, form):
    out, log_sum = _forward(q, k, v, query, key, form)
    return out, (q, k, v, query, key, out, log_sum)


def _attend_backward(form, saved, d_out):
    q, k, v, query, key, out, log_sum = saved
    scale = q.shape[-1] ** -0.5
    k_t, v_t = k.swapaxes(3, 4), v.swapaxes(3, 4)  # [P, B, K, H, C]

    def dot(a, b):
        return jnp.matmul(a.astype(q.dtype), b, preferred_element_type=jnp.float32)

    def one(sums, block):
        q, query, log_sum, out, d_out, first, end = block
        q2, d2 = _merge(q), _merge(d_out)  # [B, K, G*C, H]
        inner = jnp.sum(d2.astype(jnp.float32) * _merge(out), -1, keepdims=True)  # [B, K, G*C, 1]

        def add(j, carry):
            dq, dk, dv = carry
            scores = _scores(q2, k_t[j], query, _at(key, j), q.shape[2], form)
            weights = jnp.exp(scores - log_sum)  # [B, K, G*C, C]
            d_scores = weights * (dot(d2, v_t[j]) - inner) * scale
            dv = dv.at[j].add(dot(weights.swapaxes(2, 3), d2))
            dk = dk.at[j].add(dot(d_scores.swapaxes(2, 3), q2))
            return dq + dot(d_scores, k[j]), dk, dv

        dq, *sums = jax.lax.fori_loop(first, end, add, (jnp.zeros(q2.shape, jnp.float32), *sums))
        return tuple(sums), dq.astype(q.dtype).reshape(q.shape)

    zeros = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    blocks = (q, query, log_sum, out, d_out, *_ranges(query, key, form))
    (dk, dv), dq = jax.lax.scan(one, zeros, blocks)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _merge(x: jax.Array) -> jax.Array:
    """[B, K, G, C, H] -> [B, K, G*C, H]"""
    b, kv, g, c, h = x.shape
    return x.reshape(b, kv, g * c, h)


def _at(tokens: Tokens, j: jax.Array) -> Tokens:
    return jax.tree.map(lambda x: x[j], tokens)


def _scores(q, k_t, query: Tokens, key: Tokens, groups: int, form: Form) -> jax.Array:
    """float32[B, K, G*C, C]: scaled products of a block, MASKED where the key is not seen."""
    scores = jnp.matmul(q, k_t, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    b, kv, rows, size = scores.shape
    mask = sees(query, key, form.window) if form.causal else (key.segment > 0)[:, None]
    grouped = scores.reshape(b, kv, groups, rows // groups, size)
    return jnp.where(mask[:, None, None], grouped, MASKED).reshape(scores.shape)
