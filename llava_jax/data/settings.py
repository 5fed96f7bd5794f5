"""The data settings of a run as the loader takes them, and the files that they name."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError, counted, did_you_mean
from llava_jax.images.decode import LIMITS, Limits
from llava_jax.setting import current
from llava_jax.settings import DataGroup, TrainSettings, check, rows, setting
from llava_jax.text.conversation import find_template
from llava_jax.text.labels import training_version


class DataFile(NamedTuple):
    """A file of records, the folder that its images are in, and how often an epoch shows each."""

    path: str
    image_folder: str
    weight: float


def split_paths(value: Any) -> tuple[str, ...]:
    """The paths of a setting: one, several with commas between them, or a tuple or list.

    A path that exists is taken as it is, commas and all. A leading ~ is the home folder: shells do
    not expand it after `--config.data.path=`.
    """
    if isinstance(value, (tuple, list)):
        parts = [str(v) for v in value]
    else:
        text = "" if value is None else str(value)
        whole = "," not in text or os.path.exists(text)  # Path.exists raises for a long list
        parts = [text] if whole else [piece.strip() for piece in text.split(",")]
        parts = [part for part in parts if part]
    return tuple(os.path.expanduser(part) for part in parts)


def data_files(data: Any) -> list[DataFile]:
    """The files of `data.path` with their `data.image_folder` and `data.weights`.

    data: anything with these three attributes. Raises ConfigError where their numbers differ, or
    for weights that leave nothing to train.
    """
    paths, folders = split_paths(data.path), split_paths(data.image_folder)
    weights = tuple(data.weights)
    if not paths:
        raise ConfigError("data.path is empty", fix="--config.data.path=FILE, a LLaVA JSON")
    if len(folders) > 1 and len(folders) != len(paths):
        raise ConfigError(
            f"data.image_folder names {len(folders)} folders for {len(paths)} files of data.path",
            fix="name one folder for all files, or one for each",
        )
    if weights and len(weights) != len(paths):
        raise ConfigError(
            f"data.weights has {counted(len(weights), 'number')} for {len(paths)} files of data.path",
            fix="give one for each file",
        )
    if weights and not any(weights):
        raise ConfigError("data.weights are all 0: there is nothing to train")
    folders = folders or ("",)
    if len(folders) == 1:
        folders *= len(paths)
    return [DataFile(*f) for f in zip(paths, folders, weights or (1.0,) * len(paths))]


def as_trained(data: Any, model: LlavaConfig) -> LlavaConfig:
    """`model` with the pixels and prompts that the settings `data` train it on.

    Captions (data.version plain) are no conversations: over them a model keeps its own template.
    Raises ConfigError where its tower cannot take such pixels.
    """
    template = training_version(data.version).template
    names = (model.template, LlavaConfig.template, template.name)  # of those alike, the best known
    alike = (n for n in names if replace(find_template(n), name=template.name) == template)
    name = model.template if template.style == "plain" else next(alike)
    ratio = data.image_aspect_ratio or model.image_aspect_ratio
    try:
        return replace(model, image_aspect_ratio=ratio, template=name)
    except ConfigError as error:
        what = f"data.image_aspect_ratio is {ratio!r}: {error.message}"
        raise ConfigError(what, fix="leave it empty: as the model says") from error


def padded_lengths(data: Any, longest: int | None) -> tuple[int, ...]:
    """The lengths that rows of the settings `data` have, where no sample is longer than `longest`.

    longest: None where data.length_buckets alone say it.
    """
    buckets = tuple(data.length_buckets)
    lengths = (*(n for n in buckets if n < longest), longest) if longest else buckets
    return (data.pack_length or lengths[-1],) if data.pack else lengths


@dataclass(frozen=True, kw_only=True)
class DataSettings(DataGroup):
    """The `data` group of a run's settings, checked, with what the loader needs besides.

    Raises ConfigError for a value that llava_jax.settings does not allow.
    """

    batch_size: int = setting(1, "samples of a step, over all hosts", low=1)
    seed: int = setting(TrainSettings.seed, "of everything that is drawn", low=0)
    bad_report: str = setting("", "JSON lines file that lists the bad samples")
    row_parts: int = setting(1, "into how many equal parts the rows of a step are cut", low=1)

    def __post_init__(self):
        object.__setattr__(self, "pack", current(_ROWS["pack"], self.pack))
        for name, row in _ROWS.items():
            check(row, getattr(self, name), f"data.{name}")

    @property
    def image_limits(self) -> Limits:
        """What an image may be at most, by the settings of the same names."""
        return Limits(**{name: getattr(self, name) for name in LIMITS})

    def completed(
        self, model_length: int | None, process_count: int = 1, row_parts: int = 1
    ) -> DataSettings:
        """With everything decided that was left to the model (its max_length) or to us.

        row_parts: into how many equal parts a step cuts its rows: micro-batches times devices along
        the batch. Raises ConfigError if the batch cannot be shared among them, or among
        `process_count` hosts.
        """
        parts = math.lcm(row_parts, process_count)
        if not self.pack and self.batch_size % process_count:
            raise ConfigError(
                f"batch_size {self.batch_size} is not a multiple of the {process_count} hosts"
            )
        if not self.pack and self.batch_size % parts:  # packed rows are filled up
            raise ConfigError(
                f"batch_size {self.batch_size} cannot be cut into {parts} equal parts "
                "(micro-batches times devices along the batch)",
                fix="change batch_size, grad_accum or mesh",
            )
        longest = self.max_length or model_length
        lengths = padded_lengths(dataclasses.replace(self, pack=""), longest)
        powers = (2**i for i in range(3, 32) if i == 3 or 2 ** (i - 1) < lengths[-1])
        self._check_packing(lengths[-1])
        return dataclasses.replace(
            self,
            max_length=longest,
            length_buckets=lengths,
            target_buckets=self.target_buckets or tuple(powers),
            pack_length=self.pack_length or lengths[-1],
            row_parts=parts,
        )

    def _check_packing(self, longest: int) -> None:
        """Raises ConfigError for settings that data.pack cannot follow."""
        if self.pack and 0 < self.pack_length < longest:
            raise ConfigError(
                f"data.pack_length {self.pack_length} is below the {longest} positions at which samples are cut",
                fix="raise it, or lower data.max_length",
            )
        if self.pack != "fill":
            return
        if self.group_by_modality:
            raise ConfigError(
                "data.group_by_modality makes batches of similar samples, which data.pack=fill "
                "takes apart",
                fix="--config.data.group_by_modality=false, or data.pack=exact",
            )
        if self.turns_per_sample:
            raise ConfigError(
                "data.turns_per_sample draws other turns in each epoch, so lengths change, and "
                "data.pack=fill plans with lengths",
                fix="--config.data.turns_per_sample=0, or data.pack=exact",
            )

    @classmethod
    def read(cls, config: Any) -> DataSettings:
        """From a mapping or ml_collections ConfigDict. Raises ConfigError for an unknown name."""
        if isinstance(config, cls):
            return config
        known = [f.name for f in dataclasses.fields(cls)]
        for name in config:
            if name not in known:
                fix = did_you_mean(name, known, "data.{}") or f"one of {', '.join(known)}"
                raise ConfigError(f"data.{name} is not a setting", fix=fix)
        values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return cls(**values)


_ROWS = rows(DataSettings)
