"""What is checked before anything is loaded: the settings of every stage, devices, files, headers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from llava_jax import storage
from llava_jax.data.check import open_data
from llava_jax.data.settings import data_files, padded_lengths
from llava_jax.data.stored import is_packed
from llava_jax.errors import ConfigError, LlavaError
from llava_jax.settings import TRAINING, check, flat
from llava_jax.text.conversation import TEMPLATES
from llava_jax.train.evalsets import check_eval
from llava_jax.train.select import GROUPS, may_reach, param_groups
from llava_jax.train.trackers import check_trackers

log = logging.getLogger(__name__)

Stages = Sequence[tuple[str, Any]]
"""(name, settings) of each run, as llava_jax.train.stages.split_stages gives them."""


def check_stages(stages: Stages, *, files: bool = True) -> None:
    """`check_settings` of every stage; warns of a setting that has no effect in any.

    files: whether the data have to be there, too.
    """
    for name, config in stages:
        with _naming(name):
            check_settings(config, files=files)
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
    """Whether a setting that another one needs is set, or is or covers `value`."""
    if not value:
        return bool(found)
    if isinstance(found, tuple):
        return value in found or (value in GROUPS and may_reach(found, value))
    return found == value


@contextlib.contextmanager
def _naming(stage: str) -> Iterator[None]:
    """Within it, an error says which stage it is about."""
    try:
        yield
    except LlavaError as error:
        if stage:
            raise type(error)(f"stage {stage}: {error.message}", fix=error.fix) from error
        raise


# One stage -----------------------------------------------------------------------------------------


def check_settings(c: Any, *, files: bool = True) -> None:
    """Raises ConfigError, naming the setting, for a value of one stage that no run could mean.

    files: whether those of the data are looked for; none is read.
    """
    settings = dict(flat(c))
    for name, row in TRAINING.items():
        check(row, settings[name])
    if not c.steps and not c.epochs:
        raise ConfigError("steps and epochs are both 0: there is nothing to train")
    if not c.trainable:
        allowed = ", ".join(TRAINING["trainable"].choices)
        raise ConfigError("trainable is empty: nothing would be trained", fix=f"of {allowed}")
    param_groups(c)  # for what it raises
    if c.lora_rank and not may_reach(c.trainable, "lora"):
        raise ConfigError(
            f"lora_rank is {c.lora_rank}, but 'lora' is not in trainable {c.trainable}: "
            "the adapters would stay as they are",
            fix="--config.trainable=projector,lora trains them, --config.lora_rank=0 leaves them out",
        )
    if c.quantize and "language" in c.trainable:
        raise ConfigError(
            f"quantize is {c.quantize!r}, but 'language' is in trainable: its kernels would not be frozen",
            fix="--config.trainable=projector,lora trains adapters over them",
        )
    if c.loss_groups > 1 and c.data.pack:
        raise ConfigError(
            f"loss_groups is {c.loss_groups}, but with data.pack rows hold several samples",
            fix="leave loss_groups at 1, or data.pack off",
        )
    if c.loss_average == "micro" and c.data.pack and c.grad_accum > 1:
        raise ConfigError(
            "loss_average is 'micro', but data.pack deals a step's samples to micro-batches anew",
            fix="--config.loss_average=global, which packing does not change",
        )
    if c.exact_match and not c.data.holdout:
        raise ConfigError(
            "exact_match is set, but data.holdout is 0: there are no questions to ask",
            fix="--config.data.holdout=0.1 holds out a tenth of the images",
        )
    check_trackers(c.trackers)
    check_eval(c, files=files)
    # The original trains an unknown version as vicuna_v1 without a word.
    if c.data.version not in TEMPLATES:
        allowed = ", ".join(TEMPLATES)
        raise ConfigError(f"data.version {c.data.version!r} is unknown", fix=f"one of {allowed}")
    batch, rows = f"batch_size {c.batch_size} is", c.batch_size // c.grad_accum
    for what, count, name, parts in (
        (batch, c.batch_size, "grad_accum", c.grad_accum),
        (batch, c.batch_size, "data.groups", c.data.groups if c.data.group_by_modality else 1),
        (f"the {rows} rows of a micro-batch are", rows, "loss_groups", c.loss_groups),
    ):
        if count % parts:
            raise ConfigError(f"{what} not a multiple of {name} {parts}")
    for file in data_files(c.data) if files else ():
        if file.weight and not (is_packed(file.path) or storage.is_file(file.path)):
            raise ConfigError(f"{file.path}: no such data file", fix="set data.path")
        if file.image_folder and not storage.is_folder(file.image_folder):
            raise ConfigError(f"data.image_folder: there is no folder {file.image_folder}")


# What the stages meet ------------------------------------------------------------------------------


def check_devices(stages: Stages, devices: Sequence[Any] | None = None) -> None:
    """Raises ConfigError for a mesh that does not fit the devices, a batch that does not fit the mesh, and
    for a place that activations are to be moved to and the devices do not have.

    devices: None for those that are here.
    """
    from llava_jax.sharding import check_lengths, check_rows, make_mesh

    for name, config in stages:
        mesh, data = make_mesh(**config.mesh, devices=devices), config.data
        with _naming(name):
            check_remat(config.remat, mesh.devices.flat[0] if devices else mesh.local_devices[0])
            check_lengths(padded_lengths(data, data.max_length), mesh)
            if not data.pack:  # packed rows are filled up
                check_rows(config.batch_size, mesh, config.grad_accum)


def check_remat(remat: str, device: Any) -> None:
    """Raises ConfigError for "offload" where the device cannot use the host's memory."""
    from llava_jax.layers import OFFLOADED

    kinds = [memory.kind for memory in device.addressable_memories()]
    # GPUs that are not here, as llava-jax plan has them, name none.
    if remat == "offload" and kinds and OFFLOADED not in kinds:
        raise ConfigError(
            f"remat is 'offload', but {device.platform} devices have no {OFFLOADED} memory here",
            fix="--config.remat=full keeps the same activations on the device",
        )


def check_data_files(stages: Stages) -> None:
    """`open_data` of every stage, for what it raises; what it logs is left to the stage itself."""
    seen: list[Any] = []
    with _unsaid("llava_jax.data"):
        for name, config in stages:
            data = {**config.data, "batch_size": config.batch_size, "seed": config.seed}
            if data not in seen:
                with _naming(name):
                    open_data(data)
                seen.append(data)


@contextlib.contextmanager
def _unsaid(name: str) -> Iterator[None]:
    """Within it, the logger of that name says nothing but errors."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def check_model(stages: Stages) -> None:
    """Raises ConfigError for settings of any stage that the model to start from cannot follow.

    Only headers of its files are read. What that logs is left to the stage itself, which may be done.
    """
    from llava_jax.train.model_io import fit_model, open_model

    (_, first), *later = stages
    with _unsaid("llava_jax.convert"), _unsaid("llava_jax.train.model_io"):
        model = open_model(first).config
    for name, config in later:
        with _naming(name):
            model = fit_model(config, model)
