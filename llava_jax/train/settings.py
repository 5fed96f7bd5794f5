"""The settings of a run, checked before anything is loaded. Imports no jax.

`data.*` beyond its folder is checked by llava_jax.data.settings, `mesh` and `trainable` by those who
know the devices and the parameters.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from llava_jax.data.settings import data_files
from llava_jax.errors import ConfigError
from llava_jax.text.conversation import TEMPLATES
from llava_jax.train.names import flat

CHOICES = {
    "dtype": ("float32", "bfloat16"),
    "remat": ("none", "dots", "full"),
    "attention": ("", "xla", "cudnn"),
    "optimizer": ("adamw", "muon"),
    "loss_average": ("global", "micro"),
}

LIMITS = {  # lowest and highest value
    "batch_size": (1, math.inf),
    "grad_accum": (1, math.inf),
    "loss_groups": (1, math.inf),
    "steps": (0, math.inf),
    "epochs": (0, math.inf),
    "lr": (0, math.inf),
    "projector_lr": (0, math.inf),
    "vision_lr": (0, math.inf),
    "muon_adam_lr_ratio": (0, math.inf),
    "warmup_ratio": (0, 1),
    "lr_end_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "clip_norm": (0, math.inf),
    "b1": (0, 1),
    "b2": (0, 1),
    "lora_rank": (0, math.inf),
    "lora_dropout": (0, 1),
    "save_every": (1, math.inf),
    "keep_checkpoints": (1, math.inf),
    "data.threads": (0, math.inf),
    "data.prefetch": (0, math.inf),
    "data.holdout": (0, 1),
    "data.bad_limit": (0, 1),
}


def check_settings(config: Any) -> None:
    """Raises ConfigError, naming the setting, for a value that no run could mean.

    config: a whole stage, as llava_jax.train.stages.split_stages gives it.
    """
    settings = dict(flat(config))
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            allowed = ", ".join(repr(c) for c in choices)
            raise ConfigError(f"{name} {settings[name]!r} is unknown", fix=f"one of {allowed}")
    for name, (low, high) in LIMITS.items():
        value = settings[name]
        if value is not None and not low <= value <= high:
            allowed = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ConfigError(f"{name} is {value}, not {allowed}")
    if not config.steps and not config.epochs:
        raise ConfigError("steps and epochs are both 0: there is nothing to train")
    rows, rest = divmod(config.batch_size, config.grad_accum)
    if rest:
        raise ConfigError(
            f"batch_size {config.batch_size} is not a multiple of grad_accum {config.grad_accum}"
        )
    if rows % config.loss_groups and not config.data.pack:
        raise ConfigError(
            f"the {rows} rows of a micro-batch are not a multiple of loss_groups {config.loss_groups}"
        )
    check_data(config.data)


def check_data(data: Any) -> None:
    """Raises ConfigError for a data file or image folder that cannot be, or an unknown version.

    The original trains an unknown version as vicuna_v1 without a word; here that is a typing error.
    """
    for file in data_files(data):
        if file.image_folder and not Path(file.image_folder).is_dir():
            raise ConfigError(f"data.image_folder: there is no folder {file.image_folder}")
    if data.version not in TEMPLATES:
        allowed = ", ".join(TEMPLATES)
        raise ConfigError(f"data.version {data.version!r} is unknown", fix=f"one of {allowed}")


def changed_settings(config: Any, path: Path) -> list[str]:
    """The dotted names whose values differ from those that `keep_settings` wrote to `path`, if it did."""
    if not path.exists():
        return []
    before, now = dict(flat(json.loads(path.read_text()))), dict(flat(json.loads(_text(config))))
    return sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))


def keep_settings(config: Any, path: Path) -> None:
    """Writes the settings as JSON."""
    temporary = path.with_suffix(".tmp")  # a kill must not leave half of them
    temporary.write_text(_text(config))
    temporary.replace(path)


def _text(config: Any) -> str:
    return config.to_json_best_effort(indent=1, sort_keys=True)
