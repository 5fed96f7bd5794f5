"""What a step holds: its samples, what replaces bad ones, their rows and padded shape.

A pure function of the step: every host makes the same plan, from texts alone, without looking at an
image. Hosts agree on shapes by it without talking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llava_jax.batch import Buckets, Shape, Size, size_of
from llava_jax.config import LlavaConfig
from llava_jax.data.bad import Bad, bad_sample
from llava_jax.data.check import Dataset
from llava_jax.data.layout import Batches, Exact, Fill, Layout
from llava_jax.data.lengths import sample_lengths
from llava_jax.data.pixels import Cache
from llava_jax.data.sampler import TURNS, Epochs, seeded_random
from llava_jax.data.settings import DataSettings
from llava_jax.errors import LlavaError, SampleError
from llava_jax.text.example import Example, sample_turns
from llava_jax.text.sample import ExampleMaker, check_trained

MakeExample = Callable[[Any, str], Example]
"""(record, id) -> its Example. Raises SampleError."""


@dataclass(frozen=True)
class Planned:
    """A sample of a step.

    record: its index in the data set. entry: the entry of the epoch whose place it takes;
    own_entry: the one that it is itself. They differ where it replaces a bad sample.
    """

    sample: Example
    record: int
    entry: int
    own_entry: int

    @property
    def replaces(self) -> bool:
        """Whether it takes the place of a bad sample."""
        return self.entry != self.own_entry


@dataclass(frozen=True)
class Plan:
    """What a step holds, the same on every host. `rows` are indices into `samples`.

    given: the records whose turn it is; the places of those not in `samples` stay empty.
    bad: those that cannot be used for their text.
    """

    step: int
    epoch: int
    given: list[int]
    samples: list[Planned]
    rows: list[list[int]]
    shape: Shape
    bad: list[Bad]


class Planner:
    """Plans the steps of a run. Threads may share it.

    run_epochs: how many epochs the run has, for which the shapes of packed rows are chosen.
    """

    def __init__(
        self,
        data: Dataset,
        make: MakeExample,
        settings: DataSettings,
        image_tokens: int,
        cache: Cache,
        run_epochs: int = 1,
    ):
        self.epochs = Epochs(data, settings)
        self._data, self._make, self._settings, self._cache = data, make, settings, cache
        self._image_tokens = image_tokens
        self._buckets = Buckets(
            settings.length_buckets, settings.image_buckets, settings.target_buckets
        )
        self.layout: Layout = Batches(self.epochs, settings)
        self.cut: int | None = None
        """Samples that data.max_length will cut, where lengths were counted."""
        if settings.pack:
            kind = {"exact": Exact, "fill": Fill}[settings.pack]
            lengths = sample_lengths(data, make, settings, image_tokens)
            self.cut = int(lengths.cut.sum())
            self.layout = kind(self.epochs, settings, lengths.sizes, run_epochs)

    def plan(self, step: int) -> Plan:
        """The plan of global step `step`."""
        number, within = self.layout.locate(step)
        entries = self.layout.entries(number, within)
        given = self.epochs[number].records[entries].tolist()
        found: list[Planned | None] = []
        bad: list[Bad] = []
        for entry, record in zip(entries, given):
            try:
                sample = self.sample(record, entry, number)
                found.append(Planned(sample, record, entry, entry))
            except LlavaError as e:
                found.append(None)
                bad.append(self._bad(record, e))
        sizes = [self._size(x.sample) for x in found if x]
        for n, (entry, record) in enumerate(zip(entries, given)):
            if found[n] is None:
                images = len(self._data.images[record])
                room = self.layout.room(entry, number, sizes)
                own = room or self._buckets.largest._replace(images=images)
                found[n] = next(self.replacements(number, entry, own), None)
        places = [n for n, x in enumerate(found) if x]
        samples = [x for x in found if x]
        sizes = [self._size(x.sample) for x in samples]
        rows, shape = self.layout.rows(number, within, places, sizes)
        return Plan(step, number, given, samples, rows, shape, bad)

    def sample(self, record: int, entry: int, epoch: int) -> Example:
        """What an entry of an epoch shows of a record.

        Raises SampleError for one that cannot be trained, or fits into no bucket.
        """
        s = self._settings
        example = self._example(record)
        if s.turns_per_sample:
            rng = seeded_random(s.seed, epoch, entry, TURNS)
            example = sample_turns(example, s.turns_per_sample, rng)
        example = example.truncated(s.max_length, self._image_tokens)
        if not s.compat:
            check_trained(example, s.max_length)
        self._buckets.hold(self._size(example), example.id)
        return example

    def replacements(self, epoch: int, entry: int, room: Size) -> Iterator[Planned]:
        """Samples within `room` that may take the place of `entry`: of its modality, and usable."""
        records = self.epochs[epoch].records
        for other in self.epochs.replacements(epoch, entry):
            record = int(records[other])
            try:
                sample = self.sample(record, other, epoch)
            except LlavaError:
                continue
            if self._size(sample).fits(room):
                yield Planned(sample, record, entry, other)

    def _size(self, example: Example) -> Size:
        return size_of([example], self._image_tokens)

    def _bad(self, record: int, error: LlavaError) -> Bad:
        name = self._data.ids[record]
        reason = error.message.removeprefix(f"sample {name}: ")
        return bad_sample(int(self._data.index[record]), name, reason, fix=error.fix)

    def _example(self, record: int) -> Example:
        found = self._cache.get(record)
        if found is None:
            try:
                found = self._make(self._data.records[record], self._data.ids[record])
            except SampleError as e:
                found = e
            size = 300 if isinstance(found, SampleError) else 12 * len(found.ids) + 600
            self._cache.put(record, found, size)
        if isinstance(found, SampleError):
            raise SampleError(found.message, fix=found.fix)
        return found


def example_maker(settings: DataSettings, model_config: LlavaConfig, tokenizer: Any) -> MakeExample:
    """How a run's settings make an Example of a record."""
    s = settings
    # Where all independent turns are trained, those that do not fit are left out; a conversation,
    # and turns that are drawn, are cut when they are given out.
    early = s.compat or (s.turns == "independent" and not s.turns_per_sample)
    return ExampleMaker(
        tokenizer,
        version=s.version,
        max_length=s.max_length if early else None,
        image_tokens=model_config.image_tokens,
        turns=s.turns,
        compat=s.compat,
        use_im_start_end=model_config.use_im_start_end,
    )
