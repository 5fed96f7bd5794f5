"""The short training loop that both halves of the tiny starting model go through."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from llava_jax.progress import progress
from llava_jax.train.optim import make_optimizer

Params = dict[str, jax.Array]
Loss = Callable[[Params, Params, Mapping[str, Any]], jax.Array]
"""loss(trained, frozen, batch) -> float32[]"""


def fit(
    loss: Loss,
    trained: Params,
    frozen: Params,
    batches: Iterator[Mapping[str, np.ndarray]],
    *,
    steps: int,
    lr: float,
    name: str,
    quiet: bool = False,
) -> tuple[Params, list[float]]:
    """Minimises loss(trained, frozen, batch) over `steps` batches; (parameters, loss per step).

    Muon, because AdamW does not learn shapes in this few steps, with warm-up and cosine decay.
    `trained` is donated and cannot be used afterwards.
    """
    settings = ConfigDict(
        {
            **dict(optimizer="muon", muon_adam_lr_ratio=0.15, lr=lr, weight_decay=0.05),
            **dict(projector_lr=None, vision_lr=None, param_groups=(), ema_decay=0.0),
            **dict(warmup_ratio=0.1, lr_end_ratio=0.01),
            **dict(clip_norm=1.0, b1=0.9, b2=0.98, eps=1e-8),
        }
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
    return params, [float(value) for value in losses]
