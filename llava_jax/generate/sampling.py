"""How the next token is chosen: greedily, or by temperature, top-k and top-p with a seed per row.

All settings are arrays with an entry a row, so that no mixture of them compiles anew, and a row's
draw depends on its own seed and step alone: it is the same in any batch.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.errors import ConfigError
from llava_jax.generate.request import MAX_NEW_TOKENS

Array = jax.Array | np.ndarray

GREEDY_BELOW = 1e-3
"""A temperature up to this means greedy, as in the original's model_worker.py."""


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer.

    temperature: 0 is greedy. top_k: draw among the k likeliest tokens, 0 for all. top_p: draw among
    the likeliest tokens that together reach this probability. The order is temperature, top-k,
    top-p, as in transformers. seed: the lower 32 bits count. max_new_tokens counts the end token.

    Raises ConfigError for a value that means nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = MAX_NEW_TOKENS

    def __post_init__(self):
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise ConfigError("top_p is 0: no token could be chosen", fix="use temperature=0")
        _whole("top_k", self.top_k, 0)
        _whole("seed", self.seed, -(2**63))
        _whole("max_new_tokens", self.max_new_tokens, 1)
        for name in ("top_k", "seed", "max_new_tokens"):  # numpy's integers lack methods of int
            object.__setattr__(self, name, int(getattr(self, name)))


def _number(name: str, value: float, low: float, high: float) -> None:
    plain = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, not a number from {low:g} to {high:g}")


def _whole(name: str, value: int, low: int) -> None:
    plain = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not plain or not low <= value < 2**63:
        raise ConfigError(f"{name} is {value!r}, not a whole number from {low}")


class Controls(NamedTuple):
    """The settings of B rows. `budget` is the tokens a row may still give, from its first on."""

    temperature: Array  # float32[B]
    top_k: Array  # int32[B]
    top_p: Array  # float32[B]
    seed: Array  # uint32[B]
    budget: Array  # int32[B]

    @classmethod
    def of(cls, rows: Sequence[Sampling], budgets: Sequence[int]) -> Controls:
        """Rows of settings as arrays."""
        return cls(
            np.array([s.temperature for s in rows], np.float32),
            np.array([min(s.top_k, 2**31 - 1) for s in rows], np.int32),
            np.array([s.top_p for s in rows], np.float32),
            np.array([s.seed % 2**32 for s in rows], np.uint32),
            np.array(budgets, np.int32),
        )


def choose(logits_BV: Array, controls: Controls, step: Array | int) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, int32[B], and its log-probability under the model, float32[B].

    step: how many tokens the rows have given so far; a row's key is fold_in(key(seed), step).
    The log-probability is that of the untempered, uncut distribution.
    """
    greedy = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    warm = controls.temperature > GREEDY_BELOW
    drawn = jax.lax.cond(jnp.any(warm), lambda: _draw(logits_BV, controls, step), lambda: greedy)
    token = jnp.where(warm, drawn, greedy)
    chosen = jnp.take_along_axis(logits_BV, token[:, None], axis=-1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits_BV, axis=-1)


def _draw(logits_BV: Array, controls: Controls, step: Array | int) -> jax.Array:
    scaled = logits_BV / jnp.maximum(controls.temperature, GREEDY_BELOW)[:, None]
    vocab = scaled.shape[-1]
    cut = jax.lax.cond(
        jnp.any((controls.top_k > 0) | (controls.top_p < 1)),
        lambda: smallest_kept(scaled, controls.top_k, controls.top_p),
        lambda: jnp.full(scaled.shape[:1], -jnp.inf, scaled.dtype),
    )

    def noise(seed):
        # The generator is named: a user's default for new keys must not change answers.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    kept = jnp.where(scaled >= cut[:, None], scaled, -jnp.inf)
    return jnp.argmax(kept + jax.vmap(noise)(controls.seed), axis=-1).astype(jnp.int32)


def smallest_kept(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> jax.Array:
    """float32[B]: the smallest logit that top-k and then top-p keep. Ties with it are kept too."""
    ordered = jnp.sort(logits_BV, axis=-1, descending=True)
    rank = jnp.arange(ordered.shape[-1])[None]
    within_k = (rank < top_k_B[:, None]) | (top_k_B == 0)[:, None]
    likely = jax.nn.softmax(jnp.where(within_k, ordered, -jnp.inf), axis=-1)
    before = jnp.cumsum(likely, axis=-1) - likely
    # The first token stays whatever rounding does to its sum.
    kept = within_k & ((before < top_p_B[:, None]) | (rank == 0))
    return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)
