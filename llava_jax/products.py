"""Products of rows with a kernel, in each form that a kernel is held in; which way is for which device.

Decoding reads every kernel for a few rows: it takes as long as the bytes that are read. XLA converts a
whole kernel, or codes of 8 bits with a scale for each output, within its product; codes of 4 bits it does on
TPU alone, and there by far too many selects. So those have a Pallas kernel for each, for few rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.quant import BLOCK, NF4, dequantize, halves
from llava_jax.sharding import alone

TPU_ROWS = 8
"""Rows that a TPU's matrix unit takes at least; XLA multiplies fewer on the vector unit, far slower."""

FEW_ROWS = 64
"""Up to so many, reading the kernel takes longer than multiplying: a kernel of 4 bits is read as it is."""

_SUBLANES = 16  # rows of bfloat16 that a tile has, and that a product of Triton takes at least
_HALF = BLOCK // 2  # rows of codes that share a scale


def choose(device: Any, dtype: Any) -> str:
    """How few rows are multiplied with nf4 kernels on `device`: "triton", "mosaic", or "": by XLA.

    Neither computes in float32. The choice lies in layers.Compute, where it can be another.
    """
    if jnp.dtype(dtype) == jnp.float32:
        return ""
    if device.platform == "tpu":
        return "mosaic"
    capability = str(getattr(device, "compute_capability", ""))  # of an AMD GPU it reads gfx942
    major = capability.partition(".")[0]
    return "triton" if major.isdigit() and int(major) >= 8 else ""


def splits_positions() -> bool:
    """Whether the mesh that is set (jax.set_mesh) splits the positions of a row."""
    return jax.sharding.get_abstract_mesh().shape.get("context", 1) > 1


def matmul(x: jax.Array, kernel: jax.Array, out: Any = None) -> jax.Array:
    """x [..., d_in] @ kernel [d_in, d_out] in x's dtype, or in `out`."""
    product = partial(jnp.matmul, preferred_element_type=out)
    if splits_positions():
        # Rows and positions that are both split cannot be one axis: XLA would gather x first.
        return product(x, kernel.astype(x.dtype))
    # Two-dimensional on purpose: XLA's CPU gradient of a 3-D matmul is 2.6 times slower.
    rows = _rows(x)
    if 0 < len(rows) < TPU_ROWS:
        y = jax.lax.platform_dependent(
            rows, kernel.astype(x.dtype), tpu=partial(_filled, product), default=product
        )
    else:
        y = product(rows, kernel.astype(x.dtype))
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def quantized(
    x: jax.Array, codes: jax.Array, scales: jax.Array, d_in: int, few: str = ""
) -> jax.Array:
    """x [..., d_in] @ the kernel that codes and scales (llava_jax.quant) stand for, in x's dtype.

    few: of `choose`, for nf4 and up to FEW_ROWS rows; "triton interpret" and "mosaic interpret" run
    the Pallas kernels in Python, to test them without their device.
    """
    if codes.dtype == jnp.int8:
        return (matmul(x, codes, jnp.float32) * scales).astype(x.dtype)
    rows, d_out = math.prod(x.shape[:-1]), codes.shape[-1]
    if few and 0 < rows <= FEW_ROWS and not d_out % _COLUMNS[few.split()[0]] and alone():
        return _by_pallas(x, codes, scales, few)

    def apart(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        # Put together, the halves of a byte would be written out, and five times over.
        even_odd = _blocks(x).reshape(*x.shape[:-1], -1, 2)
        parts = [
            matmul(even_odd[..., i], half, jnp.float32)
            for i, half in enumerate(halves(codes, scales, x.dtype))
        ]
        return (parts[0] + parts[1]).astype(x.dtype)

    def whole(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
        return matmul(x, dequantize(codes, scales, d_in, x.dtype))

    return jax.lax.platform_dependent(x, codes, scales, tpu=apart, default=whole)


def _rows(x: jax.Array) -> jax.Array:
    # math.prod and not -1: with no rows (a batch without images) -1 cannot be inferred.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _filled(product: Callable, rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product with rows of zeros for those that are missing to TPU_ROWS."""
    return product(jnp.pad(rows, ((0, TPU_ROWS - len(rows)), (0, 0))), kernel)[: len(rows)]


def _blocks(x: jax.Array) -> jax.Array:
    """x with its last axis filled up to whole blocks."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)])


# nf4 by Pallas -----------------------------------------------------------------------------------

_COLUMNS = {"triton": 64, "mosaic": 256}
"""Outputs of one program."""


def _by_pallas(x: jax.Array, codes: jax.Array, scales: jax.Array, few: str) -> jax.Array:
    """`quantized` of nf4 for few rows."""
    kernel = {"triton": _triton, "mosaic": _mosaic}[few.split()[0]]
    rows = _blocks(_rows(x))
    count = len(rows)
    rows = jnp.pad(rows, ((0, -count % _SUBLANES), (0, 0)))
    # The earlier of two inputs is in the high bits: [2, M, d_in / 2], even inputs and odd ones.
    even_odd = rows.reshape(len(rows), -1, 2).transpose(2, 0, 1)
    y = kernel(even_odd, codes, scales, count, few.endswith("interpret"))
    return y.astype(x.dtype).reshape(*x.shape[:-1], codes.shape[-1])


def _triton(x_EMI, codes_IO, scales_GO, count: int, interpret: bool) -> jax.Array:
    """float32[count, O]. Values are looked up in a table, which stays in the processor's first cache."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    _, m, _ = x_EMI.shape
    groups, outputs = scales_GO.shape
    columns = _COLUMNS["triton"]
    parts = next(n for n in (4, 2, 1) if groups % n == 0)  # more programs than processors
    own = groups // parts

    def program(x, codes, scales, table, out):
        def block(g, total):
            code = codes[pl.ds(g * _HALF, _HALF), :].astype(jnp.int32)  # [32, columns]
            found = 0.0
            for i, half in enumerate((code >> 4, code & 15)):
                rows = x[i, :, pl.ds(g * _HALF, _HALF)]  # [M, 32]
                found += jnp.dot(rows, table[half], preferred_element_type=jnp.float32)
            return total + found * scales[pl.ds(g, 1), :]

        total = jax.lax.fori_loop(0, own, block, jnp.zeros((m, columns), jnp.float32))
        real = jnp.arange(m)[:, None] < count
        triton.store(out.at[:, :], total, mask=jnp.broadcast_to(real, total.shape))

    return pl.pallas_call(
        program,
        grid=(outputs // columns, parts),
        in_specs=[
            pl.BlockSpec((2, m, own * _HALF), lambda o, j: (0, 0, j)),
            pl.BlockSpec((own * _HALF, columns), lambda o, j: (j, o)),
            pl.BlockSpec((own, columns), lambda o, j: (j, o)),
            pl.BlockSpec((16,), lambda o, j: (0,)),
        ],
        out_specs=pl.BlockSpec((None, m, columns), lambda o, j: (j, 0, o)),
        out_shape=jax.ShapeDtypeStruct((parts, count, outputs), jnp.float32),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="nf4_product",
    )(x_EMI, codes_IO, scales_GO, jnp.asarray(NF4, x_EMI.dtype)).sum(0)


def _mosaic(x_EMI, codes_IO, scales_GO, count: int, interpret: bool) -> jax.Array:
    """float32[count, O]. Values are looked up along lanes; a program multiplies all inputs of its outputs."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu

    lanes = 128
    _, m, inputs = x_EMI.shape
    groups, outputs = scales_GO.shape
    columns = _COLUMNS["mosaic"]

    def program(x, codes, scales, table, out, kernel):
        values = jnp.broadcast_to(table[...], (_HALF, lanes))

        def blocks(first, many):
            """Dequantises `many` groups, of which the first is a multiple of 8 as loads want it."""
            for at in range(0, columns, lanes):
                strip = pl.ds(at, lanes)
                scale = scales[pl.ds(first, many), strip]
                for g in range(many):
                    here = pl.ds(pl.multiple_of((first + g) * _HALF, _HALF), _HALF)
                    code = codes[here, strip].astype(jnp.int32)  # [32, lanes]
                    for i, half in enumerate((code >> 4, code & 15)):
                        found = jnp.take_along_axis(values, half, axis=1, mode="promise_in_bounds")
                        kernel[i, here, strip] = (found * scale[g : g + 1]).astype(kernel.dtype)

        eights, rest = divmod(groups, 8)
        if eights:
            jax.lax.fori_loop(0, eights, lambda n, _: blocks(pl.multiple_of(n * 8, 8), 8), None)
        if rest:
            blocks(eights * 8, rest)
        halves_ = [jnp.dot(x[i], kernel[i], preferred_element_type=jnp.float32) for i in range(2)]
        out[...] = halves_[0] + halves_[1]

    table = jnp.zeros((1, lanes), jnp.float32).at[0, : len(NF4)].set(jnp.asarray(NF4))
    return pl.pallas_call(
        program,
        grid=(outputs // columns,),
        in_specs=[
            pl.BlockSpec((2, m, inputs), lambda o: (0, 0, 0)),
            pl.BlockSpec((inputs, columns), lambda o: (0, o)),
            pl.BlockSpec((groups, columns), lambda o: (0, o)),
            pl.BlockSpec((1, lanes), lambda o: (0, 0)),
        ],
        out_specs=pl.BlockSpec((m, columns), lambda o: (0, o)),
        out_shape=jax.ShapeDtypeStruct((m, outputs), jnp.float32),
        scratch_shapes=[tpu.VMEM((2, inputs, columns), x_EMI.dtype)],
        interpret=interpret,
        name="nf4_product",
    )(x_EMI, codes_IO, scales_GO, table)[:count]
