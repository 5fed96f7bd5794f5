"""The CLIP vision transformer, up to the layer whose output LLaVA uses.

Source of the architecture: openai/clip-vit-large-patch14-336 as implemented in transformers'
modeling_clip (pre-LN blocks, quick_gelu, a class token, learned absolute positions).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from llava_jax.attention import PLAIN, Choice, attention
from llava_jax.config import LoraConfig, VisionConfig
from llava_jax.layers import (
    ATTENTION,
    Compute,
    LayerNorm,
    Linear,
    linears_of,
    normal,
    run_layers,
    stack_layers,
)
from llava_jax.sharding import IMAGES, constrain


def quick_gelu(x: jax.Array) -> jax.Array:
    """x * sigmoid(1.702 x): CLIP's approximation, which is not interchangeable with GELU."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}


class PatchEmbed(nnx.Module):
    """Cuts images into patches and projects them: a bias-free convolution, kernel [p, p, 3, D]."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        p, d = config.patch_size, config.width
        self.kernel = nnx.Param(
            normal(rngs.params(), (p, p, 3, d), (3 * p * p) ** -0.5),
            out_sharding=(None, None, None, "embed"),
        )

    def __call__(self, images_MHWC: jax.Array) -> jax.Array:
        """dtype[M, H, W, 3] -> dtype[M, patches, D], patches row by row."""
        p, d = self.kernel.shape[0], self.kernel.shape[-1]
        m, height, width, _ = images_MHWC.shape
        rows, columns = height // p, width // p
        # A convolution whose stride is its width is one matmul over flattened patches.
        x = images_MHWC.reshape(m, rows, p, columns, p, 3)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(
            m * rows * columns, p * p * 3
        )  # [M*patches, p*p*3]
        kernel = self.kernel[...].reshape(p * p * 3, d).astype(x.dtype)  # [p*p*3, D]
        return (x @ kernel).reshape(m, rows * columns, d)  # [M, patches, D]


class ClipAttention(nnx.Module):
    """Multi-head self-attention over all patches, biases on every projection."""

    def __init__(self, config: VisionConfig, linear: Callable[..., Linear]):
        d = config.width
        self.heads = config.heads
        self.q = linear("attn.q", d, d, ("embed", "heads"), bias=True)
        self.k = linear("attn.k", d, d, ("embed", "heads"), bias=True)
        self.v = linear("attn.v", d, d, ("embed", "heads"), bias=True)
        self.out = linear("attn.out", d, d, ("heads", "embed"), bias=True, gain=0.5)

    def __call__(self, x_MSD: jax.Array, kernel: Choice, keys) -> jax.Array:
        split = (*x_MSD.shape[:2], self.heads, x_MSD.shape[2] // self.heads)
        q, k, v = (
            checkpoint_name(f(x_MSD, key).reshape(split), ATTENTION)
            for f, key in zip((self.q, self.k, self.v), keys)
        )  # [M, S, N, H]
        y = attention(q, k, v, None, kernel)  # [M, S, N, H]
        return checkpoint_name(self.out(y.reshape(x_MSD.shape), keys[3]), ATTENTION)  # [M, S, D]

    def looks(self, x_MSD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(the class token's attention summed over heads, float32[M, S]; the heads' mean key [M, S, H])."""
        m, s, d = x_MSD.shape
        k = self.k(x_MSD, None).reshape(m, s, self.heads, d // self.heads)
        q = self.q(x_MSD[:, :1], None).reshape(m, self.heads, d // self.heads)
        scores = jnp.einsum("mnh,msnh->mns", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * (d // self.heads) ** -0.5)
        return weights.sum(1), k.mean(2)


class ClipMlp(nnx.Module):
    """Two linear layers with CLIP's activation between them."""

    def __init__(self, config: VisionConfig, linear: Callable[..., Linear]):
        d, f = config.width, config.mlp_width
        self.act = config.hidden_act
        self.fc1 = linear("mlp.fc1", d, f, ("embed", "mlp"), bias=True)
        self.fc2 = linear("mlp.fc2", f, d, ("mlp", "embed"), bias=True, gain=0.5)

    def __call__(self, x: jax.Array, keys) -> jax.Array:
        x = ACTIVATIONS[self.act](self.fc1(x, keys[4]))  # [M, S, F]
        return self.fc2(x, keys[5])  # [M, S, D]


class ClipLayer(nnx.Module):
    """One pre-LN transformer block."""

    def __init__(self, config: VisionConfig, lora: LoraConfig | None = None, *, rngs: nnx.Rngs):
        linear = linears_of("vision.layers", lora, rngs=rngs)
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn = ClipAttention(config, linear)
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = ClipMlp(config, linear)

    def __call__(self, x: jax.Array, kernel: Choice = PLAIN, key=None) -> jax.Array:
        keys = [None] * 6 if key is None else jax.random.split(key, 6)  # one per Linear
        x = x + self.attn(self.norm1(x), kernel, keys)
        return x + self.mlp(self.norm2(x), keys)


class ClipTail(nnx.Module):
    """The layers after the feature layer: never run, stored so that checkpoints stay complete."""

    def __init__(self, config: VisionConfig, layers: int, *, rngs: nnx.Rngs):
        if layers:
            self.layers = stack_layers(lambda r: ClipLayer(config, rngs=r), layers, rngs)
        self.post_norm = LayerNorm(config.width, config.norm_eps)


class ClipVision(nnx.Module):
    """The tower. The first `layers_run` layers produce the features; `tail` holds the others."""

    def __init__(
        self,
        config: VisionConfig,
        layers_run: int,
        compute: Compute,
        lora: LoraConfig | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.compute, self.layers_run = compute, layers_run
        d = config.width
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.class_embed = nnx.Param(normal(rngs.params(), (d,), 0.3), out_sharding=(None,))
        self.pos_embed = nnx.Param(
            normal(rngs.params(), (1 + config.patches, d), 0.3), out_sharding=(None, "embed")
        )
        self.pre_norm = LayerNorm(d, config.norm_eps)
        if layers_run:
            self.layers = stack_layers(lambda r: ClipLayer(config, lora, rngs=r), layers_run, rngs)
        self.tail = ClipTail(config, config.layers - layers_run, rngs=rngs)

    def __call__(self, images_MHWC: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """float[M, H, W, 3], normalised -> dtype[M, 1 + patches, D], the class token first.

        dropout_key: turns LoRA dropout on (training).
        """
        x = self._embedded(images_MHWC)
        if not hasattr(self, "layers"):
            return x

        def apply(layer, x, key):
            return layer(x, self.compute.attention, key), None

        keys = None if dropout_key is None else jax.random.split(dropout_key, self.layers_run)
        return run_layers(self.layers, apply, x, keys, self.compute)[0]

    def with_looks(self, images_MHWC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The features, and ClipAttention.looks of the layer that gives them."""

        def apply(layer, carry, _):  # what the last layer is given stays, beside what it gives
            return (layer(carry[0], self.compute.attention), carry[0]), None

        x = self._embedded(images_MHWC)
        (x, given), _ = run_layers(self.layers, apply, (x, x), None, self.compute)
        graphdef, stack = nnx.split(self.layers)
        last: Any = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[-1], stack))
        return (x, *last.attn.looks(last.norm1(given)))

    def _embedded(self, images_MHWC: jax.Array) -> jax.Array:
        """dtype[M, 1 + patches, D]: what the first layer is given."""
        dtype = self.compute.dtype
        x = self.patch_embed(images_MHWC.astype(dtype))  # [M, patches, D]
        class_token = jnp.broadcast_to(self.class_embed[...].astype(dtype), (len(x), 1, x.shape[2]))
        x = jnp.concatenate([class_token, x], axis=1)  # [M, 1 + patches, D]
        # Else XLA takes the split of pos_embed for that of x: every device runs all images.
        x = constrain(x + self.pos_embed[...].astype(dtype), IMAGES)  # [M, 1 + patches, D]
        return self.pre_norm(x)
