"""The settings of a run, checked before anything is loaded. Imports no jax.

`check_settings` looks at one stage by itself, `check_stages` at all of them, `check_data_files` at
what they read, and `fit_model` at the model that they are for.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.data.check import open_data
from llava_jax.data.settings import data_files
from llava_jax.errors import ConfigError, LlavaError
from llava_jax.settings import TRAINING, check, flat
from llava_jax.text.conversation import TEMPLATES

log = logging.getLogger(__name__)


def check_settings(config: Any) -> None:
    """Raises ConfigError, naming the setting, for a value that no run could mean.

    config: a whole stage, as llava_jax.train.stages.split_stages gives it. Files are looked for, not
    read.
    """
    settings = dict(flat(config))
    for name, row in TRAINING.items():
        check(row, settings[name])
    if not config.steps and not config.epochs:
        raise ConfigError("steps and epochs are both 0: there is nothing to train")
    _check_trainable(config)
    _check_rows(config)
    _check_data(config)


def _check_trainable(config: Any) -> None:
    if not config.trainable:
        allowed = ", ".join(TRAINING["trainable"].choices)
        raise ConfigError("trainable is empty: nothing would be trained", fix=f"of {allowed}")
    if config.lora_rank and "lora" not in config.trainable:
        raise ConfigError(
            f"lora_rank is {config.lora_rank}, but 'lora' is not in trainable {config.trainable}: "
            "the adapters would stay as they are",
            fix="--config.trainable=projector,lora trains them, --config.lora_rank=0 leaves them out",
        )


def _check_rows(config: Any) -> None:
    rows, rest = divmod(config.batch_size, config.grad_accum)
    if rest:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of grad_accum {config.grad_accum}"
        )
    if config.loss_groups > 1 and config.data.pack:
        raise ConfigError(
            f"loss_groups is {config.loss_groups}, but with data.pack rows hold several samples",
            fix="leave loss_groups at 1, or data.pack off",
        )
    if rows % config.loss_groups:
        raise ConfigError(
            f"the {rows} rows of a micro-batch are not a multiple of loss_groups {config.loss_groups}"
        )
    if config.data.group_by_modality and config.batch_size % config.data.groups:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of data.groups {config.data.groups}"
        )


def _check_data(config: Any) -> None:
    """The original trains an unknown version as vicuna_v1 without a word; here it is an error."""
    data = config.data
    if data.version not in TEMPLATES:
        allowed = ", ".join(TEMPLATES)
        raise ConfigError(f"data.version {data.version!r} is unknown", fix=f"one of {allowed}")
    if config.exact_match and not data.holdout:
        raise ConfigError(
            "exact_match is set, but data.holdout is 0: there are no questions to ask",
            fix="--config.data.holdout=0.1 keeps a tenth of the images aside",
        )
    for file in data_files(data):
        if file.weight and not Path(file.path).is_file():
            raise ConfigError(f"{file.path}: no such data file", fix="set data.path")
        if file.image_folder and not Path(file.image_folder).is_dir():
            raise ConfigError(f"data.image_folder: there is no folder {file.image_folder}")


# All stages ----------------------------------------------------------------------------------------


def check_stages(stages: Sequence[tuple[str, Any]]) -> None:
    """`check_settings` of every stage, by name; a setting without effect in any is warned of.

    stages: of llava_jax.train.stages.split_stages.
    """
    for name, config in stages:
        _of_stage(name, check_settings, config)
    runs = [dict(flat(config)) for _, config in stages]
    for name, row in TRAINING.items():
        need, _, value = row.needs.partition("=")
        changed = [run[name] for run in runs if run[name] != row.default]
        if need and changed and not any(_is_met(run[need], value) for run in runs):
            wanted = f"{need} is set"
            if value:
                wanted = f"{need} {'has' if isinstance(runs[0][need], tuple) else 'is'} {value!r}"
            log.warning("%s = %r has no effect unless %s", name, changed[0], wanted)


def _is_met(found: Any, value: str) -> bool:
    """Whether a setting that another one needs is set, or is or contains `value`."""
    if not value:
        return bool(found)
    return value in found if isinstance(found, tuple) else found == value


def check_data_files(stages: Sequence[tuple[str, Any]]) -> None:
    """`open_data` of every stage, for what it raises; what it logs is left to the stage itself."""
    seen: list[Any] = []
    logger = logging.getLogger("llava_jax.data")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        for name, config in stages:
            data = {**config.data, "batch_size": config.batch_size, "seed": config.seed}
            if data not in seen:
                _of_stage(name, open_data, data)
                seen.append(data)
    finally:
        logger.setLevel(before)


def _of_stage(name: str, check: Callable, *args: Any) -> None:
    try:
        check(*args)
    except LlavaError as error:
        if name:
            raise type(error)(f"stage {name}: {error.message}", fix=error.fix) from error
        raise


# The model -----------------------------------------------------------------------------------------


def fit_model(config: Any, model: LlavaConfig) -> LlavaConfig:
    """The configuration of `model`, a checkpoint's, as `config` trains it: with LoRA and length.

    Raises ConfigError for settings that the model cannot follow. An adapter that is continued keeps
    its own rank and alpha: settings that differ from them are an error.
    """
    length, positions = config.data.max_length, model.language.max_positions
    if length > positions:
        raise ConfigError(
            f"data.max_length is {length}, but the model has {positions} positions",
            fix=f"--config.data.max_length={positions}",
        )
    lora = model.lora
    if config.lora_rank:
        lora = LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout)
        if model.lora and (model.lora.rank, model.lora.alpha) != (lora.rank, lora.alpha):
            own = model.lora
            raise ConfigError(
                f"lora_rank {lora.rank} and lora_alpha {lora.alpha:g} differ from the adapter that "
                f"{config.model.init} holds: rank {own.rank}, alpha {own.alpha:g}",
                fix="--config.lora_rank=0 goes on with the adapter as it is",
            )
    if "lora" in config.trainable and lora is None:
        raise ConfigError("'lora' is in trainable, but there are no adapters", fix="set lora_rank")
    return dataclasses.replace(model, lora=lora, max_length=length or model.max_length)
