"""The tiny CLIP: a vision tower that learned from captions what is where.

CLIP learns by deciding which caption belongs to which picture. With a handful of words that task is
the same as naming the words, so a head that is thrown away afterwards does that: for each corner of
the picture one query pools the patches and names the colour and the shape there, or nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.tiny.fit import Loss, Params, fit
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute, matmul
from llava_jax.llava import Llava, binder

_HEAD = "head."


def train_tower(
    config: LlavaConfig,
    params: Params,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    steps: int,
    seed: int,
    lr: float = 0.02,
    batch_size: int = 64,
    quiet: bool = False,
) -> tuple[Params, list[float]]:
    """Trains the tower among `params`; (its parameters, the loss per step).

    config: its feature layer is the last one, so that every layer learns.
    images: uint8[N, H, W, 3]. labels: int32[N, places, 2], colour and shape at each
    place, counted from 1; 0 is nothing.
    """
    classes = tuple(int(n) for n in labels.reshape(-1, 2).max(axis=0) + 1)
    tower = {name: v for name, v in params.items() if name.startswith("vision.")}
    head = init_head(config.vision.width, labels.shape[1], sum(classes), seed)
    frozen = {name: v for name, v in params.items() if name not in tower}
    options: Any = dict(steps=steps, lr=lr, name="tower", quiet=quiet)
    trained, losses = fit(
        caption_loss(config, classes),
        tower | head,
        frozen,
        batches(images, labels, batch_size, seed),
        **options,
    )
    return {name: v for name, v in trained.items() if not name.startswith(_HEAD)}, losses


def init_head(width: int, places: int, outputs: int, seed: int) -> Params:
    """Random parameters of the head; their names start with "head."."""
    keys = jax.random.split(jax.random.key(seed + 1), 4)
    std = width**-0.5
    return {
        "head.query": jax.random.normal(keys[0], (places, width)),
        "head.k": jax.random.normal(keys[1], (width, width)) * std,
        "head.v": jax.random.normal(keys[2], (width, width)) * std,
        "head.out": jax.random.normal(keys[3], (width, outputs)) * std,
    }


def caption_loss(config: LlavaConfig, classes: tuple[int, ...]) -> Loss:
    """The loss of naming colour and shape. classes: how many there are of each, nothing included."""
    bind = binder(config, Compute(unroll=True))

    def loss(trained: Params, frozen: Params, batch: Mapping[str, Any]) -> jax.Array:
        tower = {name: v for name, v in trained.items() if not name.startswith(_HEAD)}
        logits = head_logits(bind({**frozen, **tower}), trained, batch["images"])
        total, start = jnp.float32(0), 0
        for i, size in enumerate(classes):
            part, target = logits[..., start : start + size], batch["labels"][..., i]
            total += optax.softmax_cross_entropy_with_integer_labels(part, target).mean()
            start += size
        return total

    return loss


def head_logits(model: Llava, head: Params, images: jax.Array) -> jax.Array:
    """images uint8[B, H, W, 3] -> float32[B, places, outputs], one attention pool per place."""
    features = _standardize(model.image_features(images))  # [B, I, D]
    query = head["head.query"]  # [Q, D]
    keys, values = matmul(features, head["head.k"]), matmul(features, head["head.v"])
    scores = jnp.einsum("qd,bid->bqi", query, keys) * query.shape[1] ** -0.5
    pooled = jnp.einsum("bqi,bid->bqd", jax.nn.softmax(scores, axis=-1), values)
    return matmul(_standardize(pooled), head["head.out"])


def _standardize(x: jax.Array) -> jax.Array:
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)


def batches(
    images: np.ndarray, labels: np.ndarray, size: int, seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches for ever: every image once before any image twice."""
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < size:
            waiting = np.concatenate([waiting, rng.permutation(len(images))])
        chosen, waiting = waiting[:size], waiting[size:]
        yield {"images": images[chosen], "labels": labels[chosen]}
