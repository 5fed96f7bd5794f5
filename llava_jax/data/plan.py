"""What a step holds: its samples, who stands in for bad ones, their rows and padded shape.

A pure function of the step: every host makes the same plan, from texts alone, without looking at an
image. Hosts agree on shapes by it without talking.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_jax.batch import Buckets, Shape, Size, first_fit, shape_of, size_of
from llava_jax.data.bad import Bad, bad_sample
from llava_jax.data.check import Dataset
from llava_jax.data.epoch import Epochs
from llava_jax.data.records import image_paths
from llava_jax.data.samples import buckets_of
from llava_jax.data.settings import DataSettings
from llava_jax.errors import LlavaError
from llava_jax.text.example import Example

MakeSample = Callable[[int, int, int], Example]
"""(place, seat, epoch) -> the sample. Raises SampleError."""


@dataclass(frozen=True)
class Seated:
    """A sample of a step. seat: whose place in the epoch it takes; at: the seat it is of itself.

    They differ where it stands in for a bad one. place: its record.
    """

    sample: Example
    seat: int
    at: int
    place: int

    @property
    def stands_in(self) -> bool:
        return self.seat != self.at


@dataclass(frozen=True)
class Plan:
    """What a step holds, the same on every host. `rows` are indices into `seated`.

    given: the records whose turn it is; the seats of those that are not in `seated` stay empty.
    bad: those that cannot be used for their text.
    """

    step: int
    epoch: int
    given: list[int]
    seated: list[Seated]
    rows: list[list[int]]
    shape: Shape
    bad: list[Bad]


def make_plan(
    step: int,
    epochs: Epochs,
    data: Dataset,
    settings: DataSettings,
    make: MakeSample,
    image_tokens: int,
) -> Plan:
    """The plan of global step `step`."""
    s, buckets = settings, buckets_of(settings)
    number, within = divmod(step, -(-epochs.samples // s.batch_size))
    epoch = epochs[number]
    seats = epoch.order[within * s.batch_size : (within + 1) * s.batch_size].tolist()
    given = epoch.places[seats].tolist()
    found: list[Seated | None] = []
    bad: list[Bad] = []
    for seat, place in zip(seats, given):
        try:
            found.append(Seated(make(place, seat, number), seat, seat, place))
        except LlavaError as e:
            found.append(None)
            bad.append(bad_text(data, place, e))
    room = _room([f.sample for f in found if f], buckets, image_tokens)
    for n, seat in enumerate(seats):
        if found[n] is None:
            own = room or buckets.largest._replace(images=len(image_paths(data.records[given[n]])))
            found[n] = _stand_in(
                number, seat, epochs, make, lambda x, own=own: size_of([x], image_tokens).fits(own)
            )
    seated = [f for f in found if f]
    samples = [f.sample for f in seated]
    if s.pack:
        rows = first_fit([size_of([x], image_tokens) for x in samples], buckets.largest)
        count = -(-max(len(rows), 1) // s.row_multiple) * s.row_multiple
    else:
        rows, count = [[i] for i in range(len(samples))], s.batch_size
    in_rows = [[samples[i] for i in row] for row in rows]
    shape = shape_of(in_rows, count, buckets, image_tokens)
    return Plan(step, number, given, seated, rows, shape, bad)


def bad_text(data: Dataset, place: int, error: LlavaError) -> Bad:
    """A Bad of record `place` for what made its sample impossible."""
    reason = error.message.removeprefix(f"sample {data.ids[place]}: ")
    return bad_sample(int(data.index[place]), data.ids[place], reason, fix=error.fix)


def _room(samples: Sequence[Example], buckets: Buckets, image_tokens: int) -> Size | None:
    """The buckets that the largest of the samples needs by itself; None without any."""
    if not samples:
        return None
    return buckets.hold(Size(*map(max, zip(*(size_of([x], image_tokens) for x in samples)))))


def _stand_in(
    number: int, seat: int, epochs: Epochs, make: MakeSample, fits: Callable[[Example], bool]
) -> Seated | None:
    """Who takes a seat: one of the same modality that makes no row longer and no shape larger."""
    places = epochs[number].places
    for other in epochs.stand_ins(number, seat):
        place = int(places[other])
        try:
            sample = make(place, other, number)
        except LlavaError:
            continue
        if fits(sample):
            return Seated(sample, seat, other, place)
    return None
