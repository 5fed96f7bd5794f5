"""The loader: batches of this process, told by their step number alone.

Step -> samples (order of the epoch) -> rows and a shape that every host agrees on -> pixels of this
host's rows. Nothing depends on what was loaded before, so a run resumed at any step, with any number
of threads or hosts, sees the same bytes. grain runs the steps ahead of time in threads.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.data.batch import (
    Expanded,
    Shape,
    bucket,
    choose_turns,
    collate,
    expand,
    first_fit,
    row_needs,
    shape_of,
    without_id,
)
from llava_jax.data.order import epoch_order, holdout, lasting_random
from llava_jax.data.pixels import Cache, ImageStore, augment
from llava_jax.data.records import BadSamples, check_record, read_all, record_id
from llava_jax.data.settings import DataSettings
from llava_jax.errors import ConfigError, ImageError, LlavaError, SampleError
from llava_jax.text.records import modality_lengths
from llava_jax.text.sample import Example, ExampleMaker

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
MAX_TRIES = 100
"""Samples looked at for one that may stand in for a bad one; beyond, its place stays empty."""


def make_loader(
    config: Any,
    model_config: LlavaConfig,
    tokenizer: Any,
    *,
    process_index: int = 0,
    process_count: int = 1,
    seed: int | None = None,
    start: int = 0,
    row_parts: int = 1,
    own_parts: Sequence[int] | None = None,
) -> Loader:
    """The loader of a training run, from its `data` settings (see DataSettings for their names).

    process_index, process_count: which rows of every global batch this host makes.
    seed: of the order; None takes data.seed. start: the first step to give out.
    row_parts: every batch has a multiple of so many rows: micro-batches times devices along the batch.
    own_parts: which of the row_parts this host makes, in this order; None: its share, end to end.
    Raises ConfigError for settings, SampleError for data that cannot be used.
    """
    settings = DataSettings.read(config)
    if seed is not None:
        settings = replace(settings, seed=seed)
    settings = settings.completed(model_config.max_length, process_count, row_parts)
    if settings.image_aspect_ratio:
        model_config = replace(model_config, image_aspect_ratio=settings.image_aspect_ratio)
    records, places = read_all(settings.path)
    maker = _example_maker(settings, model_config, tokenizer)

    def make(record: Any, name: str) -> Example:
        example = replace(maker(record), id=name)
        return without_id(example, tokenizer.pad_id) if settings.compat else example

    return Loader(
        records,
        places,
        make,
        settings,
        model_config,
        process_index,
        process_count,
        start,
        maker.notes,
        None if own_parts is None else (row_parts, tuple(own_parts)),
    )


@dataclass(frozen=True)
class Plan:
    """What a step holds, the same on every host. `rows` are indices into `samples`."""

    step: int
    epoch: int
    at: list[int]  # place of each sample among the loader's records
    samples: list[Expanded]
    rows: list[list[int]]
    shape: Shape
    skipped: list[str]


class Loader:
    """An endless iterator of (batch, info). See batch.py for the arrays of a batch.

    info: step, epoch, samples and tokens of the global batch (padding not counted), ids of this
    host's samples, skipped (ids that were replaced), cut (samples longer than allowed).
    The last batch of an epoch is filled up with empty rows: every sample is seen once per epoch.
    """

    def __init__(
        self,
        records: Sequence[Any],
        places: Sequence[str],
        make_example: Callable[[Any, str], Example],
        settings: DataSettings,
        model_config: LlavaConfig,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
        notes: Mapping[str, int] | None = None,
        parts: tuple[int, tuple[int, ...]] | None = None,
    ):
        self._settings, self._model = settings, model_config
        self._parts = parts or (process_count, (process_index,))
        self._make_example, self._notes = make_example, notes or {}
        report = settings.bad_report
        if report and process_count > 1:
            report = f"{report}.{process_index}"
        self._bad = BadSamples(
            strict=settings.bad_samples == "error",
            limit=math.ceil(settings.bad_limit * len(records)),
            report=report or None,
        )
        self._records, self._ids, self._index = self._usable(records, places)
        self._cache = Cache(settings.cache_mb * 2**20 if settings.cache_images else 0)
        self._images = ImageStore(settings.image_folder, model_config, self._cache)
        self._lengths = None
        if settings.group_by_modality:
            self._lengths = [n or 1 for n in modality_lengths(self._records)]
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)
        self._cut_total = 0
        self._step = start
        self._steps = self._start(start)

    # What a training loop uses -------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return len(self._records)

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every sample once; the last may hold empty rows."""
        return -(-self.samples // self._settings.batch_size)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        batch, info = next(self._steps)
        self._step += 1
        self._cut_total += info["cut"]
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """JSON-ready: with it, a loader of the same data and settings goes on with the next batch."""
        return {"step": self._step, "data": self.identity(), "bad": self._bad.rows()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, on any number of hosts and threads.

        Raises ConfigError naming the setting or data that is no longer the same.
        """
        ours = self.identity()
        for name, value in state["data"].items():
            if ours.get(name) != value:
                raise ConfigError(
                    f"data.{name} is {ours.get(name)!r} but was {value!r} when this run began",
                    fix="restore it, or start in a new work directory",
                )
        for row in state.get("bad", ()):
            self._bad.restore(row)
        self._step = int(state["step"])
        self._steps.close()
        self._steps = self._start(self._step)

    def identity(self) -> dict[str, Any]:
        """What makes step numbers mean the same samples."""
        s = self._settings
        names = ("batch_size", "version", "compat", "turns", "turns_per_sample", "max_length")
        names += (
            "shuffle",
            "group_by_modality",
            "groups",
            "pack",
            "holdout",
            "holdout_seed",
            "holdout_side",
        )
        names += ("augment", "seed")
        return {"content": self._content, **{name: getattr(s, name) for name in names}}

    def report(self) -> dict[str, Any]:
        """What was left out or changed so far, JSON-ready.

        {"samples", "bad": rows of BadSamples, "bad_count", "cut": how often a sample was too long,
        "notes": counts of llava_jax.text.sample.ExampleMaker}.
        """
        bad = self._bad.rows()
        return {
            "samples": self.samples,
            "bad": bad,
            "bad_count": len(bad),
            "cut": self._cut_total,
            "notes": dict(self._notes),
        }

    def close(self) -> None:
        """Stops the threads that work ahead."""
        self._steps.close()

    # From a step to a batch ----------------------------------------------------------------------

    def plan(self, step: int) -> Plan:
        """The samples of a global batch, their rows and their padded shape. A pure function."""
        s = self._settings
        epoch, within = divmod(step, self.steps_per_epoch)
        order = self._order(epoch)[within * s.batch_size : (within + 1) * s.batch_size]
        at, samples, skipped = [], [], []
        for place in map(int, order):
            sample, used = self._sample_or_next(place, epoch, skipped)
            at.append(used)
            samples.append(sample)
        if s.pack:
            rows = first_fit(samples, s.length_buckets[-1], s.image_buckets[-1])
            count = -(-len(rows) // s.row_multiple) * s.row_multiple
        else:
            rows, count = [[i] for i in range(len(samples))], s.batch_size
        shape = shape_of(
            [[samples[i] for i in row] for row in rows],
            count,
            s.length_buckets,
            s.image_buckets,
            s.target_buckets,
        )
        return Plan(step, epoch, at, samples, rows, shape, skipped)

    def load(self, step: int) -> tuple[Batch, dict[str, Any]]:
        """The batch of this host at `step`, and its bookkeeping."""
        plan = self.plan(step)
        skipped = list(plan.skipped)
        rows, pictures = [], []
        for row in self._own_rows(plan):
            samples, images = self._load_row(plan, row, skipped)
            rows.append(samples)
            pictures.append(images)
        batch = collate(
            rows,
            pictures,
            plan.shape._replace(rows=len(rows)),
            self._model.image_tokens,
            self._model.vision.image_size,
        )
        info = {
            "step": step,
            "epoch": plan.epoch,
            "samples": len(plan.samples),
            "tokens": sum(len(s) for s in plan.samples),
            "ids": [s.id for row in rows for s in row],
            "skipped": skipped,
            "cut": sum(s.cut for row in rows for s in row),
        }
        return batch, info

    def _own_rows(self, plan: Plan) -> list[list[int]]:
        """The rows that this host makes, empty ones included."""
        parts, own = self._parts
        size = plan.shape.rows // parts
        whole = plan.rows + [[]] * (plan.shape.rows - len(plan.rows))
        return [row for part in own for row in whole[part * size : (part + 1) * size]]

    def _load_row(self, plan: Plan, row: list[int], skipped: list[str]):
        """(samples, pixels) of a row. The next sample that fits stands in for one without pixels."""
        samples = [plan.samples[i] for i in row]
        images: list[np.ndarray] = []
        for n, i in enumerate(row):
            used = self._needs_without(samples, n)
            room = tuple(size - u for size, u in zip(plan.shape[1:], used))
            chosen, pixels = self._with_pixels(plan, i, room, skipped)
            samples[n] = chosen
            images += pixels
        return [s for s in samples if len(s)], images

    def _with_pixels(self, plan: Plan, i: int, room: tuple[int, ...], skipped: list[str]):
        place, sample = plan.at[i], plan.samples[i]
        for tried in range(min(self.samples, MAX_TRIES)):
            if tried:
                place = (plan.at[i] + tried) % self.samples
                try:
                    sample = self._sample(place, plan.epoch)
                except SampleError:
                    continue
                if any(need > left for need, left in zip(row_needs([sample]), room)):
                    continue
            try:
                return sample, self._pixels(sample, place, plan.epoch)
            except ImageError as e:
                self._bad.add(self._index[place], sample.id, e.message)
                if not tried:
                    skipped.append(sample.id)
        log.warning("nothing near sample %s can stand in for it", plan.samples[i].id)
        return _EMPTY, []

    @staticmethod
    def _needs_without(samples: list[Expanded], n: int) -> tuple[int, int, int]:
        return row_needs([s for i, s in enumerate(samples) if i != n])

    def _pixels(self, sample: Expanded, place: int, epoch: int) -> list[np.ndarray]:
        found = [self._images.pixels(path) for path in sample.images]
        rule = self._settings.augment
        if not rule:
            return found
        key = (self._settings.seed, epoch, place)
        return [augment(p, rule, lasting_random(*key, 1, k)) for k, p in enumerate(found)]

    def _sample_or_next(self, place: int, epoch: int, skipped: list[str]) -> tuple[Expanded, int]:
        """The sample at `place`, or the first good one behind it, and where that is."""
        for tried in range(self.samples):
            at = (place + tried) % self.samples
            try:
                return self._sample(at, epoch), at
            except LlavaError as e:
                self._bad.add(self._index[at], self._ids[at], e.message)
                if not tried:
                    skipped.append(self._ids[at])
        raise SampleError("there is no sample that can be trained")

    def _sample(self, place: int, epoch: int) -> Expanded:
        s = self._settings
        example = self._example(place)
        if s.turns_per_sample:
            rng = lasting_random(s.seed, epoch, place, 0)
            example = choose_turns(example, s.turns_per_sample, rng)
        sample = expand(example, self._model.image_tokens, s.max_length, idle=s.compat)
        tokens, images, targets = row_needs([sample])
        bucket(tokens, s.length_buckets, "length", sample.id)
        bucket(images, s.image_buckets, "image", sample.id)
        bucket(targets, s.target_buckets, "target", sample.id)
        return sample

    def _example(self, place: int) -> Example:
        found = self._cache.get(place)
        if found is None:
            try:
                found = self._make_example(self._records[place], self._ids[place])
            except SampleError as e:
                found = e
            size = 300 if isinstance(found, SampleError) else 12 * len(found.input_ids) + 600
            self._cache.put(place, found, size)
        if isinstance(found, SampleError):
            raise SampleError(found.message, fix=found.fix)
        return found

    # Set-up --------------------------------------------------------------------------------------

    def _usable(self, records: Sequence[Any], places: Sequence[str]):
        """(records, ids, indices in the files) that are well formed and on the wanted side."""
        good = []
        for i, (record, place) in enumerate(zip(records, places)):
            try:
                check_record(record, place)
                good.append(i)
            except SampleError as e:
                self._bad.add(i, record_id(record, i), e.message)
        s = self._settings
        kept, aside = holdout([records[i] for i in good], s.holdout, s.holdout_seed)
        index = [good[i] for i in (kept if s.holdout_side == "train" else aside)]
        if not index:
            raise SampleError(f"{s.path}: no sample is left to use")
        digest = hashlib.sha256()
        for i in index:
            record = records[i]
            turns = [turn["value"] for turn in record["conversations"]]
            digest.update(repr((record.get("id"), record.get("image"), turns)).encode())
        self._content = digest.hexdigest()[:16]
        return (
            [_without_null(records[i]) for i in index],
            [record_id(records[i], i) for i in index],
            index,
        )

    def _epoch_order(self, epoch: int) -> np.ndarray:
        s = self._settings
        return epoch_order(
            self.samples,
            s.seed,
            epoch,
            shuffle=s.shuffle,
            lengths=self._lengths,
            batch_size=s.batch_size,
            groups=s.groups,
        )

    def _start(self, step: int) -> Any:
        import grain

        s = self._settings
        ahead = max(s.prefetch, s.threads) if s.threads else 0
        options = grain.ReadOptions(num_threads=s.threads, prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(step, 2**62).map(self.load)
        return iter(steps.to_iter_dataset(options))


_NOTHING = np.zeros(0, np.int32)
_EMPTY = Expanded("", _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, _NOTHING, ())


def _without_null(record: Any) -> Any:
    """A record whose image is null or "" as one that has none."""
    if record.get("image") or "image" not in record:
        return record
    return {k: v for k, v in record.items() if k != "image"}


def _example_maker(
    settings: DataSettings, model_config: LlavaConfig, tokenizer: Any
) -> ExampleMaker:
    s = settings
    # Turns are drawn, and conversations cut, after images took their places; a sample of all its
    # independent turns is told the length here, so that it leaves out turns instead of halving one.
    ahead = s.compat or (s.turns == "independent" and not s.turns_per_sample)
    return ExampleMaker(
        tokenizer,
        version=s.version,
        max_length=s.max_length if ahead else None,
        image_tokens=model_config.image_tokens,
        turns=s.turns,
        compat=s.compat,
        use_im_start_end=model_config.use_im_start_end,
    )
