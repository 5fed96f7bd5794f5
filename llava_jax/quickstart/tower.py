"""Makes the tiny "CLIP": a vision tower that learned from captions what is where.

Real CLIP learns by telling which caption belongs to which picture. With a handful of words that
task is the same as naming the words, so a throw-away head does that: one query for each place that
the captions know pools the patches and names the colour and the shape there, or "nothing".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llava_jax.config import LlavaConfig
from llava_jax.data.pixels import augment
from llava_jax.layers import Compute, matmul
from llava_jax.llava import Llava, binder
from llava_jax.quickstart.fit import FitResult, Params, epochs, fit
from llava_jax.train.optim import trainable_names

_HEAD = "head."


def train_tower(
    config: LlavaConfig,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    lr: float,
    batch_size: int,
    augmentation: str = "",
    seed: int = 0,
    quiet: bool = False,
) -> FitResult:
    """Trains the tower's parameters among `params`; the result holds those alone.

    images: uint8[N, H, W, 3]; labels: int32[N, places, 2], see `CaptionWords.labels`.
    augmentation: a rule of llava_jax.data.pixels.augment.
    """
    classes = tuple(int(n) for n in labels.reshape(-1, 2).max(axis=0) + 1)
    tower = {name: params[name] for name in sorted(trainable_names(params, ["vision"]))}
    head = init_head(config.vision.width, labels.shape[1], sum(classes), seed)
    result = fit(
        caption_loss(config, classes),
        tower | head,
        {k: v for k, v in params.items() if k not in tower},
        _batches(images, labels, batch_size, augmentation, seed),
        steps=steps,
        lr=lr,
        warmup_ratio=0.1,
        name="tower",
        quiet=quiet,
    )
    kept = {k: v for k, v in result.params.items() if not k.startswith(_HEAD)}
    return FitResult(kept, result.losses)


def init_head(width: int, places: int, outputs: int, seed: int) -> Params:
    """Random parameters of the throw-away head; its names start with "head."."""
    keys = jax.random.split(jax.random.key(seed + 1), 4)
    std = width**-0.5
    return {
        "head.query": jax.random.normal(keys[0], (places, width)),
        "head.k": jax.random.normal(keys[1], (width, width)) * std,
        "head.v": jax.random.normal(keys[2], (width, width)) * std,
        "head.out": jax.random.normal(keys[3], (width, outputs)) * std,
    }


def caption_loss(config: LlavaConfig, classes: tuple[int, ...]):
    """loss(trained, frozen, batch) of naming colour and shape; batch holds images and labels."""
    bind = binder(config, Compute(unroll=True))

    def loss(trained: Params, frozen: Params, batch: Mapping[str, Any]) -> jax.Array:
        tower = {k: v for k, v in trained.items() if not k.startswith(_HEAD)}
        logits = head_logits(bind({**frozen, **tower}), trained, batch["images"])
        total, start = jnp.float32(0), 0
        for i, size in enumerate(classes):
            part, target = logits[..., start : start + size], batch["labels"][..., i]
            total += optax.softmax_cross_entropy_with_integer_labels(part, target).mean()
            start += size
        return total

    return loss


def head_logits(model: Llava, head: Params, images: jax.Array) -> jax.Array:
    """images uint8[B, H, W, 3] -> float32[B, places, outputs], by one attention pool a place."""
    features = _standardize(model.image_features(images))
    query = head["head.query"]
    keys, values = matmul(features, head["head.k"]), matmul(features, head["head.v"])
    scores = jnp.einsum("qd,bid->bqi", query, keys) * query.shape[1] ** -0.5
    pooled = jnp.einsum("bqi,bid->bqd", jax.nn.softmax(scores, axis=-1), values)
    return matmul(_standardize(pooled), head["head.out"])


def _standardize(x: jax.Array) -> jax.Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def _batches(
    images: np.ndarray, labels: np.ndarray, size: int, augmentation: str, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng([seed, 1])
    for chosen in epochs(len(images), size, seed):
        pixels = images[chosen]
        if augmentation:
            pixels = np.stack([augment(p, augmentation, rng) for p in pixels])
        yield {"images": pixels, "labels": labels[chosen]}
