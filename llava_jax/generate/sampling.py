"""How the next token is chosen: greedily, or by temperature, top-k, top-p and min-p with a seed per row.

All settings are arrays with one entry per row, so that no mixture of them is compiled again, and a row's
choice depends on its own logits, settings, seed and step alone: it is the same among any neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.settings import SamplingSettings

Array = Any  # of jax, or of numpy on its way there

GREEDY_BELOW = 1e-3
"""A temperature up to this means greedy, as in the original's model_worker.py."""

_HEAD = 256  # likeliest tokens that are looked at before the whole vocabulary is sorted

TOPS = 20
"""Most alternatives of which log-probabilities are given: OpenAI's limit."""


class Controls(NamedTuple):
    """The settings of B rows. `budget` is the tokens a row may still give, from its first on.

    biased: whether `bias` of Said counts for the row. tops: alternatives that are asked for.
    adapter: the one that the row goes through, from 1 on; 0: none.
    """

    temperature: Array  # float32[B]
    top_p: Array  # float32[B]
    min_p: Array  # float32[B]
    repetition: Array  # float32[B], 1: none
    presence: Array  # float32[B], 0: none
    frequency: Array  # float32[B], 0: none
    top_k: Array  # int32[B], 0: all
    seed: Array  # uint32[B]
    budget: Array  # int32[B]
    biased: Array  # bool[B]
    tops: Array  # int32[B]
    adapter: Array  # int32[B]

    @classmethod
    def rows(cls, count: int) -> Controls:
        """Arrays for `count` rows, of greedy ones."""
        one = cls.of(SamplingSettings(), 1)
        return cls(*(np.repeat(np.asarray(value)[None], count) for value in one))

    @classmethod
    def of(
        cls,
        s: SamplingSettings,
        budget: int,
        bias: Mapping[int, float] | None = None,
        tops: int = 0,
        adapter: int = 0,
    ) -> Controls:
        """The scalars of one row. The lower 32 bits of a seed count; None is 0."""
        return cls(
            np.float32(s.temperature),
            np.float32(s.top_p),
            np.float32(s.min_p),
            np.float32(s.repetition_penalty),
            np.float32(s.presence_penalty),
            np.float32(s.frequency_penalty),
            np.int32(min(s.top_k, 2**31 - 1)),
            np.uint32(int(s.seed or 0) % 2**32),
            np.int32(budget),
            np.bool_(bias),
            np.int32(tops),
            np.int32(adapter),
        )

    @property
    def penalised(self) -> Any:
        """bool[B]: whether what was said before changes the row's choice."""
        return (self.repetition != 1) | (self.presence != 0) | (self.frequency != 0)


class Said(NamedTuple):
    """What the choices of B rows take besides logits and settings; V tokens.

    allowed: of constrained answers, a bit for each token.
    """

    step: Array  # int32[B]: tokens given so far
    counts: Array  # int32[B, V]: how often each token was given
    asked: Array  # bool[B, V]: whether the prompt has it
    bias: Array  # float32[B, V]
    constrained: Array  # bool[B]
    allowed: Array  # uint32[B, ceil(V / 32)]


def choose_token(logits_BV: Array, controls: Controls, said: Said) -> tuple[jax.Array, jax.Array]:
    """The next token of each row, int32[B], and its log-probability under the model, float32[B].

    The order is penalties, bias, constraint, temperature, top-k, top-p, min-p, as in transformers.
    A row's key is fold_in(key(seed), step).
    The log-probability is that of the model's own distribution, before all of these.
    """
    warm = controls.temperature > GREEDY_BELOW
    changed = controls.penalised | controls.biased | said.constrained

    def choose() -> jax.Array:
        logits = jax.lax.cond(
            jnp.any(changed), lambda: _changed(logits_BV, controls, said), lambda: logits_BV
        )
        greedy = likeliest(logits)
        drawn = jax.lax.cond(
            jnp.any(warm), lambda: _draw(logits, controls, said.step), lambda: greedy
        )
        return jnp.where(warm, drawn, greedy)

    token = jax.lax.cond(jnp.any(warm | changed), choose, lambda: likeliest(logits_BV))
    logit = jnp.take_along_axis(logits_BV, token[:, None], axis=-1)[:, 0]  # [B]
    return token, logit - jax.nn.logsumexp(logits_BV, axis=-1)


def likeliest(logits_BV: Array) -> jax.Array:
    """argmax, int32[B]: the first of the largest (the last token where one is NaN).

    XLA's own argmax carries a pair through its reduction, which no CPU vectorises: 4 times slower.
    """
    vocab = logits_BV.shape[-1]
    largest = logits_BV.max(-1, keepdims=True)
    places = jnp.where(logits_BV == largest, jnp.arange(vocab, dtype=jnp.int32), vocab)
    return jnp.minimum(places.min(-1), vocab - 1)


def alternatives(logits_BV: Array, tops_B: Array) -> tuple[jax.Array, jax.Array]:
    """The TOPS likeliest tokens, int32[B, TOPS], and log-probabilities, float32; zeros if none asks."""
    count = min(TOPS, logits_BV.shape[-1])
    shape = (len(logits_BV), TOPS)

    def best() -> tuple[jax.Array, jax.Array]:
        found, ids = jax.lax.top_k(logits_BV, count)
        found = found - jax.nn.logsumexp(logits_BV, axis=-1)[:, None]
        pad = [(0, 0), (0, TOPS - count)]
        return jnp.pad(ids.astype(jnp.int32), pad), jnp.pad(found, pad)

    return jax.lax.cond(
        jnp.any(tops_B > 0), best, lambda: (jnp.zeros(shape, jnp.int32), jnp.zeros(shape))
    )


def _changed(logits_BV: Array, c: Controls, said: Said) -> jax.Array:
    """The logits after penalties, bias and constraint; a row without them keeps its bits."""
    seen = said.asked | (said.counts > 0)
    factor = c.repetition[:, None]
    repeated = jnp.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
    out = jnp.where(seen, repeated, logits_BV)
    out = out - c.frequency[:, None] * said.counts
    out = out - jnp.where(said.counts > 0, c.presence[:, None], 0)
    out = jnp.where(jnp.asarray(c.penalised)[:, None], out, logits_BV)
    out = jnp.where(c.biased[:, None], out + said.bias, out)
    vocab = jnp.arange(logits_BV.shape[-1])
    bits = said.allowed[:, vocab // 32] >> (vocab % 32).astype(jnp.uint32) & 1  # [B, V]
    return jnp.where(said.constrained[:, None] & (bits == 0), -jnp.inf, out)


def _draw(logits_BV: Array, controls: Controls, step_B: Array) -> jax.Array:
    scaled = logits_BV / jnp.maximum(controls.temperature, GREEDY_BELOW)[:, None]  # [B, V]
    vocab = scaled.shape[-1]
    threshold = jax.lax.cond(
        jnp.any((controls.top_k > 0) | (controls.top_p < 1)),
        lambda: smallest_allowed(scaled, controls.top_k, controls.top_p),
        lambda: jnp.full(scaled.shape[:1], -jnp.inf, scaled.dtype),
    )  # [B]
    # log(0) is -inf: all are allowed
    likely = scaled.max(-1) + jnp.log(controls.min_p)  # [B]
    threshold = jnp.maximum(threshold, likely)

    def noise(seed, step):
        # The generator is named: a user's default for new keys must not change answers.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return jax.random.gumbel(key, (vocab,), jnp.float32)

    allowed = jnp.where(scaled >= threshold[:, None], scaled, -jnp.inf)  # [B, V]
    return jnp.argmax(allowed + jax.vmap(noise)(controls.seed, step_B), axis=-1).astype(jnp.int32)


def smallest_allowed(logits_BV: Array, top_k_B: Array, top_p_B: Array) -> jax.Array:
    """float32[B]: the smallest logit within top-k and then top-p. Ties with it are allowed too."""
    free = (top_k_B == 0) & (top_p_B >= 1)  # keeps all, whatever the neighbours ask for
    best = jax.lax.top_k(logits_BV, min(_HEAD, logits_BV.shape[-1]))[0]
    kept, reached = _last_of(best, logits_BV, top_k_B, top_p_B)

    def sort_all() -> jax.Array:  # 40 times the work, for a nearly flat distribution alone
        ordered = jnp.sort(logits_BV, axis=-1, descending=True)
        return jnp.where(reached, kept, _last_of(ordered, logits_BV, top_k_B, top_p_B)[0])

    kept = jax.lax.cond(jnp.all(reached | free), lambda: kept, sort_all)
    return jnp.where(free, -jnp.inf, kept)


def _last_of(
    ordered_BR: jax.Array, logits_BV: Array, top_k_B: Array, top_p_B: Array
) -> tuple[jax.Array, jax.Array]:
    """(the smallest allowed of the R largest logits, whether no smaller one is allowed), [B] both."""
    rank = jnp.arange(ordered_BR.shape[-1])[None]
    within_k = (rank < top_k_B[:, None]) | (top_k_B == 0)[:, None]
    # Not ordered_BR[:, :1]: XLA would sort the whole vocabulary where a top-k's result is cut again.
    most = logits_BV.max(-1, keepdims=True)  # [B, 1]
    shares = jnp.where(within_k, jnp.exp(ordered_BR - most), 0)  # [B, R]
    whole = jnp.exp(logits_BV - most).sum(-1)  # of all tokens, where there is no top-k
    likely = shares / jnp.where(top_k_B > 0, shares.sum(-1), whole)[:, None]
    summed = jnp.cumsum(likely, axis=-1)
    # The first token stays whatever rounding does to its sum.
    allowed = within_k & ((summed - likely < top_p_B[:, None]) | (rank == 0))
    kept = jnp.min(jnp.where(allowed, ordered_BR, jnp.inf), axis=-1)
    reached = jnp.where(top_k_B > 0, top_k_B <= ordered_BR.shape[-1], summed[:, -1] >= top_p_B)
    return kept, reached
