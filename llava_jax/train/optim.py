"""Which parameters are trained, at which learning rate and by which rule, all determined by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from llava_jax.errors import ConfigError
from llava_jax.params import is_lora, is_run, is_stacked

GROUPS: dict[str, Callable[[str], bool]] = {
    "projector": lambda name: name.startswith("projector."),
    "language": lambda name: name.startswith("language.") and not is_lora(name),
    "embed": lambda name: name == "language.embed.embedding",
    "lora": is_lora,
    # What follows the feature layer has no gradient, and weight decay must not touch it.
    "vision": lambda name: name.startswith("vision.") and is_run(name),
}
"""The parts of a model that `trainable` may name."""


def trainable_names(names: Iterable[str], groups: Iterable[str]) -> set[str]:
    """The names that `groups` (keys of GROUPS) cover. Raises ConfigError for one that covers none."""
    names, chosen = list(names), set()
    for group in groups:
        covered = {n for n in names if GROUPS[group](n)}
        if not covered:
            raise ConfigError(f"trainable: the model has no {group!r} parameters")
        chosen |= covered
    return chosen


def warmup_cosine(peak: float, steps: int, warmup_ratio: float, end_ratio: float = 0.0):
    """Linear warm-up over ceil(ratio * steps) from 0, then a cosine to end_ratio * peak.

    The rule of transformers' get_cosine_schedule_with_warmup: update number 0 has rate 0 when
    there is a warm-up at all.
    """
    warmup = math.ceil(warmup_ratio * steps)

    def schedule(count):
        count = jnp.asarray(count, jnp.float32)
        rising = count / max(1, warmup)
        progress = (count - warmup) / max(1, steps - warmup)
        cosine = jnp.maximum(0.0, 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        return peak * jnp.where(count < warmup, rising, end_ratio + (1 - end_ratio) * cosine)

    return schedule


def has_decay(name: str) -> bool:
    """Weight decay leaves out norms and biases (transformers' Trainer.get_decay_parameter_names)."""
    return not name.endswith((".scale", ".bias"))


def learning_rate_of(name: str, config: Any) -> float:
    """Peak learning rate of a parameter: `lr`, or the group's own where one is set."""
    own = {"projector": config.projector_lr, "vision": config.vision_lr}
    peak = own.get(name.partition(".")[0])
    return config.lr if peak is None else peak


def is_muon(name: str) -> bool:
    """Matrices inside layers and of the projector; embeddings, head and vectors stay with Adam."""
    return name.endswith(".kernel") and (is_stacked(name) or name.startswith("projector."))


def make_optimizer(
    config: Any, names: Iterable[str], steps: int
) -> tuple[optax.GradientTransformation, dict[str, float]]:
    """(the optimizer over a flat dict with these names, peak learning rate by group label).

    adamw: decoupled weight decay (torch's AdamW). muon: optax.contrib.muon for matrices, AdamW at
    `muon_adam_lr_ratio` of the rate for the rest. Clipping by the global norm comes first.
    """
    labels, transforms, peaks = {}, {}, {}
    with_muon = config.optimizer == "muon"
    for name in names:
        peak = learning_rate_of(name, config)
        muon = with_muon and is_muon(name)
        if with_muon and not muon:
            peak *= config.muon_adam_lr_ratio
        decay = config.weight_decay if has_decay(name) and muon == with_muon else 0.0
        label = f"{'muon' if muon else 'adamw'}_lr{peak:g}_wd{decay:g}"
        labels[name], peaks[label] = label, peak
        if label not in transforms:
            schedule = warmup_cosine(peak, steps, config.warmup_ratio, config.lr_end_ratio)
            transforms[label] = _rule(config, schedule, decay, muon)
    chain: list[Any] = [optax.transforms.partition(transforms, labels)]
    if config.clip_norm:
        chain.insert(0, optax.clip_by_global_norm(config.clip_norm))
    return optax.chain(*chain), peaks


def _rule(config: Any, schedule, decay: float, muon: bool) -> optax.GradientTransformation:
    if muon:
        axes = cast(Any, _matrix_axes)
        return optax.contrib.muon(schedule, weight_decay=decay, muon_weight_dimension_numbers=axes)
    return optax.adamw(schedule, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=decay)


def _matrix_axes(params: Mapping[str, Any]) -> Any:
    """The last two axes are the matrix; a leading layer axis makes it a batch of matrices."""
    axes = optax.contrib.MuonDimensionNumbers
    return jax.tree.map(lambda p: axes(p.ndim - 2, p.ndim - 1), params)
