"""Prefill and decode over a KV cache, compiled once per bucket of shapes.

Prompts of different lengths share a batch: they are padded on the right to a common length T, and
the keys of the n-th generated token of every row go to cache entry T + n, whatever the row's own
length. Each entry remembers its RoPE position, so masks and sliding windows know nothing of padding:

    row 0   a b c d | x y      positions  0 1 2 3 | 4 5
    row 1   a b . . | x y                 0 1 - - | 2 3

A row therefore gets the tokens it would get alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.errors import PromptError
from llava_jax.generate import weights
from llava_jax.generate.layout import (
    Prompt,
    Rows,
    check,
    lay_out,
    length_bucket,
    room_bucket,
)
from llava_jax.generate.sampling import Controls, Sampling, choose
from llava_jax.layers import Compute
from llava_jax.llama import KVCache, causal_mask, init_cache
from llava_jax.llava import Llava
from llava_jax.sharding import BATCH, batch_sharding, constrain
from llava_jax.text.constants import IMAGE_TOKEN

CHUNK = 32
"""Tokens a compiled decode call gives at most."""

_FIRST_ROOM = 128  # cache entries for new tokens at the start; doubled when they are used up

Stop = Callable[[int, list[int]], int | None]
"""(row, its ids so far) -> how many of them to keep if the row ends here, else None."""


class State(NamedTuple):
    """What lives on the device between calls. S is the length of the cache."""

    cache: KVCache
    key_positions: (
        jax.Array
    )  # int32[B, S], RoPE position of each cache entry, -1 where there is none
    positions: jax.Array  # int32[B], where `token` stands
    token: jax.Array  # int32[B], the last chosen token: not in the cache yet
    done: jax.Array  # bool[B]
    step: jax.Array  # int32[], tokens chosen so far
    slot: jax.Array  # int32[], the cache entry that takes the next key


class Chosen(NamedTuple):
    """Tokens of one call: n is 1 for a prefill, and `count` of the n are real for a decode."""

    tokens: jax.Array  # int32[B, n], -1 in rows that were done
    logprobs: jax.Array  # float32[B, n]
    logits: jax.Array | None  # float32[B, n, V] if asked for
    count: jax.Array  # int32[]


@dataclass(frozen=True, eq=False)
class Output:
    """One row's answer.

    ids: the new tokens, the end token included. finish_reason: "stop" (end token, or the caller's
    `stop`) or "length" (max_new_tokens, or the context is full). logprobs: of each id.
    logits: float32[len(ids), V], if asked for. prompt_positions: length of the prompt, images spliced.
    """

    ids: tuple[int, ...]
    finish_reason: str
    prompt_positions: int
    logprobs: tuple[float, ...]
    logits: np.ndarray | None = None


class Generator:
    """A model that answers batches of prompts.

    config, params: the model, parameters flat and stacked as in llava_jax.llava.
    compute: dtype of activations and cache; by default that of the parameters.
    mesh: parameters lie as llava.param_shardings says, rows over data and fsdp.
    unroll: decoder layers one by one instead of a scan; by default on CPU only.
    consume: empties `params` on the way, so that a large model is never held twice.
    eos_ids: tokens that end an answer; by default the config's.

    `compiled` counts compilations by kind; within a bucket nothing is compiled twice.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: Mapping[str, Any],
        *,
        compute: Compute | None = None,
        mesh: Mesh | None = None,
        unroll: bool | None = None,
        consume: bool = False,
        eos_ids: Sequence[int] | None = None,
    ):
        if compute is None:
            compute = Compute(dtype=jnp.dtype(params["language.embed.embedding"].dtype))
        self.config, self.compute, self.mesh = config, compute, mesh
        self.eos_ids = tuple(eos_ids or (config.language.eos_id,))
        self.unrolled = _platform(mesh) == "cpu" if unroll is None else unroll
        self.graphdef, self.state = weights.load(
            config, params, compute, mesh=mesh, unrolled=self.unrolled, consume=consume
        )
        # A list of leaves is flattened in C++ at every call; a State would be in Python.
        self._leaves, self._treedef = jax.tree.flatten(self.state)
        self._rows = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.compiled: Counter[str] = Counter()
        jit = jax.jit
        self._prefill = jit(self._prefill_fn, static_argnames=("capacity", "keep_logits"))
        self._extend = jit(
            self._extend_fn, static_argnames=("keep_logits",), donate_argnames=("state",)
        )
        self._decode = jit(
            self._decode_fn, static_argnames=("keep_logits",), donate_argnames=("state",)
        )
        self._grow = jit(self._grow_fn, static_argnames=("capacity",))

    # On the host ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  frozen
        *,
        stop: Stop | None = None,
        keep_logits: bool = False,
    ) -> list[Output]:
        """Answers the prompts as one batch, in order. See `start` for errors."""
        decoding = self.start(prompts, sampling, keep_logits=keep_logits)
        while True:
            decoding.apply(stop)
            if not decoding.running:
                return decoding.outputs()
            decoding.advance()

    def start(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008  frozen
        *,
        keep_logits: bool = False,
        after: Decoding | None = None,
    ) -> Decoding:
        """Reads the prompts and chooses each one's first token.

        after: a Decoding of one prompt whose cache is taken over as far as its tokens and images
        are a prefix of the new prompt's; it cannot be used any more.
        Raises PromptError when a prompt is malformed or leaves no room for an answer.
        """
        if not prompts:
            raise PromptError("there are no prompts")
        settings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if len(settings) != len(prompts):
            raise PromptError(f"{len(settings)} sampling settings for {len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            name = "the prompt" if len(prompts) == 1 else f"prompt {i} of the batch"
            check(prompt, self.config, name)
        if after is not None and len(prompts) == 1 and after.state is not None:
            reuse = _reusable(after, prompts[0], self.config)
            if reuse is not None:
                return Decoding(self, prompts, settings, keep_logits, after, reuse)
        return Decoding(self, prompts, settings, keep_logits)

    def params(self):
        """Yields (name, array) of the flat stacked parameters, decoder layers stacked on the host."""
        return weights.stacked(self.state)

    def _put(self, tree: Any) -> Any:
        """Arrays with a leading batch axis -> arrays on the devices."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, batch_sharding(self.mesh))

    def _scope(self):
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    # On the device -------------------------------------------------------------------------------

    def _model(self, leaves: list[jax.Array]) -> Llava:
        return nnx.merge(self.graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _prefill_fn(self, leaves, rows: Rows, controls: Controls, *, capacity, keep_logits):
        """Reads whole prompts into a new cache of `capacity` entries."""
        self.compiled["prefill"] += 1
        model = self._model(leaves)
        b, t = rows.tokens.shape
        at = jnp.broadcast_to(jnp.arange(t), (b, t))
        real = at < rows.lengths[:, None]
        cache = self._sharded(
            init_cache(self.config.language, b, capacity, self.compute.dtype, self.unrolled)
        )
        hidden, cache = model.language(
            constrain(model.embed(rows.tokens, rows.slots, rows.images), BATCH),
            at,
            causal_mask(real.astype(jnp.int32)),
            cache,
        )
        key_positions = jnp.pad(
            jnp.where(real, at, -1), ((0, 0), (0, capacity - t)), constant_values=-1
        )
        return self._first(
            model, hidden, rows, controls, cache, key_positions, rows.lengths, t, keep_logits
        )

    def _extend_fn(
        self, leaves, rows: Rows, controls: Controls, state: State, start_B, *, keep_logits
    ):
        """Reads more tokens behind the cached ones before position `start_B`, dropping the others."""
        self.compiled["extend"] += 1
        model = self._model(leaves)
        b, t = rows.tokens.shape
        at = jnp.broadcast_to(jnp.arange(t), (b, t))
        positions = start_B[:, None] + at
        kept = jnp.where(state.key_positions < start_B[:, None], state.key_positions, -1)
        key_positions = jax.lax.dynamic_update_slice_in_dim(
            kept, jnp.where(at < rows.lengths[:, None], positions, -1), state.slot, axis=1
        )
        hidden, cache = model.language(
            constrain(model.embed(rows.tokens, rows.slots, rows.images), BATCH),
            positions,
            visible(positions, key_positions),
            state.cache,
            write_at=state.slot,
            key_positions_BS=key_positions,
        )
        length = start_B + rows.lengths
        return self._first(
            model, hidden, rows, controls, cache, key_positions, length, state.slot + t, keep_logits
        )

    def _first(
        self, model, hidden, rows, controls, cache, key_positions, lengths, slot, keep_logits
    ):
        """Chooses the first token from the last real position of each row."""
        last = hidden[jnp.arange(len(hidden)), rows.lengths - 1]
        logits = model.logits(last)
        step = jnp.zeros((), jnp.int32)
        token, logprob = choose(logits, controls, step)
        state = State(
            self._sharded(cache),
            key_positions,
            lengths,
            token,
            self._ended(token, step + 1, controls),
            step + 1,
            jnp.asarray(slot, jnp.int32),
        )
        kept = logits[:, None] if keep_logits else None
        return state, self._gathered(Chosen(token[:, None], logprob[:, None], kept, step + 1))

    def _decode_fn(
        self, leaves, state: State, controls: Controls, stopped_B, limit, *, keep_logits
    ):
        """Gives up to `limit` (at most CHUNK) further tokens; ends early when every row is done."""
        self.compiled["decode"] += 1
        model = self._model(leaves)
        b = len(state.token)
        vocab = self.config.language.vocab_size
        out = Chosen(
            jnp.full((b, CHUNK), -1, jnp.int32),
            jnp.zeros((b, CHUNK), jnp.float32),
            jnp.zeros((b, CHUNK, vocab), jnp.float32) if keep_logits else None,
            jnp.zeros((), jnp.int32),
        )

        def more(carry):
            state, out = carry
            return (out.count < limit) & ~jnp.all(state.done)

        def one(carry):
            state, out = carry
            done = state.done
            state, logprob, logits = self._step(model, state, controls)
            i = out.count
            tokens = out.tokens.at[:, i].set(jnp.where(done, -1, state.token))
            kept = out.logits.at[:, i].set(logits) if keep_logits else None
            return state, Chosen(tokens, out.logprobs.at[:, i].set(logprob), kept, i + 1)

        state = state._replace(done=state.done | stopped_B)
        state, out = jax.lax.while_loop(more, one, (state, out))
        return state, self._gathered(out)

    def _step(self, model: Llava, state: State, controls: Controls):
        """Reads the last chosen token of each row and chooses the next."""
        at = state.positions[:, None]
        key_positions = jax.lax.dynamic_update_slice_in_dim(
            state.key_positions, at, state.slot, axis=1
        )
        hidden, cache = model.language(
            model.language.embed(state.token[:, None], self.compute.dtype),
            at,
            visible(at, key_positions),
            state.cache,
            write_at=state.slot,
            key_positions_BS=key_positions,
        )
        logits = model.logits(hidden[:, 0])
        token, logprob = choose(logits, controls, state.step)
        step = state.step + 1
        done = state.done | self._ended(token, step, controls)
        state = State(cache, key_positions, state.positions + 1, token, done, step, state.slot + 1)
        return state, logprob, logits

    def _ended(self, token_B, step, controls: Controls):
        return jnp.isin(token_B, jnp.asarray(self.eos_ids)) | (step >= controls.budget)

    def _grow_fn(self, state: State, *, capacity: int) -> State:
        """The same state with a cache of `capacity` entries."""
        self.compiled["grow"] += 1
        more = capacity - state.key_positions.shape[1]

        def pad(x):
            return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, more), (0, 0)])

        cache = self._sharded(jax.tree.map(pad, state.cache))
        keys = jnp.pad(state.key_positions, ((0, 0), (0, more)), constant_values=-1)
        return state._replace(cache=cache, key_positions=keys)

    def _sharded(self, cache: KVCache) -> KVCache:
        """Rows over data and fsdp, KV heads over tensor where they divide."""
        if self.mesh is None:
            return cache
        heads = self.config.language.kv_heads % self.mesh.shape["tensor"] == 0
        axes = (*BATCH, "tensor" if heads else None)
        partition = P(*axes) if self.unrolled else P(None, *axes)
        return jax.tree.map(lambda x: constrain(x, partition), cache)

    def _gathered(self, chosen: Chosen) -> Chosen:
        """A copy on every device, so that every process can read it."""
        return jax.tree.map(lambda x: constrain(x, P()), chosen)


class Decoding:
    """A batch being answered: `ids` grow with every `advance`. Made by Generator.start.

    ids, logprobs: a list a row. done: bool[B]. All rows end by an end token, their budget or `end`.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Prompt],
        settings: Sequence[Sampling],
        keep_logits: bool,
        after: Decoding | None = None,
        reuse: tuple[int, int] | None = None,
    ):
        self.generator, self.prompts, self.keep_logits = generator, tuple(prompts), keep_logits
        config = generator.config
        self.lengths = [p.positions(config) for p in prompts]
        limit = config.language.max_positions
        self.budgets = [min(s.max_new_tokens, limit - n) for s, n in zip(settings, self.lengths)]
        n = len(prompts)
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[float]] = [[] for _ in range(n)]
        self.logits: list[list[np.ndarray]] = [[] for _ in range(n)]
        self.done = np.zeros(n, bool)
        self._stopped = np.zeros(n, bool)  # ended by the caller
        self._settings = list(settings)
        self.state: State | None = None
        self.cached: list[int] = []  # of a single prompt: the ids whose keys the cache holds
        if after is None or reuse is None:
            self._read(prompts)
        else:
            self._read_rest(after, *reuse)

    @property
    def running(self) -> bool:
        """Whether some row is not done."""
        return not self.done.all()

    def _read(self, prompts: Sequence[Prompt]) -> None:
        g = self.generator
        rows = lay_out(prompts, g.config, g._rows)
        self._pad_controls(len(rows.lengths))
        self._base = rows.tokens.shape[1]
        room = room_bucket(min(max(self.budgets), _FIRST_ROOM))
        with g._scope():
            self.state, chosen = g._prefill(
                g._leaves,
                g._put(rows),
                self._controls,
                capacity=self._base + room,
                keep_logits=self.keep_logits,
            )
        self._slot = self._base
        self._take(chosen, [p.ids.tolist() for p in prompts])

    def _read_rest(self, after: Decoding, shared: int, start: int) -> None:
        """Reads prompt.ids[shared:], whose first token stands at position `start`."""
        g, prompt = self.generator, self.prompts[0]
        seen = int((prompt.ids[:shared] == IMAGE_TOKEN).sum())
        rows = lay_out([Prompt(prompt.ids[shared:], prompt.images[seen:])], g.config, g._rows)
        b, t = rows.tokens.shape
        self._pad_controls(b)
        self.state, after.state = after.state, None
        self._slot = after._slot + t
        self._base = length_bucket(self._slot)
        room = room_bucket(min(max(self.budgets), _FIRST_ROOM))
        with g._scope():
            if self._base + room > self._capacity():
                self.state = g._grow(self.state, capacity=self._base + room)
            self.state, chosen = g._extend(
                g._leaves,
                g._put(rows),
                self._controls,
                self.state,
                g._put(np.full(b, start, np.int32)),
                keep_logits=self.keep_logits,
            )
        self._take(chosen, [prompt.ids.tolist()])

    def _pad_controls(self, rows: int) -> None:
        spare = rows - len(self.prompts)
        settings = self._settings + [Sampling(max_new_tokens=1)] * spare
        self._controls = self.generator._put(Controls.of(settings, self.budgets + [1] * spare))

    def _capacity(self) -> int:
        return 0 if self.state is None else self.state.key_positions.shape[1]

    def advance(self, most: int = CHUNK) -> list[list[int]]:
        """Up to `most` (and CHUNK) further tokens a row; returns the new ids of each row."""
        if not self.running:
            return [[] for _ in self.prompts]
        g = self.generator
        left = max(b - len(i) for b, i, d in zip(self.budgets, self.ids, self.done) if not d)
        count = max(1, min(most, CHUNK, left))
        stopped = np.ones(len(self._controls.budget), bool)
        stopped[: len(self.prompts)] = self._stopped
        with g._scope():
            if self._slot + count > self._capacity():
                room = room_bucket(self._slot + count - self._base)
                self.state = g._grow(self.state, capacity=self._base + room)
            self.state, chosen = g._decode(
                g._leaves,
                self.state,
                self._controls,
                g._put(stopped),
                np.int32(count),
                keep_logits=self.keep_logits,
            )
        before = [len(ids) for ids in self.ids]
        self._take(chosen, None)
        return [ids[n:] for ids, n in zip(self.ids, before)]

    def _take(self, chosen: Chosen, prompt_ids: list[list[int]] | None) -> None:
        """Adds the tokens of one call to the rows."""
        tokens, logprobs, logits, count = (None if x is None else np.asarray(x) for x in chosen)
        if len(self.prompts) == 1:
            last = self.ids[0][-1:]
            self.cached += prompt_ids[0] if prompt_ids else last + tokens[0, : count - 1].tolist()
        if prompt_ids is None:
            self._slot += int(count)
        for row in np.flatnonzero(~self.done):
            new = tokens[row, : int(count)]
            new = new[new >= 0]
            self.ids[row] += new.tolist()
            self.logprobs[row] += logprobs[row, : len(new)].tolist()
            if logits is not None:
                self.logits[row] += list(logits[row, : len(new)])
            ended = self.ids[row][-1:] and self.ids[row][-1] in self.generator.eos_ids
            self.done[row] = ended or len(self.ids[row]) >= self.budgets[row]

    def apply(self, stop: Stop | None) -> None:
        """Asks `stop` about every running row, and about those that the last call ended."""
        if stop is None:
            return
        for row in range(len(self.prompts)):
            keep = None if self._stopped[row] else stop(row, self.ids[row])
            if keep is not None:
                self.end(row, keep)

    def end(self, row: int, keep: int | None = None) -> None:
        """Ends a row, with its first `keep` ids if given. The other rows go on as before."""
        self._stopped[row] = self.done[row] = True
        if keep is not None:
            for kept in (self.ids, self.logprobs, self.logits):
                del kept[row][keep:]

    def outputs(self) -> list[Output]:
        """The rows as they stand."""
        return [self._output(row) for row in range(len(self.prompts))]

    def _output(self, row: int) -> Output:
        ids = self.ids[row]
        stop = self._stopped[row] or (ids and ids[-1] in self.generator.eos_ids)
        logits = np.stack(self.logits[row]) if self.keep_logits and ids else None
        return Output(
            tuple(ids),
            "stop" if stop else "length",
            self.lengths[row],
            tuple(self.logprobs[row]),
            logits,
        )


def visible(positions_BT: jax.Array, key_positions_BS: jax.Array) -> jax.Array:
    """bool[B, T, S]: a query sees the cached keys up to its own position."""
    keys = key_positions_BS[:, None, :]
    return (keys >= 0) & (keys <= positions_BT[:, :, None])


def _reusable(after: Decoding, prompt: Prompt, config: LlavaConfig) -> tuple[int, int] | None:
    """(ids of `prompt` that the cache holds, the position behind them), or None if not worth it."""
    images = iter(range(len(prompt.images)))
    shared = start = 0
    # The last id is always read: its logits give the first token.
    for old, new in zip(after.cached, prompt.ids[:-1].tolist()):
        if old != new:
            break
        if new == IMAGE_TOKEN:
            i = next(images)
            if not np.array_equal(after.prompts[0].images[i], prompt.images[i]):
                break
        shared += 1
        start += config.image_tokens if new == IMAGE_TOKEN else 1
    rest = prompt.positions(config) - start
    used = after._slot + length_bucket(rest)
    # Entries of dropped tokens stay in the cache: read anew before they are half of it.
    if start < rest or used > 2 * length_bucket(prompt.positions(config)):
        return None
    return shared, start


def _platform(mesh: Mesh | None) -> str:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform
