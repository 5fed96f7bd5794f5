"""The short training loops that make the tiny tower and the tiny language model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from llava_jax.progress import progress
from llava_jax.train.optim import make_optimizer

Params = dict[str, jax.Array]


@dataclass(frozen=True)
class FitResult:
    """The trained parameters and the loss of every step."""

    params: Params
    losses: list[float]


def fit(
    loss: Callable[[Params, Params, Mapping[str, Any]], jax.Array],
    trained: Params,
    frozen: Params,
    batches: Iterator[Mapping[str, np.ndarray]],
    *,
    steps: int,
    lr: float,
    warmup_ratio: float,
    name: str,
    quiet: bool = False,
) -> FitResult:
    """Minimises loss(trained, frozen, batch) over `steps` batches with Muon (AdamW does not learn
    shapes in this few steps) under warm-up and cosine; `trained` is used up."""
    settings = ConfigDict(
        dict(
            optimizer="muon",
            muon_adam_lr_ratio=0.15,
            lr=lr,
            projector_lr=None,
            vision_lr=None,
            warmup_ratio=warmup_ratio,
            lr_end_ratio=0.01,
            weight_decay=0.05,
            clip_norm=1.0,
            b1=0.9,
            b2=0.98,
            eps=1e-8,
        )
    )
    optimizer, _ = make_optimizer(settings, sorted(trained), steps)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trained: Params, opt_state: Any, frozen: Params, batch: Mapping[str, Any]):
        value, grads = jax.value_and_grad(loss)(trained, frozen, batch)
        updates, opt_state = optimizer.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    params: Any = {key: trained[key] for key in sorted(trained)}
    opt_state = jax.jit(optimizer.init)(params)
    losses: list[jax.Array] = []
    with progress(steps, name, "step", quiet=quiet) as bar:
        for number in range(steps):
            params, opt_state, value = step(params, opt_state, frozen, next(batches))
            losses.append(value)
            if number % 10 == 9 or number == steps - 1:
                bar.set_postfix_str(f"loss {float(value):.4f}", refresh=False)
            bar.update()
    return FitResult(params, [float(value) for value in losses])


def epochs(count: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches of indices below `count`, for ever: reshuffled after every pass, none left out."""
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, np.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]
