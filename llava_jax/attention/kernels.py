"""Fused kernels that jax ships: splash attention (TPU), a Pallas-Triton one and cuDNN's (GPU).

Queries [B, T, N, H], keys and values [B, S, K, H], `query` and `key` the Tokens of each; -> [B, T, N, H].
Causal: a query sees the earlier tokens of its own segment; else it sees every token of it. None of
them knows independent turns. T and S are multiples of STEP.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.attention.chunked import Form
from llava_jax.attention.plain import Tokens

STEP = {"splash": 128, "triton": 128, "cudnn": 2}
"""What the lengths of a row, or of each device's part of it, are multiples of."""

_SPLASH_BLOCK = 640  # the backward kernel's float32 blocks of 1024 overflow a v5e core's memory


def splash_kernel(length: int, heads: int, form: Form, parts: int, interpret: bool) -> Any:
    """The splash kernel for `length` queries and keys; a pytree, to be called by `splash`.

    heads: query heads of a device. parts: devices that share the queries of a row.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    if not form.causal:
        mask = masks.FullMask(shape)
    elif form.window:
        mask = masks.LocalMask(shape, (form.window - 1, 0), 0)
    else:
        mask = masks.CausalMask(shape)
    own = length // parts
    block = next(n for n in range(_SPLASH_BLOCK, 0, -STEP["splash"]) if own % n == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: dict[str, Any] = {f"block_{name}": block for name in names}
    return lib.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=lib.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=parts,
        interpret=interpret,
    )


def splash(kernel: Any, q_BTNH, k_BSKH, v_BSKH, query: Tokens, key: Tokens) -> jax.Array:
    """jax.experimental.pallas.ops.tpu.splash_attention; blocks that are never seen are skipped."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as lib

    q = (q_BTNH * q_BTNH.shape[-1] ** -0.5).swapaxes(1, 2)  # [B, N, T, H]: it does not scale
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)  # [B, K, S, H]
    return jax.vmap(kernel)(q, k, v, lib.SegmentIds(query.segment, key.segment)).swapaxes(1, 2)


def triton(
    q_BTNH, k_BSKH, v_BSKH, query: Tokens, key: Tokens, *, form: Form, interpret: bool
) -> jax.Array:
    """jax.experimental.pallas.ops.gpu.attention. KV heads are repeated; there is no window."""
    from jax.experimental.pallas.ops.gpu.attention import mha

    del key  # the queries' own
    groups = q_BTNH.shape[2] // k_BSKH.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k_BSKH, v_BSKH))
    return mha(
        q_BTNH,
        k,
        v,
        query.segment,
        sm_scale=q_BTNH.shape[-1] ** -0.5,
        causal=form.causal,
        interpret=interpret,
    )


def cudnn(q_BTNH, k_BSKH, v_BSKH, query: Tokens, key: Tokens, *, form: Form) -> jax.Array:
    """cuDNN's, by jax.nn.dot_product_attention: one example a row, padding after it.

    It knows no segments, and needs none there: by causality a real token sees real tokens alone.
    """
    del query
    window = (form.window - 1, 0) if form.window else None
    lengths = None if form.causal else (key.segment > 0).sum(1, dtype=jnp.int32)  # [B]
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSKH,
        v_BSKH,
        is_causal=form.causal,
        key_value_seq_lengths=lengths,
        local_window_size=window,
        implementation="cudnn",
    )


def flash_decode(
    q_BTNH: jax.Array,
    keys_JNKCH: jax.Array,
    values_JNKCH: jax.Array,
    positions_BT: jax.Array,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """One new token a slot over a slot cache (attention.cached), by jax.experimental.pallas.ops.gpu.

    Its kernel takes each block of the cache, where it lies, as a sequence of its own and skips those that
    the query does not see; what the blocks give is then put together as in flash decoding.
    """
    from jax.experimental.pallas.ops.gpu.decode_attention import mqa

    blocks, slots, kv, size, h = keys_JNKCH.shape
    groups = q_BTNH.shape[2] // kv
    q = jnp.broadcast_to(q_BTNH.reshape(slots, kv, groups, h), (blocks, slots, kv, groups, h))
    first = jnp.arange(blocks)[:, None, None] * size
    position = jnp.broadcast_to(positions_BT[:, 0, None], (blocks, slots, kv))  # [J, N, K]
    start = 0 if window is None else jnp.maximum(position - window + 1, 0)

    def each(x):  # every block of every slot and head is a row
        return x.reshape(blocks * slots * kv, *x.shape[3:])

    mixed, (total, largest) = mqa(
        *map(each, (q, keys_JNKCH, values_JNKCH)),
        each(jnp.clip(start - first, 0, size) + 0 * position),
        each(jnp.clip(position + 1 - first, 0, size)),
        block_k=min(size, 128),
        k_splits=1,
        interpret=interpret,
        return_residuals=True,
        normalize_output=False,
    )  # [J * N * K, G, H], [J * N * K, G] twice
    mixed, total, largest = (
        x.reshape(blocks, slots, kv, *x.shape[1:]) for x in (mixed, total, largest)
    )
    keep = jnp.exp(largest - largest.max(0))  # [J, N, K, G]
    mixed = (mixed.astype(jnp.float32) * keep[..., None]).sum(0) / (total * keep).sum(0)[..., None]
    return mixed.astype(q_BTNH.dtype).reshape(q_BTNH.shape)
