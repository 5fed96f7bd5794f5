"""`attention`: the one function that the tower and the decoder call, alone or over a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.attention.choice import PLAIN, Choice
from llava_jax.attention.chunked import Form, chunked
from llava_jax.attention.kernels import STEP, cudnn, splash, splash_kernel, triton
from llava_jax.attention.plain import Causal, Tokens, plain
from llava_jax.sharding import IMAGES, QUERIES


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    seen: Causal | jax.Array | None,
    choice: Choice = PLAIN,
) -> jax.Array:
    """Softmax attention with float32 weights -> [B, T, N, H]. K divides N: grouped KV heads.

    seen: who sees whom: Causal (S is T), a mask bool[B, T, S], which the plain path takes, or None
    for all. A query that sees nothing gets a meaningless but finite result.
    """
    kernel = choice.at(k_BSKH.shape[1])
    if kernel == "plain" or isinstance(seen, jax.Array):
        return plain(q_BTNH, k_BSKH, v_BSKH, seen.mask() if isinstance(seen, Causal) else seen)
    b, t, n, _ = q_BTNH.shape
    form = Form(seen is not None, seen.window if seen else None, choice.block)
    ones = jnp.ones((b, t), jnp.int32)
    tokens = seen.tokens if seen else Tokens(ones, ones, None, None)
    layout = Layout.of(b, n, form.causal)
    if layout.heads and k_BSKH.shape[2] % layout.head_parts:
        k_BSKH, v_BSKH = (jnp.repeat(x, n // x.shape[2], axis=2) for x in (k_BSKH, v_BSKH))
    step = layout.query_parts * STEP.get(kernel, 1)
    arrays = jax.tree.map(partial(_padded, step=step), (q_BTNH, k_BSKH, v_BSKH, tokens))
    if kernel == "splash":
        own, length = n // layout.head_parts, arrays[0].shape[1]
        made = splash_kernel(length, own, form, layout.query_parts, choice.interpret)
        return layout.run(splash, *arrays, kernel=made)[:, :t]
    calls: dict[str, Callable] = {
        "chunked": chunked,
        "triton": partial(triton, interpret=choice.interpret),
        "cudnn": cudnn,
    }
    return layout.run(partial(calls[kernel], form=form), *arrays)[:, :t]


def settled(seen: Causal, choice: Choice) -> Causal | jax.Array:
    """`seen` as `attention` takes it: where that is a mask, it is made once for all layers."""
    return seen.mask() if choice.at(seen.segments.shape[1]) == "plain" else seen


def _padded(x: jax.Array, step: int) -> jax.Array:
    """[B, T, ...] with T raised to a multiple of `step`, by zeros: of the segments, padding."""
    more = -x.shape[1] % step
    return jnp.pad(x, [(0, 0), (0, more), *[(0, 0)] * (x.ndim - 2)]) if more else x


@dataclass(frozen=True)
class Layout:
    """How one call lies on the mesh that is set: every device computes its own rows and heads.

    rows, context, heads: the mesh axes that split the rows, the queries of a row, and the heads.
    Every device has whole rows of keys and values. An axis that does not divide is not used.
    """

    rows: tuple[str, ...] = ()
    context: str | None = None
    heads: str | None = None
    query_parts: int = 1
    head_parts: int = 1

    @classmethod
    def of(cls, rows: int, heads: int, causal: bool) -> Layout:
        """Of `rows` rows and `heads` query heads, on the mesh of `jax.set_mesh`."""
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        row_axes, context, tensor = QUERIES if causal else (IMAGES[0], None, QUERIES[2])
        row_axes = tuple(a for a in row_axes if sizes.get(a, 1) > 1)
        if rows % math.prod(sizes[a] for a in row_axes):
            row_axes = ()
        query_parts, head_parts = sizes.get(context, 1), sizes.get(tensor, 1)
        if heads % head_parts:
            head_parts = 1
        return cls(
            row_axes,
            context if query_parts > 1 else None,
            tensor if head_parts > 1 else None,
            query_parts,
            head_parts,
        )

    def run(self, call: Callable, q, k, v, tokens: Tokens, kernel: Any = None) -> jax.Array:
        """call([kernel,] q, k, v, the queries' tokens, the keys'), on each device's part."""
        made = () if kernel is None else (kernel,)
        if not (self.rows or self.heads or self.context):
            return call(*made, q, k, v, tokens, tokens)
        rows = self.rows or None
        queries, keys = P(rows, self.context, self.heads), P(rows, None, self.heads)
        specs: tuple = queries, keys, keys, P(rows, self.context), P(rows)
        if kernel is not None:
            mesh = jax.sharding.get_abstract_mesh()
            specs = kernel.manual_sharding_spec(NamedSharding(mesh, P(None, self.context))), *specs
        # The kernels' shapes say nothing of what varies over the mesh, so it is not checked.
        parts = jax.shard_map(call, in_specs=specs, out_specs=queries, check_vma=False)
        return parts(*made, q, k, v, tokens, tokens)
