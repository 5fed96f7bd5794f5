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

from llava_jax.attention import Need, choose
from llava_jax.batch import check_prompt
from llava_jax.config import LlavaConfig
from llava_jax.errors import PromptError
from llava_jax.generate import weights
from llava_jax.generate.decoding import CHUNK, Decoding, Output, State, StepOutput
from llava_jax.generate.sampling import Controls, choose_token
from llava_jax.layers import Compute
from llava_jax.llama import KVCache, init_cache
from llava_jax.llava import Llava
from llava_jax.settings import SamplingSettings
from llava_jax.sharding import BATCH, batch_sharding, constrain
from llava_jax.text.example import Example

Settings = SamplingSettings | Sequence[SamplingSettings]


class Generator:
    """A model that answers batches of prompts: Examples without labels, with pixels for images.

    config, params: the model, parameters flat and stacked as in llava_jax.llava.
    compute: dtype of activations and cache; by default that of the parameters. Attention by device.
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
        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        if compute is None:
            dtype = jnp.dtype(params["language.embed.embedding"].dtype)
            window = config.language.sliding_window is not None
            context = 1 if mesh is None else mesh.shape.get("context", 1)
            need = Need(dtype.name, window=window, context=context)
            compute = Compute(dtype, attention=choose(device, need))
        self.config, self.compute, self.mesh = config, compute, mesh
        self.eos_ids = tuple(eos_ids or config.language.eos_ids)
        self.unrolled = device.platform == "cpu" if unroll is None else unroll
        self.set_params(params, consume=consume)
        self.row_multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.compiled: Counter[str] = Counter()
        # Donating the state lets XLA update the cache in place.
        fixed, given = ("capacity", "keep_logits"), ("state",)
        self.read = jax.jit(self._read, static_argnames=fixed, donate_argnames=given)
        self.decode = jax.jit(self._decode, static_argnames=fixed[1:], donate_argnames=given)
        self.grow = jax.jit(self._grow, static_argnames=fixed[:1])

    def set_params(self, params: Mapping[str, Any], *, consume: bool = False) -> None:
        """Answers with other parameters of the same shapes and types from now on; compiles nothing."""
        self.graphdef, self.state = weights.load(
            self.config,
            params,
            self.compute,
            mesh=self.mesh,
            unrolled=self.unrolled,
            consume=consume,
        )
        # A list of leaves is flattened in C++ at every call; a State would be in Python.
        self.leaves, self._treedef = jax.tree.flatten(self.state)

    def drop_params(self) -> None:
        """Gives the memory of the parameters back, until `set_params`."""
        self.state: Any = None
        self.leaves = []

    # On the host ---------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Sequence[Example],
        settings: Settings = SamplingSettings(),  # noqa: B008  frozen
        *,
        keep_logits: bool = False,
    ) -> list[Output]:
        """Answers the prompts as one batch, in order. See `start` for errors."""
        decoding = self.start(prompts, settings, keep_logits=keep_logits)
        while decoding.running:
            decoding.advance()
        return decoding.outputs()

    def start(
        self,
        prompts: Sequence[Example],
        settings: Settings = SamplingSettings(),  # noqa: B008  frozen
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
        rows = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
        if len(rows) != len(prompts):
            raise PromptError(f"{len(rows)} sampling settings for {len(prompts)} prompts")
        for i, prompt in enumerate(prompts):
            name = "the prompt" if len(prompts) == 1 else f"prompt {i} of the batch"
            check_prompt(prompt, self.config, name)
        return Decoding(self, prompts, rows, keep_logits, after)

    def params(self):
        """Yields (name, array) of the flat stacked parameters, decoder layers stacked on the host."""
        return weights.stacked(self.state)

    def put(self, tree: Any) -> Any:
        """Arrays with a leading batch axis -> arrays on the devices."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.device_put(tree, batch_sharding(self.mesh))

    def scope(self):
        """The context to call `read`, `decode` and `grow` in."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    # On the device -------------------------------------------------------------------------------

    def model(self, leaves: list[jax.Array]) -> Llava:
        """The model over `leaves`; cheap enough to call inside jit, with `self.leaves` as argument."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _read(
        self, leaves, batch, controls, state: State | None, start_B, *, capacity, keep_logits
    ):
        """Reads prompts and chooses the first token of each. Returns (State, StepOutput).

        Without `state`, into a new cache of `capacity` entries. With it, the batch is what follows
        the cached tokens before position `start_B`; the others are dropped.
        """
        self.compiled["prefill" if state is None else "extend"] += 1
        model = self.model(leaves)
        b, t = batch["tokens"].shape
        where: dict[str, Any]
        cache: Any  # never None: a cache goes in
        # 1 in an empty row, so that no softmax is of nothing.
        new_lengths = jnp.maximum((batch["segments"] > 0).sum(1, dtype=jnp.int32), 1)  # [B]
        lengths = new_lengths
        positions = at = jnp.broadcast_to(jnp.arange(t), (b, t))  # [B, T]
        real = at < lengths[:, None]  # [B, T]
        x = constrain(model.embed(batch["tokens"], batch["slots"], batch["images"]), BATCH)
        if state is None:
            write_at, where = 0, {"segments_BT": real.astype(jnp.int32)}  # only these keys are read
            key_positions = jnp.pad(
                jnp.where(real, at, -1), ((0, 0), (0, capacity - t)), constant_values=-1
            )  # [B, S]
            cache = init_cache(self.config.language, b, capacity, self.compute.dtype, self.unrolled)
            cache = self._sharded(cache)
        else:
            write_at, cache = state.write_at, state.cache
            positions, lengths = start_B[:, None] + at, start_B + lengths
            old = jnp.where(state.key_positions < start_B[:, None], state.key_positions, -1)
            key_positions = jax.lax.dynamic_update_slice_in_dim(
                old, jnp.where(real, positions, -1), write_at, axis=1
            )  # [B, S]
            where = {
                "mask_BTS": visible(positions, key_positions),
                "write_at": write_at,
                "key_positions_BS": key_positions,
            }
        hidden, cache = model.language(x, positions, cache=cache, **where)  # [B, T, D]
        logits = model.logits(hidden[jnp.arange(b), new_lengths - 1])  # [B, V]
        step = jnp.zeros((), jnp.int32)
        token, logprob = choose_token(logits, controls, step)  # [B]
        state = State(
            self._sharded(cache),
            key_positions,
            lengths,
            token,
            self._ended(token, step + 1, controls),
            step + 1,
            jnp.asarray(write_at + t, jnp.int32),
        )
        shown = logits[:, None] if keep_logits else None  # [B, 1, V]
        return state, _everywhere(StepOutput(token[:, None], logprob[:, None], shown, step + 1))

    def _decode(self, leaves, state: State, controls: Controls, stopped_B, limit, *, keep_logits):
        """Gives up to `limit` (at most CHUNK) further tokens; ends early when every row is done."""
        self.compiled["decode"] += 1
        model = self.model(leaves)
        b, vocab = len(state.token), self.config.language.vocab_size
        out = StepOutput(
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
            done, i = state.done, out.count
            state, logprob, logits = self._step(model, state, controls)
            tokens = out.tokens.at[:, i].set(jnp.where(done, -1, state.token))
            shown = out.logits.at[:, i].set(logits) if keep_logits else None
            return state, StepOutput(tokens, out.logprobs.at[:, i].set(logprob), shown, i + 1)

        state = state._replace(done=state.done | stopped_B)
        state, out = jax.lax.while_loop(more, one, (state, out))
        return state, _everywhere(out)

    def _step(self, model: Llava, state: State, controls: Controls):
        """Reads the last chosen token of each row and chooses the next."""
        at = state.positions[:, None]  # [B, 1]
        key_positions = jax.lax.dynamic_update_slice_in_dim(
            state.key_positions, at, state.write_at, axis=1
        )  # [B, S]
        cache: Any  # never None: a cache goes in
        hidden, cache = model.language(
            model.language.embed(state.token[:, None], self.compute.dtype),  # [B, 1, D]
            at,
            mask_BTS=visible(at, key_positions),  # [B, 1, S]
            cache=state.cache,
            write_at=state.write_at,
            key_positions_BS=key_positions,
        )
        logits = model.logits(hidden[:, 0])  # [B, V]
        token, logprob = choose_token(logits, controls, state.step)  # [B]
        step = state.step + 1
        done = state.done | self._ended(token, step, controls)
        after = state.positions + 1, token, done, step, state.write_at + 1
        return State(cache, key_positions, *after), logprob, logits

    def _ended(self, token_B, step, controls: Controls):
        return jnp.isin(token_B, jnp.asarray(self.eos_ids)) | (step >= controls.budget)

    def _grow(self, state: State, *, capacity: int) -> State:
        """The same state with a cache of `capacity` entries."""
        self.compiled["grow"] += 1
        more = capacity - state.capacity

        def pad(x):  # [..., K, S, H]
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


def visible(positions_BT: jax.Array, key_positions_BS: jax.Array) -> jax.Array:
    """bool[B, T, S]: a query sees the cached keys up to its own position."""
    keys = key_positions_BS[:, None, :]
    return (keys >= 0) & (keys <= positions_BT[:, :, None])


def _everywhere(out: StepOutput) -> StepOutput:
    """A copy on every device, so that every process can read it."""
    return jax.tree.map(lambda x: constrain(x, P()), out)
