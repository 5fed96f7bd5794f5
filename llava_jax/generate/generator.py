"""The compiled part of generation: pictures seen, prompts read in chunks, all slots decoded at once.

A slot holds the keys and values of one request; entry i is position i. Every program has one static
shape whatever the slots are doing: rows that have nothing to do are computed and thrown away. A row's
arithmetic reads nothing of the others, so that its answer is, to the bit, the one it gets alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import products
from llava_jax.attention import Need, choose
from llava_jax.attention.cached import Places
from llava_jax.batch import batch_bucket
from llava_jax.chips import memory_of
from llava_jax.config import LlavaConfig
from llava_jax.generate import weights
from llava_jax.generate.adapters import Adapter, Adapters
from llava_jax.generate.begin import ended, first_tokens
from llava_jax.generate.sampling import TOPS, Controls, Said, alternatives, choose_token
from llava_jax.generate.state import Chunk, Given, Limits, State, everywhere
from llava_jax.layers import Compute
from llava_jax.llama import KVCache, init_cache
from llava_jax.llava import Llava, head_widths, merge_images, places_at
from llava_jax.params import is_lora
from llava_jax.sharding import BATCH, constrain

STEPS = 32
"""Tokens per slot that one call of `decode` gives at most."""

SMALL_CACHE = 2**28
"""Bytes: up to so many, all slots have the whole context."""
SHARE = 1 / 16
"""Of a device's memory, for the slots where nobody says how many: weights, and perhaps a run, lie beside them."""

NOTHING = np.int32(-1)
"""What `copy` takes for a slot of zeros."""

# A GPU reads the weights once for a prompt of 576 features and up to 448 tokens.
_CHUNK = {"cpu": 128, "gpu": 1024, "cuda": 1024}
_BLOCK = {"cpu": 64}
_OTHERWISE = 256  # not measured
_MEMORY = 2**35  # of a device that is not in the table


class Generator:
    """A model's parameters and compiled programs; llava_jax.generate.engine says when each is called.

    config, params: the model, parameters flat and stacked as in llava_jax.llava.
    compute: dtype of activations and cache; by default that of the parameters. Attention by device.
    mesh: parameters lie as llava.param_shardings says, slots over data and fsdp.
    unroll: decoder layers one by one, by default, instead of a scan, which copies weights and cache.
    consume: empties `params` on the way, so that a large model is never held twice.
    eos_ids: tokens that end an answer; by default the config's.
    chunk: positions of a prompt that are read at once; by default of the device.
    adapters: beside the model, by name; see llava_jax.generate.adapters.

    `compiled` counts compilations by kind; within a bucket nothing is compiled twice. That of the first
    tokens is not counted: models share it.
    """

    def __init__(
        self,
        config: LlavaConfig,
        params: Mapping[str, Any],
        *,
        compute: Compute | None = None,
        mesh: Mesh | None = None,
        unroll: bool = True,
        consume: bool = False,
        eos_ids: Sequence[int] | None = None,
        chunk: int | None = None,
        adapters: Mapping[str, Adapter] | None = None,
    ):
        from llava_jax.generate import lookup  # which takes its types from here

        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        if compute is None:
            dtype = jnp.dtype(params["language.embed.embedding"].dtype)
            window = config.language.sliding_window is not None
            context = 1 if mesh is None else mesh.shape.get("context", 1)
            need = Need(dtype.name, window=window, context=context, heads=head_widths(config))
            compute = Compute(
                dtype, attention=choose(device, need), few=products.choose(device, dtype)
            )
        self.config, self.compute, self.mesh = config, compute, mesh
        self.eos_ids = tuple(eos_ids or config.language.eos_ids)
        self.on_cpu = device.platform == "cpu"
        # By the table and not by what the device says is free: all processes of a run must find the same.
        self.cache_bytes = SHARE * (memory_of(device.device_kind) or _MEMORY)
        self.unrolled = unroll
        self.chunk = chunk or _CHUNK.get(device.platform, _OTHERWISE)
        self.block = math.gcd(self.chunk, _BLOCK.get(device.platform, _OTHERWISE))
        self.step = max(1, self.chunk // 4)  # chunks are padded to a multiple of it
        # Positions that a later prompt takes over at once. On a CPU, to the bit what reading them would give.
        apart = self.on_cpu or self.step % self.block
        self.reuse = self.chunk if apart else self.step
        self.adapters = Adapters(config, adapters or {})
        self.version = 0
        self.set_params(params, consume=consume)
        self.row_multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.compiled: Counter[str] = Counter()
        # Donating the state lets XLA update the cache in place.
        donated: Any = {"donate_argnames": ("state",)}
        self._empty = jax.jit(self._new_state, static_argnums=(0, 1, 2))
        self.see = jax.jit(self._see, **donated)
        self.copy = jax.jit(self._copy, **donated)
        self.mark = jax.jit(self._mark, **donated)
        self.read = jax.jit(self._read, **donated)
        self.decode = jax.jit(self._decode, static_argnames=("keep_logits", "apart"), **donated)
        self.lookup = jax.jit(partial(lookup.decode, self), static_argnames=("count",), **donated)
        self.beam = jax.jit(self._beam, static_argnames=("keep",), **donated)

    def set_params(self, params: Mapping[str, Any], *, consume: bool = False) -> None:
        """Answers with other parameters of the same shapes and types from now on; compiles nothing."""
        self.graphdef, self.state = weights.load(
            self.adapters.config,
            params,
            self.adapters.factors,
            self.compute,
            mesh=self.mesh,
            unrolled=self.unrolled,
            consume=consume,
        )
        # A list of leaves is flattened in C++ at every call; a State would be in Python.
        self.leaves, self._treedef = jax.tree.flatten(self.state)
        self.eyes = {
            name: jax.tree.leaves(weights.replaced(self.state, own, self.config, self.mesh))
            for name, own in self.adapters.eyes.items()
        }
        self.version += 1  # what engines have read is of the old ones

    def drop_params(self) -> None:
        """Gives the memory of the parameters back, until `set_params`."""
        self.state: Any = None
        self.leaves, self.eyes = [], {}

    # On the host ---------------------------------------------------------------------------------

    @property
    def entry_bytes(self) -> int:
        """Bytes of the keys and values of one position, in all layers."""
        c = self.config.language
        return 2 * c.layers * c.kv_heads * c.head_width * jnp.dtype(self.compute.dtype).itemsize

    def slot_length(self, slots: int, room: int | None) -> int:
        """Positions of each slot, where requests take `room` of them; None: not known."""
        # Longer slots cost memory and no time, but another length compiles every program again.
        context = self.config.language.max_positions
        if room is None or slots * context * self.entry_bytes <= SMALL_CACHE:
            return context
        return min(1 << (max(room, self.chunk) - 1).bit_length(), context)

    def slots_that_fit(self, most: int, room: int) -> int:
        """How many requests of `room` positions to answer at once, of `most`, where nobody says."""
        for count in (most >> i for i in range(most.bit_length())):
            slots = batch_bucket(count, self.row_multiple)
            taken = slots * self.slot_length(slots, room) * self.entry_bytes
            if taken <= self.cache_bytes * self.row_multiple:
                return count
        return 1

    def params(self):
        """Yields (name, array) of the flat stacked parameters, decoder layers stacked on the host."""
        found = weights.stacked(self.state)
        return ((n, v) for n, v in found if not (self.adapters.names and is_lora(n)))

    def _through(self, controls: Controls) -> jax.Array | None:
        """int32: the adapter of each row; None without any: a LoRA of the model's own takes no row's."""
        return controls.adapter if self.adapters.names else None

    def scope(self):
        """The context to call the programs in."""
        return nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def put(self, tree: Any) -> Any:
        """Arrays of the host, on every device."""
        if self.mesh is None:
            return tree
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def new_state(self, slots: int, capacity: int, pictures: int) -> State:
        """An empty State: N slots of S entries, F picture places."""
        with self.scope():
            return self._empty(slots, capacity, pictures)

    # On the device -------------------------------------------------------------------------------

    def model(self, leaves: list[jax.Array]) -> Llava:
        """The model over `leaves`; cheap enough to call inside jit, with `self.leaves` as argument."""
        return nnx.merge(self.graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _new_state(self, slots: int, capacity: int, pictures: int) -> State:
        c, dtype, vocab = self.config, self.compute.dtype, self.config.language.vocab_size
        cache = init_cache(c.language, slots, capacity, self.block, dtype, self.unrolled)
        ints = jnp.zeros(slots, jnp.int32)
        return State(
            self._sharded(cache),
            jnp.zeros((pictures, c.image_tokens, c.language.width), dtype),
            jnp.zeros((pictures, c.image_tokens), jnp.int32),
            *(ints, ints, jnp.zeros(slots, bool), ints, ints),
            jax.tree.map(jnp.asarray, Controls.rows(slots)),
            jnp.zeros((slots, vocab), jnp.int32),
            jnp.zeros((slots, vocab), bool),
            jnp.zeros((slots, vocab), jnp.float32),
        )

    def _see(self, leaves, state: State, images_MHWC, at_M) -> State:
        """Puts the projected features of M pictures into their places."""
        self.compiled["see"] += 1
        features, stands = self.model(leaves).read(images_MHWC)  # [M, I, D], [M, I]
        features = state.features.at[at_M].set(features.astype(state.features.dtype))
        if stands is not None:
            state = state._replace(stands=state.stands.at[at_M].set(stands))
        return state._replace(features=features)

    def _copy(self, state: State, source, target) -> State:
        """One slot's keys and values, or NOTHING, into another."""
        self.compiled["copy"] += 1
        axis = 1 if self.unrolled else 2

        def one(x):
            row = jax.lax.dynamic_slice_in_dim(x, jnp.maximum(source, 0), 1, axis)
            row = jnp.where(source < 0, 0, row)
            return jax.lax.dynamic_update_slice_in_dim(x, row, target, axis)

        return state._replace(cache=self._sharded(jax.tree.map(one, state.cache)))

    def _mark(self, state: State, slot, bias_V, asked_V) -> State:
        """What penalties and bias of a slot's request go by."""
        self.compiled["mark"] += 1
        return state._replace(
            bias=state.bias.at[slot].set(bias_V), asked=state.asked.at[slot].set(asked_V)
        )

    def _read(self, leaves, state: State, chunk: Chunk, controls: Controls):
        """Reads a chunk of B prompts -> (state, logits float32[B, V] after what was read), for `begin`."""
        self.compiled["read"] += 1
        model = self.model(leaves)
        b, t = chunk.tokens.shape
        entries = chunk.start[:, None] + jnp.arange(t)  # [B, C]
        positions = chunk.positions + places_at(state.stands.reshape(1, -1), chunk.places)
        features = state.features.reshape(1, -1, state.features.shape[-1])  # [1, F * I, D]
        text = model.language.embed(chunk.tokens, self.compute.dtype)  # [B, C, D]
        x = constrain(merge_images(text, features, chunk.places), BATCH)
        ends = chunk.start + chunk.length  # [B]
        blocks = (ends.max() + self.block - 1) // self.block
        places = Places(chunk.slots, chunk.start, blocks)
        hidden, cache = model.language(
            x,
            positions,
            cache=state.cache,
            entries_BT=entries,
            places=places,
            adapter_B=self._through(controls),
        )
        logits = model.logits(hidden[jnp.arange(b), chunk.length - 1])  # [B, V]
        return state._replace(cache=self._sharded(cache)), everywhere(logits)

    def begin(
        self,
        state: State,
        logits: jax.Array,
        chunk: Chunk,
        controls: Controls,
        limits: Limits,
        *,
        keep_logits: bool,
    ) -> tuple[State, Given]:
        """Gives the prompts that end in a chunk their first token, by the logits of `read`."""
        large = {"cache": state.cache, "features": state.features, "stands": state.stands}
        state, given = first_tokens(
            state._replace(cache=None, features=None, stands=None),
            *(logits, chunk._replace(tokens=None, places=None, positions=None), controls, limits),
            eos_ids=self.eos_ids,
            keep_logits=keep_logits,
        )
        return state._replace(**large), given

    def _decode(
        self,
        leaves,
        state: State,
        live_N,
        limits: Limits,
        most,
        enough,
        *,
        keep_logits,
        apart=False,
    ) -> tuple[State, Given]:
        """Gives each live slot up to `most` (and STEPS) further tokens. apart: see Places.

        Ends early when all are done, or `enough` have become so in this call.
        """
        self.compiled["decode"] += 1
        model = self.model(leaves)
        n, vocab = state.counts.shape
        out = Given(
            jnp.full((n, STEPS), -1, jnp.int32),
            jnp.zeros((n, STEPS), jnp.float32),
            jnp.zeros((n, STEPS, TOPS), jnp.int32),
            jnp.zeros((n, STEPS, TOPS), jnp.float32),
            jnp.zeros((n, STEPS, vocab), jnp.float32) if keep_logits else None,
            jnp.zeros((), jnp.int32),
        )
        state = state._replace(alive=state.alive & live_N)
        first = state.alive

        def more(carry):
            state, out = carry
            done = (first & ~state.alive).sum()
            return (out.count < most) & jnp.any(state.alive) & (done < enough)

        def one(carry):
            state, out = carry
            before = state.alive
            state, *found = self._step(model, state, limits, apart)
            given: list[Any] = found
            i = out.count
            given[0] = jnp.where(before, given[0], -1)
            given[4] = given[4] if keep_logits else None
            kept: Any = jax.tree.map(lambda old, new: old.at[:, i].set(new), out[:5], tuple(given))
            return state, Given(*kept, count=i + 1)

        state, out = jax.lax.while_loop(more, one, (state, out))
        return state, everywhere(out)

    def _step(self, model: Llava, state: State, limits: Limits, apart: bool = False):
        """Reads the last chosen token of each slot and chooses the next."""
        # A slot that is not alive may be in the middle of its prompt: its key goes to the last entry,
        # which no request ever reads (an answer ends before it).
        keys = jax.tree.leaves(state.cache)[0].shape  # [..., J, N, K, C, H]
        capacity = keys[-5] * keys[-2]
        write_at = jnp.where(state.alive, state.positions, capacity - 1)
        seen = jnp.where(state.alive, state.positions, 0)  # [N]
        places = Places(None, write_at, seen.max() // self.block + 1, apart)
        hidden, cache = model.language(
            constrain(model.language.embed(state.token[:, None], self.compute.dtype), BATCH),
            (seen + state.ahead)[:, None],
            cache=state.cache,
            entries_BT=seen[:, None],
            places=places,
            adapter_B=self._through(state.controls),
        )
        logits = model.logits(hidden[:, 0])  # [N, V]
        said = Said(state.step, state.counts, state.asked, state.bias, *limits)
        token, logprob = choose_token(logits, state.controls, said)  # [N]
        tops = alternatives(logits, state.controls.tops)
        step = state.step + 1
        state = state._replace(
            cache=self._sharded(cache),
            positions=state.positions + state.alive,
            token=token,
            alive=state.alive & ~ended(token, step, state.controls, self.eos_ids),
            step=step,
            counts=state.counts.at[jnp.arange(len(token)), token].add(1),
        )
        return state, token, logprob, *tops, logits

    def _beam(self, leaves, state: State, source_N, token_N, *, keep: int):
        """Slots become those of `source`, each reads a token -> the likeliest next ones, [N, keep] both."""
        self.compiled["beam"] += 1
        axis, n = 1 if self.unrolled else 2, len(source_N)
        state = state._replace(
            cache=jax.tree.map(lambda x: jnp.take(x, source_N, axis), state.cache),
            positions=state.positions[source_N],
            ahead=state.ahead[source_N],
            token=token_N,
            alive=jnp.ones(n, bool),
            controls=jax.tree.map(jnp.asarray, Controls.rows(n))._replace(
                adapter=state.controls.adapter[source_N]
            ),
        )
        words = -(-state.counts.shape[1] // 32)
        free = Limits(jnp.zeros(n, bool), jnp.zeros((n, words), jnp.uint32))
        state, *_, logits = self._step(self.model(leaves), state, free)
        values, tokens = jax.lax.top_k(jax.nn.log_softmax(logits), keep)
        return state, *everywhere((values, tokens))

    def _sharded(self, cache: Any) -> KVCache:
        """Slots over data and fsdp, KV heads over tensor where they divide."""
        if self.mesh is None:
            return cache
        heads = self.config.language.kv_heads % self.mesh.shape["tensor"] == 0
        axes = (None, *BATCH, "tensor" if heads else None)
        partition = P(*axes) if self.unrolled else P(None, *axes)
        return jax.tree.map(lambda x: constrain(x, partition), cache)
