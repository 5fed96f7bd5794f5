"""The `data` part of a training configuration, checked."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.errors import ConfigError, did_you_mean
from llava_jax.images.decode import DEFAULT_LIMITS, LIMIT_NAMES, Limits

_CHOICES = {
    "turns": ("conversation", "independent"),
    "bad_samples": ("skip", "error"),
    "augment": ("", "shift4", "flip_shift4"),
    "image_aspect_ratio": ("", "pad", "square"),
    "holdout_side": ("train", "held"),
}
_LENGTHS = (128, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)


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
        whole = "," not in text or Path(text).exists()
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
            f"data.weights has {len(weights)} numbers for {len(paths)} files of data.path",
            fix="give one for each file",
        )
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise ConfigError(f"data.weights: {weight!r} is not a number")
        if not 0 <= weight < math.inf:
            raise ConfigError(f"data.weights: {weight} is not 0 or more")
    if weights and not any(weights):
        raise ConfigError("data.weights are all 0: there is nothing to train")
    folders = folders or ("",)
    if len(folders) == 1:
        folders *= len(paths)
    return [DataFile(*f) for f in zip(paths, folders, weights or (1.0,) * len(paths))]


@dataclass(frozen=True)
class DataSettings:
    """Everything about the data of a run. Lengths are in tokens after images took their slots."""

    path: str | tuple[str, ...] = ""  # LLaVA JSON or JSON lines; several: a tuple, or commas
    image_folder: str | tuple[str, ...] = ""  # one for all files, or one for each
    weights: tuple[float, ...] = ()  # how often an epoch shows each file's records; empty: once
    batch_size: int = 1  # samples of a step, over all hosts
    version: str = "v1"  # prompt and label masks: plain, v1, llama_2, mpt, ...
    compat: bool = False  # the original's exact ids and labels, whole samples masked included
    turns: str = "conversation"  # "independent": the questions of an image do not see each other
    turns_per_sample: int = 0  # independent turns drawn anew in each epoch; 0 takes all
    image_aspect_ratio: str = ""  # pad or square; empty: as the model says
    max_length: int | None = None  # longer samples are cut; None: as the model says
    shuffle: bool = True
    group_by_modality: bool = False  # the original's batches of one modality and like lengths
    groups: int = 1  # parts of like total length in such a batch
    pack: bool = False  # several samples of a step in one row
    row_multiple: int = 0  # packed rows are a multiple of this; 0: an eighth of the batch
    length_buckets: tuple[int, ...] = _LENGTHS  # batches are padded up to one of these
    image_buckets: tuple[int, ...] = (0, 1, 2, 4, 8, 16, 32, 64)  # image slots of a row
    target_buckets: tuple[int, ...] = ()  # trained positions of a row; empty: powers of two
    holdout: float = 0.0  # fraction of the images kept aside
    holdout_seed: int = 0
    holdout_side: str = "train"  # "held": read the part kept aside instead
    bad_samples: str = "skip"  # or "error": stop at the first
    bad_limit: float = 0.1  # stop when more than this part of the samples is bad
    bad_report: str = (
        ""  # JSON lines file that lists them; a training run: bad.jsonl in its workdir
    )
    cache_images: bool = False  # keep decoded pixels and token ids in memory
    cache_mb: int = 2048
    max_bytes: int = DEFAULT_LIMITS.max_bytes  # of an image file; these five: images.decode.Limits
    max_pixels: int = DEFAULT_LIMITS.max_pixels
    max_side: int = DEFAULT_LIMITS.max_side
    max_decode_bytes: int = DEFAULT_LIMITS.max_decode_bytes
    max_decode_work: float = DEFAULT_LIMITS.max_decode_work
    augment: str = ""  # shift by up to 4 pixels, with or without a mirror image
    threads: int = 4
    prefetch: int = 8  # batches made ahead
    seed: int = 42

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                wanted = " or ".join(repr(a) for a in allowed)
                raise ConfigError(f"data.{name} {value!r} is unknown", fix=f"use {wanted}")
        for name in ("length_buckets", "image_buckets", "target_buckets"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or (not sizes and name != "target_buckets"):
                raise ConfigError(f"data.{name} {sizes} must be sizes in rising order")
        try:
            self.image_limits  # noqa: B018
        except ConfigError as e:
            raise ConfigError(f"data.{e.message}", fix=e.fix) from None
        if self.batch_size < 1:
            raise ConfigError(f"data.batch_size {self.batch_size} must be at least 1")

    @property
    def image_limits(self) -> Limits:
        """What an image may be at most, by the settings of the same names."""
        return Limits(**{name: getattr(self, name) for name in LIMIT_NAMES})

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
                f"data.batch_size {self.batch_size} is not a multiple of the {process_count} hosts"
            )
        if self.batch_size < parts if self.pack else self.batch_size % parts:
            raise ConfigError(
                f"data.batch_size {self.batch_size} cannot be cut into {parts} equal parts "
                "(micro-batches times devices along the batch)",
                fix="change batch_size, grad_accum or mesh",
            )
        longest = self.max_length or model_length
        lengths = self.length_buckets
        if longest:
            lengths = (*(n for n in lengths if n < longest), longest)
        powers = (2**i for i in range(3, 32) if i == 3 or 2 ** (i - 1) < lengths[-1])
        if self.row_multiple:
            rows = math.lcm(self.row_multiple, parts)
        else:
            rows = -(-max(1, self.batch_size // 8) // parts) * parts
        return dataclasses.replace(
            self,
            max_length=longest,
            length_buckets=lengths,
            target_buckets=self.target_buckets or tuple(powers),
            row_multiple=rows,
        )

    @classmethod
    def read(cls, config: Any) -> DataSettings:
        """From a mapping or ml_collections ConfigDict. Raises ConfigError for an unknown name."""
        if isinstance(config, cls):
            return config
        items = dict(config.items()) if hasattr(config, "items") else dict(config)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in items:
            if name not in known:
                fix = did_you_mean(name, known, "data.{}") or f"known: {', '.join(known)}"
                raise ConfigError(f"data.{name} is not a setting", fix=fix)
        return cls(**{k: _plain(v) for k, v in items.items() if v is not None})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        raise ConfigError("data settings are plain values, not groups")
    return tuple(value) if isinstance(value, list) else value
