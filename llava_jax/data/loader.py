"""The loader: batches of this process, determined by their step number alone.

Step -> samples (order of the epoch) -> rows and a shape that every host agrees on -> pixels of this
host's rows. Nothing depends on what was loaded before, so a run resumed at any step, with any number
of threads or hosts, sees the same bytes. grain runs the steps ahead of time in threads.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import numpy as np

from llava_jax.batch import Size, collate, size_of
from llava_jax.config import LlavaConfig
from llava_jax.data.account import Account
from llava_jax.data.bad import Bad, bad_sample
from llava_jax.data.check import Dataset, open_data
from llava_jax.data.cut import CutNotice
from llava_jax.data.layout import Exact, Fill
from llava_jax.data.pixels import Cache, ImageStore, PackedImages, augment
from llava_jax.data.plan import MakeExample, Plan, Planned, Planner, example_maker
from llava_jax.data.sampler import AUGMENT, seeded_random
from llava_jax.data.settings import DataSettings, as_trained
from llava_jax.data.stored import is_packed
from llava_jax.errors import ConfigError, ImageError, LlavaError
from llava_jax.images.decode import CODES
from llava_jax.setting import current
from llava_jax.settings import TRAINING
from llava_jax.text.example import TRUNCATED, Example

log = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Noted = list[tuple[int, Iterable[str]]]
"""(record, what was done to it) of the samples whose turn it was."""

# What makes step numbers mean the same samples.
_IDENTITY = (
    *("batch_size", "version", "compat", "turns", "turns_per_sample", "max_length", "shuffle"),
    *(
        "group_by_modality",
        "groups",
        "pack",
        "pack_length",
        "holdout",
        "holdout_seed",
        "holdout_side",
    ),
    *("augment", "seed"),
)


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
    counted_parts: Sequence[int] | None = None,
    data: Dataset | None = None,
    say: bool = True,
    epochs: float = 1.0,
    steps: int = 0,
) -> Loader:
    """The loader of a training run, from its `data` settings (see DataSettings for their names).

    process_index, process_count: which rows of every global batch this host makes.
    seed: of the order; None takes data.seed. start: the first step to give out.
    row_parts: every batch has a multiple of so many rows: micro-batches times devices along the batch.
    own_parts: which of the row_parts this host makes, in this order; None: its share, end to end.
    counted_parts: those of them that no other host counts; None: all of them.
    data: what `open_data` made of the same settings; None opens it here, and logs what is bad if `say`.
    epochs, steps: how long the run is, in steps if they are given; packed shapes are chosen for it.
    Raises ConfigError for settings, SampleError for data that cannot be used.
    """
    settings = DataSettings.read(config)
    if seed is not None:
        settings = replace(settings, seed=seed)
    settings = settings.completed(model_config.max_length, process_count, row_parts)
    model_config = as_trained(settings, model_config)
    data = data or open_data(settings, process_index=process_index, say=say)
    make = example_maker(settings, model_config, tokenizer)
    counts = own_parts if counted_parts is None else counted_parts
    parts = None if own_parts is None else (row_parts, tuple(own_parts), frozenset(counts or ()))
    entries = math.ceil(steps * settings.batch_size / len(data)) if steps else math.ceil(epochs)
    place = (process_index, process_count, start, parts, max(1, entries))
    return Loader(data, make, settings, model_config, *place)


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """A name for each file: with as many folders as tell them apart, and with its ending where only that
    does; a file that comes again has a number."""
    files = list(map(PurePath, paths))
    once = list(dict.fromkeys(files))
    stems = [path.parent / path.stem for path in once]
    deepest = max(len(path.parts) for path in once)
    ways = (
        [PurePath(*path.parts[-count:]).as_posix() for path in whole]
        for whole in (stems, once)
        for count in range(1, deepest + 1)
    )
    names = dict(zip(once, next(way for way in ways if len(set(way)) == len(way))))
    times = [files[: i + 1].count(path) for i, path in enumerate(files)]
    return tuple(f"{names[p]} ({n})" if n > 1 else names[p] for p, n in zip(files, times))


class Loader:
    """An endless iterator of (batch, info). See batch.py for the arrays of a batch.

    info: step, epoch, samples, tokens, targets (trained tokens) and images of the global batch (padding
    not counted), pairs (of a query and a key that causal attention lets it see), real (the part of its
    positions that are tokens), ids of this host's samples, skipped (ids that were replaced), cut (samples longer than allowed), given,
    replaced and empty (see docs/data.md; of this host's rows where images decide), waited (seconds
    until the batch was there).
    The last batch of an epoch is filled up with empty rows: every sample is seen once per epoch.
    """

    def __init__(
        self,
        data: Dataset,
        make_example: MakeExample,
        settings: DataSettings,
        model_config: LlavaConfig,
        process_index: int = 0,
        process_count: int = 1,
        start: int = 0,
        parts: tuple[int, tuple[int, ...], frozenset[int]] | None = None,
        run_epochs: int = 1,
    ):
        self._data, self._settings, self._model = data, settings, model_config
        self._parts = parts or (process_count, (process_index,), frozenset({process_index}))
        self._first = process_index == 0
        cache = Cache(settings.cache_mb * 2**20 if settings.cache_images else 0)
        tokens = model_config.image_tokens
        self._planner = Planner(data, make_example, settings, tokens, cache, run_epochs)
        self._layout = self._planner.layout
        self._cut = CutNotice(settings.max_length, model_config)
        if isinstance(self._layout, (Exact, Fill)) and self._first:
            log.info("%s", self._layout.summary)
            if remark := self._layout.remark():
                log.warning("%s", remark)
            self._cut.expect(self._planner.cut or 0, len(data))
        self._images = [
            PackedImages(f.path, model_config, cache, settings.image_limits)
            if f.weight and is_packed(f.path)
            else ImageStore(f.image_folder, model_config, cache, settings.image_limits)
            for f in data.files
        ]
        self._bad = data.bad
        self._account = Account(data, self._planner.epochs, self._layout)
        self._step = start
        self._steps = self._start(start)

    # What a training loop uses -------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples of an epoch."""
        return self._planner.epochs.samples

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every sample once; the last may hold empty rows."""
        return self._layout.steps(1)

    def steps(self, epochs: float) -> int:
        """Steps of so many epochs; with data.pack=fill an epoch may have a step more than another."""
        return self._layout.steps(epochs)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the data files, by the numbers in a batch's `files`; () where there is one alone."""
        paths = [file.path for file in self._data.files]
        return short_names(paths) if len(paths) > 1 else ()

    @property
    def turns(self) -> bool:
        """Whether some sample may have independent turns: by data.turns, or by its own record."""
        return self._settings.turns == "independent" or self._data.independent

    @property
    def step_words(self) -> str:
        """What a step holds, after "900 steps of": its samples, or full rows and the recipe's number."""
        return self._layout.step_words

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        """The next batch. Raises TooManyBad where it finds more bad samples than data.bad_limit
        allows; the batch then counts as not given, and `get_state` can still be saved."""
        asked = time.perf_counter()
        batch, info, noted = next(self._steps)
        info["waited"] = time.perf_counter() - asked
        for bad in info.pop("bad"):
            self._bad.add(bad)
        self._step += 1
        self._account.add(info, noted)
        if self._first and self._settings.holdout_side == "train":
            self._cut.see(noted, self._data.ids)
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """JSON-ready: with it, a loader of the same data and settings goes on with the next batch."""
        return {
            "step": self._step,
            "data": self.identity(),
            "bad": self._bad.rows(),
            **self._account.state(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, on any number of hosts and threads.

        Bad samples of the state count only where they are still bad.
        Raises ConfigError naming the setting or data that is no longer the same.
        """
        ours = self.identity()
        for name, value in state["data"].items():
            value = current(TRAINING[f"data.{name}"], value) if name == "pack" else value
            if ours.get(name) != value:
                if name == "content":
                    raise ConfigError(
                        "the records of data.path, or their order, are not those that this run began with",
                        fix="restore them, or start in a new work directory",
                    )
                again = "restore it"
                if name == "pack_rows":
                    again = f"--config.data.pack_rows={value}"
                raise ConfigError(
                    f"data.{name} is {ours.get(name)!r} but was {value!r} when this run began",
                    fix=f"{again}, or start in a new work directory",
                )
        self._bad.restore([row for row in state.get("bad", ()) if self._still_bad(row["index"])])
        self._step = int(state["step"])
        self._account.restore(state, self._step, images=self._first)
        self._steps.close()
        self._steps = self._start(self._step)

    def counted(self) -> tuple[int, dict[str, Any]]:
        """(steps given out, the counts of `get_state` at this moment)."""
        return self._step, self._account.state()

    def take_bad(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes over bad samples that other hosts found: rows of their `get_state`."""
        self._bad.restore(rows)

    def blank(self) -> Batch:
        """The next batch in its shape with nothing in it, for a host that cannot make its own.

        The step counts as given; its samples do not.
        """
        plan = self.plan(self._step)
        self._step += 1
        told = [] if self.files else None
        return collate([], plan.shape.part(len(self._own_rows(plan))), self._model, told)

    def identity(self) -> dict[str, Any]:
        """What makes step numbers mean the same samples, JSON-ready."""
        values = {name: getattr(self._settings, name) for name in _IDENTITY}
        weights = [file.weight for file in self._data.files]
        own = self._layout.identity()
        return {"content": self._data.content, **values, "weights": weights, **own}

    def report(self) -> dict[str, Any]:
        """What became of every record so far, JSON-ready. See docs/data.md for its keys."""
        return self._account.report(self._bad)

    def cut_lines(self, report: dict[str, Any]) -> Iterable[str]:
        """How many samples of a `report` were longer than data.max_length, in words; for a log."""
        return self._cut.lines(report)

    def close(self) -> None:
        """Stops the threads that work ahead."""
        self._steps.close()

    # From a step to a batch ----------------------------------------------------------------------

    def plan(self, step: int) -> Plan:
        """The samples of a global batch, their rows and their padded shape. A pure function."""
        return self._planner.plan(step)

    def load(self, step: int) -> tuple[Batch, dict[str, Any]]:
        """The batch of this host at `step`, and its bookkeeping."""
        batch, info, _ = self._load(step)
        return batch, info

    def _load(self, step: int) -> tuple[Batch, dict[str, Any], Noted]:
        """(batch, info, records whose turn it was with their notes) of a step."""
        plan = self.plan(step)
        own_rows = self._own_rows(plan)
        bad = list(plan.bad)
        size = plan.shape.group_rows
        groups = [own_rows[at : at + size] for at in range(0, len(own_rows), size)]
        rows = [row for group in groups for row in self._load_group(plan, group, bad)]
        examples = [[x.sample for x in row if x] for row in rows]
        files = [[int(self._data.file[x.record]) for x in row if x] for row in rows]
        told = files if self.files else None
        batch = collate(examples, plan.shape.part(len(rows)), self._model, told)

        loaded = [x for row in rows for x in row]
        counts = self._counts(plan)
        planned = [plan.samples[i] for row, yes in zip(own_rows, counts) if yes for i in row]
        counted = [x for row, yes in zip(rows, counts) if yes for x in row]
        image_empty = counted.count(None)
        image_replaced = sum(x.replaces for x in counted if x) - sum(x.replaces for x in planned)
        own = {x.record: x.sample.notes for x in plan.samples if not x.replaces}
        sizes = [size_of([x.sample], self._model.image_tokens) for x in plan.samples]
        tokens = sum(size.length for size in sizes)
        info = {
            "step": step,
            "epoch": plan.epoch,
            "samples": len(plan.samples),
            "tokens": tokens,
            "targets": sum(size.targets for size in sizes),
            "images": sum(size.images for size in sizes),
            "pairs": sum(size.length**2 for size in sizes) / 2,
            "real": tokens / (plan.shape.rows * plan.shape.length),
            "ids": [x.sample.id for x in loaded if x],
            "skipped": [b.id for b in bad],
            "cut": sum(TRUNCATED in x.sample.notes for x in plan.samples),
            "given": len(plan.given),
            "replaced": sum(x.replaces for x in plan.samples) + image_replaced,
            "empty": len(plan.given) - len(plan.samples) + image_empty,
            "image_replaced": image_replaced,
            "image_empty": image_empty,
            "bad": bad,
        }
        return batch, info, [(record, own.get(record, ())) for record in plan.given]

    def _own_rows(self, plan: Plan) -> list[list[int]]:
        """The rows that this host makes, empty ones included."""
        parts, own, _ = self._parts
        size = plan.shape.rows // parts
        rows = plan.rows + [[]] * (plan.shape.rows - len(plan.rows))
        return [row for part in own for row in rows[part * size : (part + 1) * size]]

    def _counts(self, plan: Plan) -> list[bool]:
        """For each of `_own_rows`, whether this host counts it."""
        parts, own, counted = self._parts
        return [part in counted for part in own for _ in range(plan.shape.rows // parts)]

    def _load_group(
        self, plan: Plan, group: list[list[int]], bad: list[Bad]
    ) -> list[list[Planned | None]]:
        """Rows with pixels. What has none is added to `bad`, and replaced by what fits its place."""
        tokens = self._model.image_tokens
        loaded: list[list[Planned | None]] = [[plan.samples[i] for i in row] for row in group]
        for row in loaded:
            for n, planned in enumerate(row):
                if planned is None:
                    continue
                row[n] = None
                in_row = size_of([x.sample for x in row if x], tokens)
                in_group = size_of([x.sample for other in loaded for x in other if x], tokens)
                taken = in_group._replace(length=in_row.length)
                room = Size(*(a - b for a, b in zip(plan.shape.room, taken)))
                row[n] = self._with_pixels(planned, plan.epoch, room, bad)
        return loaded

    def _with_pixels(
        self, wanted: Planned, epoch: int, room: Size, bad: list[Bad]
    ) -> Planned | None:
        """`wanted`, or what replaces it, with pixels; None where nothing does."""
        others = self._planner.replacements(epoch, wanted.entry, room)
        for planned in itertools.chain([wanted], others):
            try:
                return replace(planned, sample=self._pixels(planned, epoch))
            except ImageError as e:
                index, name = int(self._data.index[planned.record]), planned.sample.id
                bad.append(bad_sample(index, name, e.message, kind=CODES[e.code], fix=e.fix))
        return None

    def _pixels(self, planned: Planned, epoch: int) -> Example:
        """Its sample, with pixels for paths. Raises ImageError."""
        store = self._images[self._data.file[planned.record]]
        row = int(self._data.row[planned.record])
        paths = self._data.images[planned.record]
        found = [store.pixels(path, row, paths.index(path)) for path in planned.sample.images]
        if rule := self._settings.augment:
            key = (self._settings.seed, epoch, planned.own_entry, AUGMENT)
            found = [augment(p, rule, seeded_random(*key, k)) for k, p in enumerate(found)]
        return replace(planned.sample, images=tuple(found))

    def _still_bad(self, index: int) -> bool:
        """Whether the record at `index` of the files cannot be trained as it is today."""
        if index in self._bad:
            return True
        record = int(np.searchsorted(self._data.index, index))
        if record == len(self._data) or self._data.index[record] != index:
            return False
        try:
            sample = self._planner.sample(record, record, 0)
            self._pixels(Planned(sample, record, 0, 0), 0)
        except LlavaError:
            return True
        return False

    def _start(self, step: int) -> Any:
        import grain

        s = self._settings
        ahead = max(s.prefetch, s.threads) if s.threads else 0
        options = grain.ReadOptions(num_threads=s.threads, prefetch_buffer_size=ahead)
        steps = grain.MapDataset.range(step, 2**62).map(self._load)
        return iter(steps.to_iter_dataset(options))
