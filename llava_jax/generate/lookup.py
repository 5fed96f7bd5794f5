"""Prompt lookup: tokens guessed from what prompt and answer say already, and checked together.

Where the newest tokens of an answer stood before, what followed them is guessed to follow again; one pass over
all guesses says how many of them the model would have given itself, and gives one token more. So a greedy
answer has the tokens that it has without, in fewer passes where it copies. Source of the idea: Saxena,
"Prompt Lookup Decoding" (2023), and transformers' prompt_lookup_num_tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from llava_jax.attention.cached import Places
from llava_jax.generate.begin import ended
from llava_jax.generate.generator import STEPS
from llava_jax.generate.sampling import GREEDY_BELOW, likeliest
from llava_jax.generate.state import Given, Limits, State, everywhere
from llava_jax.sharding import BATCH, constrain

if TYPE_CHECKING:
    from llava_jax.generate.generator import Generator
    from llava_jax.generate.job import Job

LONGEST, SHORTEST = 3, 2  # tokens that must have stood before; on one alone, few guesses are right


def guessed_of(jobs: list[Job]) -> int:
    """How many tokens to guess for all of these; 0 where one of them wants more than the likeliest token."""
    counts = {job.settings.prompt_lookup for job in jobs}
    for job in jobs:
        s = job.settings
        changed = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or job.bias
        if changed or s.temperature > GREEDY_BELOW or job.constraint or job.tops_wanted:
            return 0
    return counts.pop() if len(counts) == 1 else 0


def guesses(history_NS: jax.Array, at_N: jax.Array, count: int) -> jax.Array:
    """int32[N, count]: what followed the last place where the tokens up to `at` stood before; -1: nowhere.

    history_NS: tokens by entry, -1 under images. The most of LONGEST to SHORTEST tokens counts. What would
    follow `at` itself goes on from the place: a pattern that repeats is guessed on.
    """
    places = jnp.arange(history_NS.shape[1])
    same = (history_NS >= 0) & (places < at_N[:, None])
    found = jnp.full(len(at_N), -1)
    for i in range(LONGEST):
        newest = jnp.take_along_axis(history_NS, jnp.maximum(at_N - i, 0)[:, None], axis=1)
        same &= (jnp.roll(history_NS, i, axis=1) == newest) & (places >= i)
        if i + 1 >= SHORTEST:
            last = jnp.where(same, places, -1).max(1)
            found = jnp.where(last >= 0, last, found)
    ahead = jnp.arange(count) % jnp.maximum(at_N - found, 1)[:, None]
    follow = jnp.take_along_axis(history_NS, found[:, None] + 1 + ahead, axis=1)
    return jnp.where(found[:, None] >= 0, follow, -1)


def decode(
    g: Generator, leaves, state: State, live_N, history_NS, most, enough, *, count: int
) -> tuple[State, Given]:
    """Generator.decode for greedy slots, `count` tokens being guessed in every pass; at most STEPS + count.

    history_NS: int32, tokens of each slot by entry up to the newest one, -1 under images and beyond.
    """
    g.compiled["lookup"] += 1
    model, n = g.model(leaves), len(live_N)
    rows, ahead = jnp.arange(n)[:, None], jnp.arange(count + 1)
    width = STEPS + count
    state = state._replace(alive=state.alive & live_N)
    first = state.alive

    most = jnp.minimum(most, STEPS)

    def more(carry):
        state, filled = carry[0], carry[4]
        done = (first & ~state.alive).sum()
        return (filled.max() < most) & jnp.any(state.alive) & (done < enough)

    def hopeful(carry):
        state, guess = carry[0], carry[-1]
        return jnp.any((guess[:, 0] >= 0) & state.alive)

    def on(carry, read):
        state, history, tokens, logprobs, filled, passes, guess = carry
        at = state.positions
        state, new, values, many = read(g, model, state, guess)
        real = ahead < many[:, None]  # [N, 1 + count]
        to = jnp.where(real, filled[:, None] + ahead, width)  # beyond the end: dropped
        entry = jnp.where(real, at[:, None] + 1 + ahead, history.shape[1])
        history = history.at[rows, entry].set(new, mode="drop")
        tokens = tokens.at[rows, to].set(new, mode="drop")
        logprobs = logprobs.at[rows, to].set(values, mode="drop")
        guess = guesses(history, state.positions, count)
        return state, history, tokens, logprobs, filled + many, passes + 1, guess

    def one(carry):  # not lax.cond, which copies the cache into each of its branches
        carry = jax.lax.while_loop(lambda c: more(c) & ~hopeful(c), lambda c: on(c, _single), carry)
        return jax.lax.while_loop(lambda c: more(c) & hopeful(c), lambda c: on(c, _pass), carry)

    start: Any = (
        state,
        history_NS,
        jnp.full((n, width), -1, jnp.int32),
        jnp.zeros((n, width), jnp.float32),
        jnp.zeros(n, jnp.int32),
        jnp.int32(0),
        guesses(history_NS, state.positions, count),
    )
    state, _, tokens, logprobs, filled, passes, _ = jax.lax.while_loop(more, one, start)
    return state, everywhere(Given(tokens, logprobs, None, None, None, filled.max(), passes))


def _single(g: Generator, model, state: State, guess_NK: jax.Array):
    """An ordinary step, as `_pass` gives it."""
    n, words = len(guess_NK), -(-state.counts.shape[1] // 32)
    free = Limits(jnp.zeros(n, bool), jnp.zeros((n, words), jnp.uint32))
    alive = state.alive
    state, token, logprob, *_ = g._step(model, state, free)
    pad = [(0, 0), (0, guess_NK.shape[1])]
    given = jnp.pad(token[:, None], pad), jnp.pad(logprob[:, None], pad)
    return state, *given, alive.astype(jnp.int32)


def _pass(g: Generator, model, state: State, guess_NK: jax.Array):
    """Reads the newest token of each slot and its guesses -> (state, tokens [N, 1 + K], log-probabilities,
    how many of them count, int32[N])."""
    n, k = guess_NK.shape
    keys = jax.tree.leaves(state.cache)[0].shape  # [..., J, N, K, C, H]
    capacity, ahead = keys[-5] * keys[-2], jnp.arange(k + 1)
    # As in Generator._step; guesses beyond the end of the cache are dropped, and none of them counts.
    write_at = jnp.where(state.alive, state.positions, capacity - 1)
    seen = jnp.where(state.alive, state.positions, 0)[:, None] + ahead  # [N, 1 + K]
    seen = jnp.minimum(seen, capacity - 1)
    tokens = jnp.concatenate([state.token[:, None], jnp.maximum(guess_NK, 0)], 1)
    hidden, cache = model.language(
        constrain(model.language.embed(tokens, g.compute.dtype), BATCH),
        seen + state.ahead[:, None],
        cache=state.cache,
        entries_BT=seen,
        places=Places(None, write_at, seen.max() // g.block + 1),
        adapter_B=g._through(state.controls),
    )
    logits = model.logits(hidden).reshape(n * (k + 1), -1)
    chosen = likeliest(logits)
    logprob = jnp.take_along_axis(logits, chosen[:, None], 1)[:, 0] - jax.nn.logsumexp(logits, -1)
    chosen, logprob = (x.reshape(n, k + 1) for x in (chosen, logprob))
    right = jnp.cumprod(chosen[:, :-1] == guess_NK, axis=1).sum(1)
    ends = jnp.isin(chosen, jnp.asarray(g.eos_ids))
    end = jnp.where(ends, ahead, k).min(1)
    many = jnp.minimum(jnp.minimum(right, end) + 1, state.controls.budget - state.step)
    many = jnp.where(state.alive, many, 0)
    last = jnp.take_along_axis(chosen, jnp.maximum(many - 1, 0)[:, None], 1)[:, 0]
    step = state.step + many
    state = state._replace(
        cache=g._sharded(cache),
        positions=state.positions + many,
        token=jnp.where(state.alive, last, state.token),
        alive=state.alive & ~ended(last, step, state.controls, g.eos_ids),
        step=step,
    )
    return state, chosen, logprob, many
