"""Building blocks shared by the tower and the decoder, and how a stack of equal layers is run.

Modules only hold parameters; everything else is plain jax over `nnx.split` states, which works the
same in NNX's graph mode and its coming tree mode. Parameters carry logical axis names
(`out_sharding`); llava_jax.sharding maps those to mesh axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax import quant
from llava_jax.attention import PLAIN, Choice
from llava_jax.config import LoraConfig, LoraSet, RopeScaling
from llava_jax.products import matmul, quantized

OFFLOADED = "pinned_host"
"""The kind of memory that remat "offload" uses."""


@dataclass(frozen=True)
class Compute:
    """How a model is run, as opposed to what it is. None of it changes the parameters.

    dtype: activations and matmul inputs; norms, softmax, RoPE and logits are always float32.
    remat: what each layer keeps for the backward pass, which computes the rest again: "none" keeps all,
        "dots" the outputs of its linear layers, "minimal" attention's q, k, v and output, "full" the
        layer's input alone, "offload" that input in the host's memory.
    unroll: run layer stacks as a straight line instead of a scan (longer compile; faster on CPU).
    attention: the kernel, see llava_jax.attention. turns: whether independent turns may occur; a kernel
        that does not know them is for runs without. few: how nf4 kernels are multiplied in decoding, see
        llava_jax.products.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    unroll: bool = False
    attention: Choice = PLAIN
    turns: bool = True
    few: str = ""


LAYER_INPUT, ATTENTION = "layer input", "attention"  # names of activations that a policy may keep
_policies = jax.checkpoint_policies
REMAT_POLICIES: dict[str, Callable | None] = {
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "minimal": _policies.save_only_these_names(ATTENTION),
    "full": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=OFFLOADED,
    ),
}


def is_variable(leaf: Any) -> bool:
    """True for an NNX variable: the leaves at which our tree maps stop."""
    return isinstance(leaf, nnx.Variable)


class _Blank:
    def params(self) -> None:
        """No key."""


def no_rngs() -> nnx.Rngs:
    """In place of nnx.Rngs where a model is only described: its values are zeros, and tracing is quick."""
    return cast(nnx.Rngs, _Blank())


def normal(key: jax.Array | None, shape: tuple[int, ...], std: float) -> jax.Array:
    """float32[shape] of N(0, std^2); zeros without a key, see no_rngs."""
    if key is None:
        return jnp.zeros(shape)
    return jax.random.normal(key, shape, jnp.float32) * std


def uniform(key: jax.Array | None, shape: tuple[int, ...], bound: float) -> jax.Array:
    """float32[shape] of U(-bound, bound); zeros without a key, see no_rngs."""
    if key is None:
        return jnp.zeros(shape)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class Linear(nnx.Module):
    """y = x @ kernel (+ bias) (+ scale * (dropout(x) @ lora_a) @ lora_b). kernel [d_in, d_out].

    quantize: "nf4" or "int8" holds the kernel as the codes and scales of llava_jax.quant; such a kernel
    has no gradient. few: see products.quantized. DoRA (lora.dora) has the columns' magnitudes in lora_m [d_out].
    init: "fan_in" N(0, gain^2 / d_in) with a zero bias, or "torch" for nn.Linear's default
    U(-1/sqrt(d_in), 1/sqrt(d_in)) of kernel and bias, which the original's projector starts from.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: tuple[str | None, str | None],
        *,
        bias: bool = False,
        gain: float = 1.0,
        init: str = "fan_in",
        lora: LoraConfig | None = None,
        quantize: str = "",
        few: str = "",
        rngs: nnx.Rngs,
    ):
        self.d_in, self.few = d_in, few
        bound = d_in**-0.5
        if init == "torch":
            kernel = uniform(rngs.params(), (d_in, d_out), bound)
            offset = uniform(rngs.params(), (d_out,), bound)
        else:
            kernel, offset = normal(rngs.params(), (d_in, d_out), gain * bound), jnp.zeros(d_out)
        if quantize:
            codes, scales = quant.quantize(kernel, quantize)
            self.codes = nnx.Param(codes, out_sharding=axes)
            over = axes[0] if len(scales) > 1 else None
            self.scales = nnx.Param(scales, out_sharding=(over, axes[1]))
        else:
            self.kernel = nnx.Param(kernel, out_sharding=axes)
        if bias:
            self.bias = nnx.Param(offset, out_sharding=(axes[1],))
        self.lora = lora
        if lora:
            # PEFT's initialisation: A is kaiming-uniform(a=sqrt 5), that is U(+-1/sqrt d_in); B is 0.
            a = uniform(rngs.params(), (d_in, lora.rank), bound)
            self.lora_a = nnx.LoRAParam(a, out_sharding=(axes[0], None))
            self.lora_b = nnx.LoRAParam(jnp.zeros((lora.rank, d_out)), out_sharding=(None, axes[1]))
            if lora.dora:
                self.lora_m = nnx.LoRAParam(column_norms(kernel), out_sharding=(axes[1],))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """x [..., d_in] -> [..., d_out] in x's dtype. A key turns LoRA's dropout on.

        With a LoraSet there is no dropout, and in place of the key stands int32[B]: the adapter that
        each row of x [B, ..., d_in] goes through, from 1 on; 0: none.
        """
        base = y = self._base(x)
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(x.dtype)
        if isinstance(self.lora, LoraSet):
            return y if dropout_key is None else y + self._update_of(self.lora, x, dropout_key)
        if self.lora:
            whole = x
            if dropout_key is not None and self.lora.dropout:
                x = dropout(x, self.lora.dropout, dropout_key)
            update = matmul(matmul(x, self.lora_a[...]), self.lora_b[...]) * self.lora.scale
            if self.lora.dora:  # as PEFT: the dropout is before the base's share of the update too
                base = base if x is whole else self._base(x)
                ratio = self._magnitude_ratio(self.lora.scale)  # float32[d_out]
                update = ((ratio - 1) * base + ratio * update).astype(x.dtype)
            y = y + update
        return y

    def _update_of(self, adapters: LoraSet, x: jax.Array, adapter_B: jax.Array) -> jax.Array:
        """What each row's own adapter adds: of x @ A the columns of the others count as 0."""
        ranks, scales = zip(*adapters.each)
        own = np.repeat(np.arange(len(ranks)) + 1, ranks) == adapter_B[:, None]  # bool[B, R]
        own = own.reshape(len(own), *[1] * (x.ndim - 2), -1)
        inner = matmul(x, self.lora_a[...]) * np.repeat(np.array(scales, np.float32), ranks).astype(
            x.dtype
        )
        return matmul(jnp.where(own, inner, 0), self.lora_b[...])

    def _base(self, x: jax.Array) -> jax.Array:
        """x @ kernel."""
        if hasattr(self, "kernel"):
            return matmul(x, self.kernel[...])
        # Recomputed in the backward pass, so that only the codes of a layer outlive its forward pass.
        product = jax.checkpoint(partial(quantized, d_in=self.d_in, few=self.few))
        return product(x, self.codes[...], jax.lax.stop_gradient(self.scales[...]))

    def _magnitude_ratio(self, scale: float) -> jax.Array:
        """float32[d_out]: trained over actual norm of each column of the kernel with its update.

        The norm has no gradient (section 4.3 of DoRA's paper, and PEFT).
        """
        if hasattr(self, "kernel"):
            kernel = self.kernel[...]
        else:
            kernel = quant.dequantize(self.codes[...], self.scales[...], self.d_in)
        a, b = (leaf[...].astype(jnp.float32) for leaf in (self.lora_a, self.lora_b))
        norms = column_norms(kernel.astype(jnp.float32) + scale * (a @ b))
        return self.lora_m[...].astype(jnp.float32) / jax.lax.stop_gradient(norms)


def column_norms(kernel: jax.Array) -> jax.Array:
    """float32[..., d_out]: the length of each column of a kernel [..., d_in, d_out]."""
    return jnp.linalg.norm(kernel.astype(jnp.float32), axis=-2)


def linears_of(
    place: str, lora: LoraConfig | None, quantize: str = "", few: str = "", *, rngs: nnx.Rngs
) -> Callable[..., Linear]:
    """linear(name, d_in, d_out, axes, ...): the Linear called `place`.name, adapted where lora says so."""

    def linear(name: str, *sizes: Any, **options: Any) -> Linear:
        own = lora if lora and f"{place}.{name}" in lora.targets else None
        return Linear(*sizes, lora=own, quantize=quantize, few=few, rngs=rngs, **options)

    return linear


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """x with a fraction `rate` of its entries zeroed and the rest scaled by 1 / (1 - rate)."""
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Embed(nnx.Module):
    """Token embedding, embedding [V, D]."""

    def __init__(self, vocab: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(
            normal(rngs.params(), (vocab, width), 1.0), out_sharding=("vocab", "embed")
        )

    def __call__(self, tokens: jax.Array, dtype=jnp.float32) -> jax.Array:
        """tokens int32[...] -> dtype[..., D]."""
        return self.embedding[...].astype(dtype)[tokens]


class RMSNorm(nnx.Module):
    """LLaMA's norm: in float32, cast back, then times scale [D]."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width), out_sharding=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * x32.astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer normalisation in float32, scale [D] and bias [D]."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width), out_sharding=(None,))
        self.bias = nnx.Param(jnp.zeros(width), out_sharding=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * self.scale[...] + self.bias[...]).astype(x.dtype)


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """float32[width / 2]: radians per position of each rotated pair.

    Linear and llama3 scaling follow transformers' modeling_rope_utils.
    """
    freq = 1.0 / theta ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    freq = freq.astype(np.float32)
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return (freq / np.float32(scaling.factor)).astype(np.float32)
    low = scaling.original_max_positions / scaling.low_freq_factor
    high = scaling.original_max_positions / scaling.high_freq_factor
    wavelength = 2 * np.pi / freq
    blend = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    mixed = (1 - blend) * freq / scaling.factor + blend * freq
    slow = np.where(wavelength > low, freq / scaling.factor, mixed)
    return np.where(wavelength < high, freq, slow).astype(np.float32)


def rope_table(positions_BT: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each float32[B, T, 1, H/2]. float32 always: bfloat16 rounds 257 to 256."""
    angles = positions_BT.astype(jnp.float32)[..., None, None] * frequencies  # [B, T, 1, H/2]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x_BTNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates in LLaMA's half-split layout: channel i pairs with channel i + H/2."""
    cos, sin = table
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)  # each [B, T, N, H/2]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


# Stacks of equal layers -------------------------------------------------------------------------


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """n layers made by make(rngs), as one module whose arrays have a leading "layers" axis."""
    graphdef, one = nnx.split(nnx.eval_shape(lambda: make(no_rngs())))
    key = rngs.params()
    if key is None:
        state = jax.tree.map(lambda x: jnp.zeros((n, *x.shape), x.dtype), one)
    else:
        state = jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(jax.random.split(key, n))
    state = jax.tree.map(
        lambda v: v.replace(out_sharding=("layers", *v.out_sharding)), state, is_leaf=is_variable
    )
    return nnx.merge(graphdef, state)


def unstack_layers(stacked: nnx.Module) -> nnx.List:
    """The same layers as a list of modules with arrays of their own (faster to decode with)."""
    graphdef, state = nnx.split(stacked)
    n = jax.tree.leaves(state)[0].shape[0]

    def layer(i: int) -> nnx.Module:
        one = jax.tree.map(
            lambda v: v.replace(v[...][i], out_sharding=v.out_sharding[1:]),
            state,
            is_leaf=is_variable,
        )
        return nnx.merge(graphdef, one)

    return nnx.List([layer(i) for i in range(n)])


def run_layers(
    layers: Any, apply: Callable, x: Any, xs: Any, compute: Compute, last: Callable | None = None
) -> tuple[Any, Any]:
    """Runs x through all layers: x, y = apply(layer, x, xs[i]) for each; returns (x, ys).

    layers: one stacked module (scanned), or an nnx.List of modules (run one after another; xs and ys
    are then lists with one entry per layer instead of arrays with a leading axis).
    last: takes apply's place in the last layer of a stack, and may give x another shape; ys is then
    that of the layers before.
    """
    if isinstance(layers, nnx.List):
        ys = []
        for i, layer in enumerate(layers):
            x, y = apply(layer, x, None if xs is None else xs[i])
            ys.append(y)
        return x, ys
    graphdef, state = nnx.split(layers)

    def body(x, layer_and_input):
        layer, entry = layer_and_input
        x = checkpoint_name(x, LAYER_INPUT)
        return apply(nnx.merge(graphdef, layer), x, entry)

    if compute.remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[compute.remat], prevent_cse=False)
    every = state, xs
    if last:
        every = jax.tree.map(lambda leaf: leaf[:-1], (state, xs))
    x, ys = jax.lax.scan(body, x, every, unroll=True if compute.unroll else 1)
    if last:  # what it keeps is used at once, so that nothing is gained by computing it twice
        state, xs = jax.tree.map(lambda leaf: leaf[-1], (state, xs))
        x, _ = last(nnx.merge(graphdef, state), x, xs)
    return x, ys
