"""Frozen kernels in 4 or 8 bits: codes, and float32 scales of each output.

nf4 is QLoRA's NormalFloat (arXiv 2305.14314, appendix E) with bitsandbytes' blocks and rounding: a scale for
64 inputs. int8 is symmetric with one scale for all inputs of an output, so that the product is scaled
and not the kernel. qwix does not serve here: its QArray is no array of the flat table, it
keeps a code per uint4 element, and its provider wraps a model object, where our step binds a table.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 64
"""Inputs that share a scale: bitsandbytes' default."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantize(kernel: jax.Array, kind: str) -> tuple[jax.Array, jax.Array]:
    """A kernel [..., d_in, d_out] as (codes, scales).

    kind: "int8", codes int8[..., d_in, d_out] and float32[..., 1, d_out], the largest magnitude over
    127, or "nf4", codes uint8[..., d_in / 2, d_out] with the earlier input in the high bits and
    float32[..., d_in / 64, d_out], the largest magnitude of each block; d_in is filled up with zeros
    to whole blocks.
    """
    if kind == "int8":
        kernel = kernel.astype(jnp.float32)
        scales = jnp.abs(kernel).max(-2, keepdims=True) / 127
        return jnp.round(kernel / jnp.where(scales > 0, scales, 1)).astype(jnp.int8), scales
    *lead, d_in, d_out = kernel.shape
    fill = [(0, 0)] * len(lead) + [(0, -d_in % BLOCK), (0, 0)]
    blocks = jnp.pad(kernel.astype(jnp.float32), fill).reshape(*lead, -1, BLOCK, d_out)
    scales = jnp.abs(blocks).max(-2)  # [..., d_in / 64, d_out]
    units = blocks / jnp.where(scales > 0, scales, 1)[..., None, :]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(NF4)]
    codes = sum((units > middle).astype(jnp.uint8) for middle in middles)  # the nearest value
    pairs = jnp.asarray(codes).reshape(*lead, -1, 2, d_out)
    return pairs[..., 0, :] << 4 | pairs[..., 1, :], scales


def dequantize(
    codes: jax.Array, scales: jax.Array, d_in: int, dtype: Any = jnp.float32
) -> jax.Array:
    """The kernel dtype[..., d_in, d_out] that codes and scales stand for."""
    if codes.dtype == jnp.int8:
        return (codes.astype(jnp.float32) * scales).astype(dtype)
    both = jnp.stack(halves(codes, scales, dtype), axis=-2)  # [..., d_in / 2, 2, d_out]
    return both.reshape(*codes.shape[:-2], -1, codes.shape[-1])[..., :d_in, :]


def halves(codes: jax.Array, scales: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The even rows and the odd rows of an nf4 kernel, each dtype[..., d_in / 2, d_out]."""
    blocks = (*scales.shape[:-1], BLOCK // 2, scales.shape[-1])
    spread = jnp.broadcast_to(scales[..., None, :], blocks).reshape(codes.shape)
    high, low = (_nf4(half) * spread for half in (codes >> 4, codes & 15))
    return high.astype(dtype), low.astype(dtype)


def _nf4(codes: jax.Array) -> jax.Array:
    """float32 of codes below 16. Four rounds of selects: a gather from a table does not vectorise."""
    values: list = [jnp.float32(value) for value in NF4]
    for bit in range(4):
        odd = (codes >> bit) & 1 == 1
        values = [jnp.where(odd, b, a) for a, b in zip(values[::2], values[1::2])]
    return values[0]
