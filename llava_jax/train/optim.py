"""How the trained parameters are updated: schedule, rule by parameter, clipping, moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from llava_jax.params import is_stacked
from llava_jax.train.select import rates


def warmup_steps(ratio: float, steps: int) -> int:
    """Steps in which the rate rises: ceil(ratio * steps), as transformers' get_warmup_steps."""
    return math.ceil(ratio * steps)


def warmup_cosine(peak: float, steps: int, warmup_ratio: float, end_ratio: float = 0.0):
    """Linear warm-up over `warmup_steps` from 0, then a cosine to end_ratio * peak.

    The rule of transformers' get_cosine_schedule_with_warmup: update number 0 has rate 0 when
    there is a warm-up at all.
    """
    warmup = warmup_steps(warmup_ratio, steps)

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rising = count / max(1, warmup)
        progress = (count - warmup) / max(1, steps - warmup)
        cosine = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        return peak * jnp.where(count < warmup, rising, end_ratio + (1 - end_ratio) * cosine)

    return schedule


def is_muon(name: str) -> bool:
    """Matrices inside layers and of the projector; embeddings, head and vectors stay with Adam."""
    return name.endswith(".kernel") and (is_stacked(name) or name.startswith("projector."))


def rules(config: Any, names: Iterable[str]) -> dict[str, tuple[str, float, float]]:
    """{name: ("adamw" or "muon", peak learning rate, weight decay)} of the trained parameters `names`.

    What Muon leaves to Adam and no group sets has `muon_adam_lr_ratio` of lr and no decay.
    Raises ConfigError as llava_jax.train.select.rates does.
    """
    with_muon = config.optimizer == "muon"

    def default(name: str) -> tuple[float, float]:
        if with_muon and not is_muon(name):
            return config.lr * config.muon_adam_lr_ratio, 0.0
        return config.lr, config.weight_decay

    return {
        name: ("muon" if with_muon and is_muon(name) else "adamw", peak, decay)
        for name, (peak, decay) in rates(list(names), config, default).items()
    }


def make_optimizer(
    config: Any, names: Iterable[str], steps: int
) -> tuple[optax.GradientTransformation, dict[str, float]]:
    """(the optimizer over a flat dict with these names, peak learning rate by group label).

    adamw: decoupled weight decay (torch's AdamW). muon: optax.contrib.muon for matrices; the rest has
    AdamW, at `muon_adam_lr_ratio` of lr and without decay where no group says otherwise. Clipping by the
    global norm comes first, the moving average (`ema_decay`) last. Raises ConfigError as
    llava_jax.train.select.rates does.
    """
    labels, transforms, peaks = {}, {}, {}
    exact: dict[str, tuple[float, float]] = {}
    for name, (rule, peak, decay) in rules(config, names).items():
        label = f"{rule}_lr{peak:g}_wd{decay:g}"
        while exact.setdefault(label, (peak, decay)) != (peak, decay):
            label += "+"  # rates that differ after the sixth digit
        labels[name], peaks[label] = label, peak
        if label not in transforms:
            schedule = warmup_cosine(peak, steps, config.warmup_ratio, config.lr_end_ratio)
            transforms[label] = _rule(config, schedule, decay, rule)
    chain: list[Any] = [optax.transforms.partition(transforms, labels)]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.ema_decay:
        chain.append(moving_average(config.ema_decay))
    return optax.chain(*chain), peaks


def _rule(config: Any, schedule, decay: float, rule: str) -> optax.GradientTransformation:
    if rule == "muon":
        axes = cast(Any, _matrix_axes)
        return optax.contrib.muon(schedule, weight_decay=decay, muon_weight_dimension_numbers=axes)
    return optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay)


def _matrix_axes(params: Mapping[str, Any]) -> Any:
    """The last two axes are the matrix; a leading layer axis makes it a batch of matrices."""
    axes = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda p: axes(p.ndim - 2, p.ndim - 1), params)


# The moving average of the trained parameters -------------------------------------------------------


class AverageState(NamedTuple):
    """The moving average, a flat dict like the trained parameters."""

    average: Any


def moving_average(decay: float) -> optax.GradientTransformation:
    """Keeps decay * average + (1 - decay) * parameters after each update; starts from the parameters.

    It is a part of the optimizer's state, so that checkpoints hold it and a skipped step leaves it.
    """

    def init(params):
        # A copy: the step donates the parameters and this, which must not be one buffer.
        return AverageState(jax.tree.map(jnp.copy, params))

    def update(updates, state, params=None):
        new = optax.apply_updates(cast(Any, params), updates)
        average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, new)
        return updates, AverageState(average)

    return optax.GradientTransformation(init, update)


def exported_params(params: dict[str, Any], opt_state: Any) -> dict[str, Any]:
    """What a run exports: the moving average where there is one, else the trained parameters."""
    last = opt_state[-1] if isinstance(opt_state, tuple) and opt_state else None
    return last.average if isinstance(last, AverageState) else params
