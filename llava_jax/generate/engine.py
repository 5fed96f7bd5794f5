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
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llava_jax.batch import check_prompt
from llava_jax.config import LlavaConfig
from llava_jax.errors import PromptError
from llava_jax.generate import weights
from llava_jax.generate.decoding import CHUNK, Chosen, Decoding, Output, State, Stop, reusable
from llava_jax.generate.sampling import Controls, Sampling, choose
from llava_jax.layers import Compute
from llava_jax.llama import KVCache, causal_mask, init_cache
from llava_jax.llava import Llava
from llava_jax.sharding import BATCH, batch_sharding, constrain
from llava_jax.text.example import Example


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
        self.eos_ids = tuple(eos_ids or config.language.eos_ids)
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
        prompts: Sequence[Example],
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
        prompts: Sequence[Example],
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
            self.check(prompt, "the prompt" if len(prompts) == 1 else f"prompt {i} of the batch")
        reuse = None
        if after is not None and len(prompts) == 1 and after.state is not None:
            reuse = reusable(after, prompts[0], self.config)
        return Decoding(self, prompts, settings, keep_logits, after, reuse)

    def check(self, prompt: Example, name: str = "the prompt") -> None:
        """Raises PromptError, with `name` in it, for a prompt that `start` would refuse."""
        check_prompt(prompt, self.config, name)

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

    def _prefill_fn(self, leaves, rows, controls: Controls, *, capacity, keep_logits):
        """Reads whole prompts into a new cache of `capacity` entries."""
        self.compiled["prefill"] += 1
        model = self._model(leaves)
        b, t = rows["tokens"].shape
        at = jnp.broadcast_to(jnp.arange(t), (b, t))
        lengths = _lengths(rows)
        real = at < lengths[:, None]
        cache = self._sharded(
            init_cache(self.config.language, b, capacity, self.compute.dtype, self.unrolled)
        )
        hidden, cache = model.language(
            constrain(model.embed(rows["tokens"], rows["slots"], rows["images"]), BATCH),
            at,
            causal_mask(real.astype(jnp.int32)),
            cache,
        )
        key_positions = jnp.pad(
            jnp.where(real, at, -1), ((0, 0), (0, capacity - t)), constant_values=-1
        )
        return self._first(
            model, hidden, lengths - 1, controls, cache, key_positions, lengths, t, keep_logits
        )

    def _extend_fn(self, leaves, rows, controls: Controls, state: State, start_B, *, keep_logits):
        """Reads more tokens behind the cached ones before position `start_B`, dropping the others."""
        self.compiled["extend"] += 1
        model = self._model(leaves)
        b, t = rows["tokens"].shape
        at = jnp.broadcast_to(jnp.arange(t), (b, t))
        lengths = _lengths(rows)
        positions = start_B[:, None] + at
        kept = jnp.where(state.key_positions < start_B[:, None], state.key_positions, -1)
        key_positions = jax.lax.dynamic_update_slice_in_dim(
            kept, jnp.where(at < lengths[:, None], positions, -1), state.slot, axis=1
        )
        hidden, cache = model.language(
            constrain(model.embed(rows["tokens"], rows["slots"], rows["images"]), BATCH),
            positions,
            visible(positions, key_positions),
            state.cache,
            write_at=state.slot,
            key_positions_BS=key_positions,
        )
        return self._first(
            model,
            hidden,
            lengths - 1,
            controls,
            cache,
            key_positions,
            start_B + lengths,
            state.slot + t,
            keep_logits,
        )

    def _first(
        self, model, hidden, last_B, controls, cache, key_positions, lengths, slot, keep_logits
    ):
        """Chooses the first token from the last real position of each row."""
        logits = model.logits(hidden[jnp.arange(len(hidden)), last_B])
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
        cache: Any  # never None: a cache goes in
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


def _lengths(rows: Mapping[str, jax.Array]) -> jax.Array:
    """int32[B]: the real positions of each row; 1 in an empty row, so that no softmax is of nothing."""
    return jnp.maximum((rows["segments"] > 0).sum(1, dtype=jnp.int32), 1)


def visible(positions_BT: jax.Array, key_positions_BS: jax.Array) -> jax.Array:
    """bool[B, T, S]: a query sees the cached keys up to its own position."""
    keys = key_positions_BS[:, None, :]
    return (keys >= 0) & (keys <= positions_BT[:, :, None])


def _platform(mesh: Mesh | None) -> str:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform
