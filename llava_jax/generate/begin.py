"""How an answer begins: the first token of each prompt that ends in a chunk.

A program of its own. Within the one that reads, which is compiled for each length of a chunk, it took half of
a tiny model's time to compile; it knows neither cache nor weights, so that models of one vocabulary share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.generate.sampling import Controls, Said, alternatives, choose_token
from llava_jax.generate.state import Chunk, Given, Limits, State, everywhere


@partial(jax.jit, static_argnames=("eos_ids", "keep_logits"), donate_argnames=("state",))
def first_tokens(
    state: State,
    logits_BV: jax.Array,
    chunk: Chunk,
    controls: Controls,
    limits: Limits,
    *,
    eos_ids: tuple[int, ...],
    keep_logits: bool,
) -> tuple[State, Given]:
    """The first tokens of the prompts that end in a chunk, whose slots come alive.

    state: without cache, features and stands. chunk: without tokens, places and positions.
    """
    b, vocab = logits_BV.shape
    slots, zero = chunk.slots, jnp.zeros((b, vocab), jnp.int32)
    said = Said(zero[:, 0], zero, state.asked[slots], state.bias[slots], *limits)
    token, logprob = choose_token(logits_BV, controls, said)  # [B]
    tops = alternatives(logits_BV, controls.tops)
    to = jnp.where(chunk.last, slots, len(state.token))  # beyond the end: dropped

    def put(old, new):
        return old.at[to].set(new, mode="drop")

    state = state._replace(
        positions=put(state.positions, chunk.start + chunk.length),
        token=put(state.token, token),
        alive=put(state.alive, ~ended(token, 1, controls, eos_ids)),
        ahead=put(state.ahead, chunk.ahead),
        step=put(state.step, 1),
        controls=jax.tree.map(put, state.controls, controls),
        counts=put(state.counts, zero.at[jnp.arange(b), token].set(1)),
    )
    one: Any = (token, logprob, *tops, logits_BV if keep_logits else None)
    given = Given(*[None if x is None else x[:, None] for x in one], count=jnp.int32(1))
    return state, everywhere(given)


def ended(token_B: jax.Array, step_B: Any, controls: Controls, eos_ids: Sequence[int]) -> jax.Array:
    """bool[B]: whether these were the last tokens of their answers, after `step` of them."""
    return jnp.isin(token_B, jnp.asarray(eos_ids)) | (step_B >= controls.budget)
