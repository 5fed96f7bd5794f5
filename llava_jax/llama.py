"""The LLaMA decoder, with grouped KV heads and a KV cache that is a plain pytree.

Numerics follow transformers 4.37.2 models/llama: RMSNorm and softmax in float32, half-split RoPE,
SwiGLU. LLaMA-2/3- and Mistral-shaped models are the same code with other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax.attention import Causal, attention, settled
from llava_jax.attention.cached import Places, attend, write
from llava_jax.config import LanguageConfig, LoraConfig
from llava_jax.layers import (
    ATTENTION,
    Compute,
    Embed,
    Linear,
    RMSNorm,
    apply_rope,
    linears_of,
    rope_frequencies,
    rope_table,
    run_layers,
    stack_layers,
    unstack_layers,
)
from llava_jax.products import matmul


class KVCache(NamedTuple):
    """Keys and values of all layers, each [L, J, N, K, C, H] (or a list of L arrays [J, N, K, C, H])."""

    # Heads come before the keys of a block so that a decode step reads each head's contiguously. On CPU
    # this made attention over the cache 3 to 5 times faster for 8 rows, and no slower for one.

    k: Any
    v: Any


def init_cache(
    config: LanguageConfig, slots: int, length: int, block: int, dtype, unrolled: bool
) -> KVCache:
    """An empty cache of slots of `length` keys, a multiple of `block`, see attention.cached.

    A list with one array per layer if `unrolled`.
    """
    shape = (length // block, slots, config.kv_heads, block, config.head_width)
    if unrolled:
        return KVCache(*([jnp.zeros(shape, dtype) for _ in range(config.layers)] for _ in "kv"))
    return KVCache(*(jnp.zeros((config.layers, *shape), dtype) for _ in "kv"))


def take_positions(x_BTD: jax.Array, at_GP: jax.Array | None) -> jax.Array:
    """x at the positions of `at` -> [G, P, D]; x itself where that is None.

    at_GP: int32, each into the B / G * T positions of a group's rows; G divides B.
    """
    if at_GP is None:
        return x_BTD
    groups = x_BTD.reshape(len(at_GP), -1, x_BTD.shape[-1])  # [G, B / G * T, D]
    return jnp.take_along_axis(groups, at_GP[..., None], axis=1)


class LlamaAttention(nnx.Module):
    """Causal self-attention with RoPE; over a slot cache when given one."""

    def __init__(self, config: LanguageConfig, linear: Callable[..., Linear]):
        d, h = config.width, config.head_width
        bias = config.attention_bias
        self.head_width = h
        self.q = linear("attn.q", d, config.heads * h, ("embed", "heads"), bias=bias)
        self.k = linear("attn.k", d, config.kv_heads * h, ("embed", "kv_heads"), bias=bias)
        self.v = linear("attn.v", d, config.kv_heads * h, ("embed", "kv_heads"), bias=bias)
        self.o = linear("attn.o", config.heads * h, d, ("heads", "embed"), bias=bias, gain=0.5)

    def __call__(self, x_BTD, rope, seen, cache, kernel, keys, at_GP=None):
        b, t, _ = x_BTD.shape
        split = (b, t, -1, self.head_width)
        q = apply_rope(self.q(x_BTD, keys[0]).reshape(split), rope)  # [B, T, N, H]
        k = apply_rope(self.k(x_BTD, keys[1]).reshape(split), rope)  # [B, T, K, H]
        v = self.v(x_BTD, keys[2]).reshape(split)  # [B, T, K, H]
        q, k, v = (checkpoint_name(x, ATTENTION) for x in (q, k, v))
        if cache is None:
            y = attention(q, k, v, seen, kernel)  # [B, T, N, H]
        else:  # a pair [J, N, K, C, H]
            entries, places, window = seen
            cache = write(cache[0], k, places), write(cache[1], v, places)
            y = attend(q, *cache, entries, places, window, kernel)  # [B, T, N, H]
        y = take_positions(y.reshape(b, t, q.shape[2] * q.shape[3]), at_GP)  # [B, T, N * H]
        return checkpoint_name(self.o(y, keys[3]), ATTENTION), cache  # [B, T, D]


class LlamaMlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LanguageConfig, linear: Callable[..., Linear]):
        d, f = config.width, config.mlp_width
        self.gate = linear("mlp.gate", d, f, ("embed", "mlp"))
        self.up = linear("mlp.up", d, f, ("embed", "mlp"))
        self.down = linear("mlp.down", f, d, ("mlp", "embed"), gain=0.5)

    def __call__(self, x: jax.Array, keys) -> jax.Array:
        x = jax.nn.silu(self.gate(x, keys[4])) * self.up(x, keys[5])  # [B, T, F]
        return self.down(x, keys[6])  # [B, T, D]


class LlamaLayer(nnx.Module):
    """One pre-norm decoder block. With `at`, its output at those positions alone: [G, P, D]."""

    def __init__(
        self,
        config: LanguageConfig,
        lora: LoraConfig | None,
        quantize: str,
        few: str,
        *,
        rngs: nnx.Rngs,
    ):
        linear = linears_of("language.layers", lora, quantize, few, rngs=rngs)
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = LlamaAttention(config, linear)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.mlp = LlamaMlp(config, linear)

    def __call__(self, x, rope, seen, cache, kernel, key, at=None, adapter=None):
        # One per Linear: keys of dropout, or each row's adapter.
        keys = [adapter] * 7 if key is None else jax.random.split(key, 7)
        y, cache = self.attn(self.attn_norm(x), rope, seen, cache, kernel, keys, at)
        x = take_positions(x, at) + y
        return x + self.mlp(self.mlp_norm(x), keys), cache


class Llama(nnx.Module):
    """Decoder over embeddings: the caller embeds tokens, splices images, and asks for logits."""

    def __init__(
        self,
        config: LanguageConfig,
        compute: Compute,
        lora: LoraConfig | None = None,
        quantize: str = "",
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.compute = config, compute
        self.embed = Embed(config.vocab_size, config.width, rngs=rngs)
        self.layers = stack_layers(
            lambda r: LlamaLayer(config, lora, quantize, compute.few, rngs=r), config.layers, rngs
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        if not config.tied_head:
            self.head = Linear(config.width, config.vocab_size, ("embed", "vocab"), rngs=rngs)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        turns_BT: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        entries_BT: jax.Array | None = None,
        places: Places | None = None,
        dropout_key: jax.Array | None = None,
        at_GP: jax.Array | None = None,
        prune: bool = False,
        adapter_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Embeddings -> (hidden states after the last norm, dtype[B, T, D]; the updated cache).

        segments_BT, turns_BT: int32, who sees whom among the T tokens, see attention.Causal.
        cache, places: in their place, where the tokens go in a slot cache, of which each then sees the
        entries up to its own: entries_BT, where they are not the positions.
        dropout_key: turns LoRA dropout on (training).
        at_GP: positions to give hidden states of, as take_positions takes them: [G, P, D] and no cache.
        prune: do what follows the last layer's attention at those positions alone.
        adapter_B: int32, which of a LoraSet's adapters a row goes through (Linear).
        """
        c, compute = self.config, self.compute
        rope = rope_table(
            positions_BT, rope_frequencies(c.head_width, c.rope_theta, c.rope_scaling)
        )
        entries = positions_BT if entries_BT is None else entries_BT
        seen: Any = (entries, places, c.sliding_window)
        if segments_BT is not None:
            causal = Causal(segments_BT, positions_BT, turns_BT, c.sliding_window)
            seen = settled(causal, compute.attention)
        keys = None if dropout_key is None else jax.random.split(dropout_key, c.layers)

        def apply(layer, x, entry):
            layer_cache, key = entry
            return layer(x, rope, seen, layer_cache, compute.attention, key, adapter=adapter_B)

        def last(layer, x, entry):
            return layer(x, rope, seen, None, compute.attention, entry[1], at_GP)

        every = self._per_layer(cache, keys)
        if prune:
            x, _ = run_layers(self.layers, apply, x_BTD, every, compute, last)
            return self.norm(x), None
        x, new_cache = run_layers(self.layers, apply, x_BTD, every, compute)
        if cache is None:
            return self.norm(take_positions(x, at_GP)), None
        if isinstance(new_cache, list):
            return self.norm(x), KVCache([k for k, _ in new_cache], [v for _, v in new_cache])
        return self.norm(x), KVCache(*new_cache)

    def _per_layer(self, cache: KVCache | None, keys) -> Any:
        """The per-layer inputs besides x: arrays with a leading layer axis, or a list if unrolled."""
        if not isinstance(self.layers, nnx.List):
            return (None if cache is None else tuple(cache), keys)
        n = len(self.layers)
        pairs = [None] * n if cache is None else list(zip(cache.k, cache.v))
        return [(pairs[i], None if keys is None else keys[i]) for i in range(n)]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., D] -> float32[..., V]."""
        kernel = self.embed.embedding[...].T if self.config.tied_head else self.head.kernel[...]
        flat = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
        return matmul(flat, kernel, jnp.float32).reshape(*hidden.shape[:-1], kernel.shape[-1])

    def unrolled(self) -> Llama:
        """Replaces the stacked layers with a list of layers, in place, and returns self."""
        self.layers = unstack_layers(self.layers)
        return self
