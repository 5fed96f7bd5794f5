"""One optimizer step: loss, gradients over micro-batches, update. Pure functions over flat dicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute
from llava_jax.llava import binder
from llava_jax.text.constants import IGNORE
from llava_jax.train.loss import loss_by_file, mean_loss, supervised_nll

Params = dict[str, jax.Array]
DECODER = "language.layers."
RECENT = 128
"""Steps over which a spike is judged."""


class TrainState(NamedTuple):
    """What changes from step to step, and what a checkpoint holds."""

    step: jax.Array  # int32[]
    params: Params  # the trained parameters, float32
    opt_state: Any
    recent: Any = None  # float32[2, RECENT]: loss and gradient norm of the last steps; spikes only


def make_loss(
    config: LlavaConfig, compute: Compute, groups: int = 1, z_loss: float = 0.0, files: int = 0
) -> Callable:
    """loss(trained, frozen, batch, key) -> float32[]: token-mean loss of one micro-batch.

    Trained float32 parameters are cast to the compute dtype first, as a bf16 copy beside fp32
    masters; LoRA dropout is on when `key` is given. Logits, and what follows the last layer's attention
    where that costs no memory, are computed at supervised positions alone. z_loss: see
    llava_jax.train.loss.supervised_nll. files: with the number of data files, the loss is a pair with
    that of `loss_by_file`.
    """
    bind = binder(config, compute)

    def loss(trained: Params, frozen: Params, batch, key=None):
        model = bind({**frozen, **computed_with(trained, compute.dtype)})
        # Taking the last layer out of a scanned stack copies the stack, as casting trained weights does
        # anyway. Of frozen ones that copy would be the largest array of all.
        prune = compute.unroll or not any(name.startswith(DECODER) for name in frozen)
        hidden = model(batch, key, batch["target_at"], prune)
        nll = supervised_nll(model, hidden, batch["targets"], z_loss=z_loss)
        value = mean_loss(nll, batch["targets"], groups)
        return (value, loss_by_file(nll, batch, files)) if files else value

    return loss


def computed_with(trained: Params, dtype: Any) -> Params:
    """The trained parameters in the type of the computation, but for DoRA's magnitudes: rounded, they
    would change the base before the first step."""
    return {n: v if n.endswith(".lora_m") else v.astype(dtype) for n, v in trained.items()}


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    *,
    average: str,
    seed: int | None,
    spikes: float = 0.0,
    groups: Sequence[Sequence[str]] = (),
    by_file: bool = False,
) -> Callable:
    """step(state, frozen, batch) -> (state, metrics). Batch arrays are [A, rows, ...].

    average: "micro" weighs the A micro-batches alike (the original's gradient accumulation),
    "global" weighs every supervised token of the A micro-batches alike.
    seed: of LoRA dropout; None without. metrics: loss float32[], micro_loss float32[A],
    grad_norm float32[], ok bool[]. A step with a non-finite loss or gradient, or with a spike, changes
    nothing but the step number (ok False). spikes: see `is_spike`; 0 is off, and the state then has no
    `recent`. groups: lists of names, whose norms (see `_norms`) are then in metrics. by_file: whether
    `loss` has the losses by data file beside it, whose sum over the micro-batches is metrics["files"].
    """

    def step(state: TrainState, frozen: Params, batch):
        weight = micro_weights(batch["targets"], average)
        keys = None
        if seed is not None:
            key = jax.random.fold_in(jax.random.key(seed), state.step)
            keys = jax.random.split(key, len(weight))

        def micro(total, piece):
            rows, w, key = piece
            found, grads = jax.value_and_grad(loss, has_aux=by_file)(
                state.params, frozen, rows, key
            )
            return jax.tree.map(lambda t, g: t + w * g, total, grads), found

        grads, found = _summed(micro, state.params, (batch, weight, keys))
        values, sums = found if by_file else (found, jnp.zeros(()))
        norm = jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads)))
        ok = jnp.isfinite(norm) & jnp.all(jnp.isfinite(values))
        loss_value, recent = jnp.sum(values * weight), state.recent
        if spikes:
            found = jnp.stack([loss_value, norm])
            ok &= ~is_spike(found, recent, spikes)
            recent = jnp.concatenate([recent[:, 1:], found[:, None]], 1)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        keep = lambda new, old: jnp.where(ok, new, old)  # noqa: E731
        new = TrainState(
            state.step + 1,
            jax.tree.map(keep, params, state.params),
            jax.tree.map(keep, opt_state, state.opt_state),
            jax.tree.map(keep, recent, state.recent),
        )
        metrics = {"loss": loss_value, "micro_loss": values, "grad_norm": norm, "ok": ok}
        if by_file:
            metrics["files"] = sums.sum(0)
        return new, metrics | _norms(grads, updates, groups)

    return step


def _summed(micro: Callable, params: Params, pieces: Any) -> tuple[Params, Any]:
    """`micro` over the micro-batches of `pieces`: (summed gradients, what else it gives, stacked)."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    if len(pieces[1]) > 1:
        return jax.lax.scan(micro, zeros, pieces)
    grads, found = micro(zeros, jax.tree.map(lambda x: x[0], pieces))
    return grads, jax.tree.map(lambda x: x[None], found)


def _norms(grads: Any, updates: Any, groups: Sequence[Sequence[str]]) -> dict[str, jax.Array]:
    """{"norms": float32[2, groups]}: Euclidean, of each group's part of gradients and updates."""
    if not groups:
        return {}
    squares = [{name: jnp.sum(x * x) for name, x in tree.items()} for tree in (grads, updates)]
    sums = [[sum(of[name] for name in names) for names in groups] for of in squares]
    return {"norms": jnp.sqrt(jnp.stack([jnp.stack(row) for row in sums]))}


def micro_weights(targets: jax.Array, average: str) -> jax.Array:
    """float32[A]: what each micro-batch of `targets` [A, B, P] counts; `average` as for make_step."""
    count = (targets != IGNORE).sum((1, 2)).astype(jnp.float32)
    if average == "micro":
        return jnp.full(len(count), 1 / len(count))
    return count / jnp.maximum(count.sum(), 1)


def no_recent() -> jax.Array:
    """`TrainState.recent` before the first step: NaN where nothing was seen yet."""
    return jnp.full((2, RECENT), jnp.nan, jnp.float32)


def is_spike(found: jax.Array, recent: jax.Array, deviations: float) -> jax.Array:
    """bool[]: whether loss or gradient norm is so many standard deviations above its recent mean.

    found: float32[2]; recent: float32[2, RECENT] of the steps that counted. Nothing is a spike before
    half of RECENT is known.

    The rule, with 6 deviations of 128 steps, is that of OLMo-core
    (src/olmo_core/optim/skip_step_optimizer.py), whose deviation is of a sample and both ways, and of
    Levanter (src/levanter/optim/skipstep.py), upwards alone and of at least 1e-6. In both, skipped steps
    are among the recent ones: a loss that stays a thousand times as high widens the deviation, and
    trains after some three skipped steps. Here they are not, and such a run ends by `max_skipped`.
    """
    mean, spread = jnp.nanmean(recent, 1), jnp.nanstd(recent, 1, ddof=1)
    spread = jnp.maximum(spread, 1e-6 * (1 + mean))  # rounding of what stays the same is no spike
    known = jnp.isfinite(recent[0]).sum() >= RECENT // 2
    return known & jnp.any(found > mean + deviations * spread)
