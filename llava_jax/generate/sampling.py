"""How the next token is chosen: greedily, or by temperature, top-k and top-p with a seed per row.

All settings are arrays with one entry per row, so that no mixture of them is compiled again, and a row's
draw depends on its own seed and step alone: it is the same in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.settings import SamplingSettings

Array = jax.Array | np.ndarray

GREEDY_BELOW = 1e-3
"""A temperature up to this means greedy, as in the original's model_worker.py."""


class Controls(NamedTuple):
    """The settings of B rows. `budget` is the tokens a row may still give, from its first on."""

    temperature: Array  # float32[B]
    top_k: Array  # int32[B]
    top_p: Array  # float32[B]
    seed: Array  # uint32[B]
    budget: Array  # int32[B]

    @classmethod
    def of(cls, rows: Sequence[SamplingSettings], budgets: Sequence[int]) -> Controls:
        """Rows of settings as arrays. The lower 32 bits of a seed count; None is 0."""
        return cls(
            np.array([s.temperature for s in rows], np.float32),
            np.array([min(s.top_k, 2**31 - 1) for s in rows], np.int32),
            np.array([s.top_p for s in rows], np.float32),
            np.array([int(s.seed or 0) % 2**32 for s in rows], np.uint32),
            np.array(budgets, np.int32),
        )


def choose_token(
    logits_BV: Array, controls: Controls, step: Array | int
) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, int32[B], and its log-probability under the model, float32[B].

    The order is temperature, top-k, top-p, as in transformers.
    step: how many tokens the rows have given so far; a row's key is fold_in(key(seed), step).
    The log-probability is that of the distribution before temperature, top-k and top-p.
    """
    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)  # [B]
    warm = controls.temperature > GREEDY_BELOW
    drawn = jax.lax.cond(jnp.any(warm), lambda: _draw(logits_BV, controls, step), lambda: greedy)
    token = jnp.where(warm, drawn, greedy)
    logit = jnp.take_along_axis(logits_BV, token[:, None], axis=-1)[:, 0]  # [B]
    return token, logit - jax.nn.logsumexp(logits_BV, axis=-1)


def _draw(logits_BV: Array, controls: Controls, step: Array | int) -> jax.Array:
    scaled = logits_BV / jnp.maximum(controls.temperature, GREEDY_BELOW)[:, None]  # [B, V]
    vocab = scaled.shape[-1]
    threshold = jax.lax.cond(
        jnp.any((controls.top_k > 0) | (controls.top_p < 1)),
        lambda: smallest_allowed(scaled, controls.top_k, controls.top_p),
        lambda: jnp.full(scaled.shape[:1], -jnp.inf, scaled.dtype),
    )  # [B]

    def noise(seed):
        # The generator is named: a user's default for new keys must not change answers.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    allowed = jnp.where(scaled >= threshold[:, None], scaled, -jnp.inf)  # [B, V]
    return jnp.argmax(allowed + jax.vmap(noise)(controls.seed), axis=-1).astype(jnp.int32)


def smallest_allowed(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> jax.Array:
    """float32[B]: the smallest logit within top-k and then top-p. Ties with it are allowed too."""
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)  # [B, V]
    rank = jnp.arange(ordered.shape[-1])[None]
    within_k = (rank < top_k_B[:, None]) | (top_k_B == 0)[:, None]
    likely = jax.nn.softmax(jnp.where(within_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    # The first token stays whatever rounding does to its sum.
    allowed = within_k & ((before < top_p_B[:, None]) | (rank == 0))
    return jnp.min(jnp.where(allowed, ordered, jnp.inf), axis=-1)
