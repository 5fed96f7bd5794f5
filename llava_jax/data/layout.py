"""Which entries of an epoch a step shows, and how its samples lie in rows: plain, exact, fill.

Plain: the order of the epoch in batches, a row for each sample. Exact: the same samples in each step, in
few full rows. Fill: rows of one length that are full, so many of them a step. All three are functions of
seed and step; packed ones also of the lengths of all samples, from which their few shapes are chosen.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from llava_jax.batch import Buckets, Shape, Size
from llava_jax.data.packing import Rows, Sizes, best_fit, deal, fill_rows, rows_of_step
from llava_jax.data.sampler import FILL, Epochs, seeded_random
from llava_jax.data.settings import DataSettings
from llava_jax.errors import counted

SHAPES = 3
"""The most shapes of data.pack=exact."""
COMPILING = 100
"""Steps whose time one more shape must save: about what compiling it costs a small model."""
KEPT = 8
"""Epochs whose plan stays in memory: 4 MB each, of 665K samples."""
LOW_EXACT, LOW_FILL = 0.7, 0.9
"""Shares of real tokens below which packing is remarked on: most data, well set, have more."""


class Layout(Protocol):
    """What the three have in common."""

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it) of a step of the run."""
        ...

    def steps(self, epochs: float) -> int:
        """Steps that show so many epochs."""
        ...

    def entries(self, epoch: int, within: int) -> list[int]:
        """The entries whose turn it is in a step, in order."""
        ...

    def before(self, epoch: int, within: int) -> np.ndarray:
        """int64: the entries whose turn it was earlier in the epoch."""
        ...

    def room(self, entry: int, epoch: int, sizes: Sequence[Size]) -> Size | None:
        """What may replace a bad sample; None where only the buckets limit it.

        sizes: of the step's good samples.
        """
        ...

    def rows(
        self, epoch: int, within: int, places: list[int], sizes: list[Size]
    ) -> tuple[list[list[int]], Shape]:
        """Rows of indices into `sizes`, and the padded shape.

        places: at which of `entries` each sample is.
        """
        ...

    def identity(self) -> dict[str, str | int]:
        """What makes step numbers mean the same samples, besides the settings."""
        ...

    @property
    def step_words(self) -> str:
        """What a step holds, after "900 steps of"."""
        ...

    def remark(self) -> str:
        """What a user should know of rows that are far from full; "" if they are not."""
        ...


class Batches:
    """Batches along the order of each epoch; the last may hold empty rows."""

    def __init__(self, epochs: Epochs, settings: DataSettings):
        self._epochs, self._settings = epochs, settings
        s = settings
        self._buckets = Buckets(s.length_buckets, s.image_buckets, s.target_buckets)
        self._steps = -(-epochs.samples // s.batch_size)

    def locate(self, step: int) -> tuple[int, int]:
        return divmod(step, self._steps)

    def steps(self, epochs: float) -> int:
        return math.ceil(epochs * self._steps)

    def entries(self, epoch: int, within: int) -> list[int]:
        size = self._settings.batch_size
        return self._epochs[epoch].order[within * size : (within + 1) * size].tolist()

    def before(self, epoch: int, within: int) -> np.ndarray:
        return self._epochs[epoch].order[: within * self._settings.batch_size]

    def room(self, entry: int, epoch: int, sizes: Sequence[Size]) -> Size | None:
        # A replacement must make no row longer and no shape larger.
        return self._buckets.hold(Size(*map(max, zip(*sizes)))) if sizes else None

    def rows(
        self, epoch: int, within: int, places: list[int], sizes: list[Size]
    ) -> tuple[list[list[int]], Shape]:
        held = self._buckets.hold(Size(*map(max, zip(*sizes)))) if sizes else None
        held = held or self._buckets.hold(Size(1, 0, 1))
        return [[i] for i in range(len(sizes))], Shape(self._settings.batch_size, *held)

    def identity(self) -> dict[str, str | int]:
        return {}

    @property
    def step_words(self) -> str:
        return str(self._settings.batch_size)

    def remark(self) -> str:
        return ""


class Exact(Batches):
    """The samples of each step as in Batches, in few rows of `pack_length` positions.

    Their number is one of few, chosen from all steps of `run` epochs, so that few shapes are compiled.
    """

    def __init__(self, epochs: Epochs, settings: DataSettings, sizes: Sizes, run: int):
        super().__init__(epochs, settings)
        self._multiple = math.lcm(settings.row_multiple or 1, settings.row_parts)
        self._sizes = _places(sizes, settings)
        self.shapes, self.share = self._choose(run)

    @property
    def summary(self) -> str:
        """What the rows hold, for the log."""
        rows = ", ".join(str(shape.rows) for shape in self.shapes)
        return (
            f"data.pack=exact: {self.share:.1%} real tokens in rows of "
            f"{self._settings.pack_length:,}, {rows} a step ({counted(len(self.shapes), 'shape')})"
        )

    def remark(self) -> str:
        if self.share >= LOW_EXACT:
            return ""
        return (
            f"data.pack=exact: only {self.share:.1%} of positions are real tokens: rows of "
            f"{self._settings.pack_length:,} hold the {self._settings.batch_size} samples of a step "
            "badly (use another data.pack_length, a larger batch_size, or data.pack=fill)"
        )

    def room(self, entry: int, epoch: int, sizes: Sequence[Size]) -> Size | None:
        return _room(self._sizes, self._epochs, entry, epoch)

    def rows(
        self, epoch: int, within: int, places: list[int], sizes: list[Size]
    ) -> tuple[list[list[int]], Shape]:
        packed = best_fit([size.length for size in sizes], self._settings.pack_length)
        needs = Sizes(*(np.array(c, np.int64) for c in zip(*sizes or [Size(1, 0, 1)])))
        for shape in self.shapes:
            if len(packed) <= shape.rows:
                rows, need = self._arranged(packed, needs, shape.rows)
                if need.room.fits(shape.room):
                    return rows, shape
        least = -(-max(len(packed), 1) // self._multiple) * self._multiple
        # Beyond what was counted: in a later epoch, or because of a replacement.
        return self._arranged(packed, needs, least)

    def _arranged(
        self, packed: list[list[int]], sizes: Sizes, count: int
    ) -> tuple[list[list[int]], Shape]:
        """`count` rows, some of them empty, dealt to the groups, and the shape that they need."""
        rows = packed + [[] for _ in range(count - len(packed))]
        groups = self._settings.row_parts
        of_rows = sizes.sums(rows)
        order = deal(of_rows, groups)
        images, targets = (c[order].reshape(groups, -1).sum(1).max() for c in of_rows[1:])
        shape = Shape(
            count, self._settings.pack_length, int(images), _rounded(int(targets)), groups
        )
        return [rows[r] for r in order], shape

    def _choose(self, run: int) -> tuple[list[Shape], float]:
        """(shapes for the steps of `run` epochs, those without images first; the real share)."""
        s, steps = self._settings, []
        for epoch in range(run):
            records = self._epochs[epoch].records
            for within in range(self._steps):
                own = self._sizes.at(records[self.entries(epoch, within)])
                packed = best_fit(own.length.tolist(), s.pack_length)
                least = -(-len(packed) // self._multiple) * self._multiple
                steps.append((bool(own.images.any()), least, packed, own))
        least_of = {
            kind: [least for pictured, least, *_ in steps if pictured == kind]
            for kind in (False, True)
        }
        # Steps of text alone have a shape of their own, so that they run no tower.
        text = _levels(least_of[False], 1 if least_of[True] else SHAPES)
        levels = {False: text, True: _levels(least_of[True], SHAPES - len(text))}
        shapes: dict[tuple[bool, int], Shape] = {}
        total = 0
        for pictured, least, packed, own in steps:
            rows = min(level for level in levels[pictured] if level >= least)
            _, need = self._arranged(packed, own, rows)
            found = shapes.get((pictured, rows), need)
            length, images, targets = map(max, found.room, need.room)
            shapes[pictured, rows] = Shape(rows, length, images, targets, need.groups)
            total += rows * s.pack_length
        real = sum(int(own.length.sum()) for *_, own in steps)
        return [shapes[key] for key in sorted(shapes)], real / total


class Fill:
    """So many rows of `pack_length` positions a step, all of them full; each entry once an epoch.

    A step holds about batch_size samples, and an epoch about as many steps as in Batches. Where the
    parts of a step do not divide its rows, empty ones follow: the plan is that of any other devices.
    """

    def __init__(self, epochs: Epochs, settings: DataSettings, sizes: Sizes, run: int):
        self._epochs, self._settings = epochs, settings
        self._sizes = _places(sizes, settings)
        wanted = settings.batch_size * self._sizes.length.mean() / settings.pack_length
        self.step_rows = settings.pack_rows or rows_of_step(wanted, settings.row_parts)
        self._shape_rows = -(-self.step_rows // settings.row_parts) * settings.row_parts
        self._run = run
        self._lock = threading.RLock()
        self._packed = functools.lru_cache(maxsize=KEPT)(self._pack)
        # Of the epochs known so far: the step after their last, and the slots that groups need.
        self._ends: list[int] = []
        self._slots: list[tuple[int, int]] = []
        first = self[0]
        self.digest = hashlib.sha256(
            np.asarray(first.entries, "<i4").tobytes() + np.asarray(first.starts, "<i8").tobytes()
        ).hexdigest()[:16]
        real = int(self._needs(0, first).length.sum())
        self.share = real / (self._ends[0] * self._shape_rows * settings.pack_length)

    @property
    def step_words(self) -> str:
        s, steps = self._settings, self._ends[0]
        own = -(-self._epochs.samples // s.batch_size)
        return (
            f"{counted(self.step_rows, 'full row')}, about {self._epochs.samples / steps:.0f} samples "
            f"({counted(steps, 'step')} an epoch by data.pack=fill; the recipe's are {own:,} of "
            f"{s.batch_size})"
        )

    @property
    def summary(self) -> str:
        """What the rows hold, for the log."""
        rows = counted(self.step_rows, "row")
        return (
            f"data.pack=fill: {self.share:.1%} real tokens in {rows} of "
            f"{self._settings.pack_length:,} a step"
        )

    def remark(self) -> str:
        if (empty := self._shape_rows - self.step_rows) and self.share < LOW_FILL:
            return (
                f"data.pack=fill: the samples of a step need {counted(self.step_rows, 'row')}, so "
                f"{empty} of {self._shape_rows} are empty, for micro-batches times devices to divide "
                "them (use a larger batch_size, a shorter data.pack_length, or fewer of either)"
            )
        if self.share >= LOW_FILL or self._ends[0] == 1:
            return ""
        last = len(self[0]) - (self._ends[0] - 1) * self.step_rows
        if self.share * self._ends[0] * self._shape_rows >= LOW_FILL * len(self[0]):
            return (
                f"data.pack=fill: only {self.share:.1%} of positions are real tokens: the last of an "
                f"epoch's {self._ends[0]} steps has {last} of {counted(self.step_rows, 'row')} (another "
                "data.pack_rows or batch_size may divide them better)"
            )
        middle, length = float(np.median(self._sizes.length)), self._settings.pack_length
        better = -(-math.ceil(middle * -(-length // middle)) // 128) * 128
        return (
            f"data.pack=fill: only {self.share:.1%} of positions are real tokens: samples of about "
            f"{middle:.0f} do not add up to {length:,} (--config.data.pack_length={better}, say)"
        )

    def __getitem__(self, epoch: int) -> Rows:
        with self._lock:  # else every thread that reaches a new epoch would pack it
            self._know(epoch)
            return self._packed(epoch)

    def _know(self, epoch: int) -> None:
        """Packs the epochs up to `epoch` that never were: their steps and slots are then kept."""
        with self._lock:
            while len(self._ends) <= epoch:
                self._packed(len(self._ends))

    def identity(self) -> dict[str, str | int]:
        return {"pack_rows": self.step_rows, "plan": self.digest}

    def locate(self, step: int) -> tuple[int, int]:
        while self._ends[-1] <= step:
            self._know(len(self._ends))
        epoch = next(n for n, end in enumerate(self._ends) if step < end)
        return epoch, step - (self._ends[epoch - 1] if epoch else 0)

    def steps(self, epochs: float) -> int:
        whole = math.floor(epochs)
        self._know(math.ceil(epochs) - 1)
        done = self._ends[whole - 1] if whole else 0
        more = self._ends[whole] - done if epochs > whole else 0
        return done + math.ceil((epochs - whole) * more)

    def entries(self, epoch: int, within: int) -> list[int]:
        return [entry for row in self._step(epoch, within) for entry in row]

    def before(self, epoch: int, within: int) -> np.ndarray:
        rows = self[epoch]
        return rows.entries[: rows.starts[min(within * self.step_rows, len(rows))]]

    def room(self, entry: int, epoch: int, sizes: Sequence[Size]) -> Size | None:
        return _room(self._sizes, self._epochs, entry, epoch)

    def rows(
        self, epoch: int, within: int, places: list[int], sizes: list[Size]
    ) -> tuple[list[list[int]], Shape]:
        numbers = {place: i for i, place in enumerate(places)}
        at = itertools.count()
        rows = [
            [numbers[p] for p in (next(at) for _ in row) if p in numbers]
            for row in self._step(epoch, within)
        ]
        known = max(epoch + 1, self._run)
        self._know(known - 1)
        images, targets = map(max, zip(*self._slots[:known]))
        s = self._settings
        shape = Shape(self._shape_rows, s.pack_length, images, _rounded(targets), s.row_parts)
        return rows, shape

    # Making the plan -----------------------------------------------------------------------------

    def _pack(self, epoch: int) -> Rows:
        entries = self._sizes.at(self._epochs[epoch].records)
        made = fill_rows(
            entries,
            self._epochs[epoch].order,
            self._settings.pack_length,
            self.step_rows,
            seeded_random(self._settings.seed, epoch, FILL),
        )
        if epoch == len(self._ends):
            steps = -(-len(made) // self.step_rows)
            self._slots.append(self._most(made.sums(entries), steps))
            self._ends.append(steps + (self._ends[-1] if self._ends else 0))
        return made

    def _most(self, rows: Sizes, steps: int) -> tuple[int, int]:
        """The images and targets of the group that needs most, of all steps."""
        groups, n, filled = self._settings.row_parts, self.step_rows, self._shape_rows
        most = np.zeros((steps, 2), np.int64)
        for step in range(steps):
            own = Sizes(*(c[step * n : (step + 1) * n] for c in rows))
            own = Sizes(*(np.pad(c, (0, filled - len(c))) for c in own))
            order = deal(own, groups)
            most[step] = [c[order].reshape(groups, -1).sum(1).max() for c in own[1:]]
        images, targets = most.max(0).tolist()
        return images, targets

    def _needs(self, epoch: int, rows: Rows) -> Sizes:
        """What each of some rows needs."""
        return rows.sums(self._sizes.at(self._epochs[epoch].records))

    def _step(self, epoch: int, within: int) -> list[list[int]]:
        """The rows of a step, empty ones included, dealt to the groups."""
        packed, first = self[epoch], within * self.step_rows
        rows = [packed[r] for r in range(first, min(first + self.step_rows, len(packed)))]
        rows += [[] for _ in range(self._shape_rows - len(rows))]
        records = self._epochs[epoch].records
        own = [self._sizes.at(records[row]) for row in rows]
        needs = Sizes(*(np.array([c.sum() for c in column]) for column in zip(*own)))
        return [rows[r] for r in deal(needs, self._settings.row_parts)]


def _room(sizes: Sizes, epochs: Epochs, entry: int, epoch: int) -> Size:
    """The place of an entry."""
    record = epochs[epoch].records[entry]
    return Size(*(int(column[record]) for column in sizes))


def _places(sizes: Sizes, settings: DataSettings) -> Sizes:
    """The sizes of places: a record that cannot be trained has one for what replaces it, of the
    median size of those that have images too, or have none.
    """
    length, images, targets = (column.copy() for column in sizes)
    bad = length == 0
    for kind in (images > 0, images == 0):
        good = kind & ~bad
        for column in (length, targets):
            column[kind & bad] = np.median(column[good]) if good.any() else 1
    return Sizes(np.minimum(length, settings.pack_length), images, targets)


def _levels(needs: list[int], most: int) -> list[int]:
    """Up to `most` row counts, for steps that need so many rows each, that are the least work.

    One more count must save what compiling it costs.
    """
    if not needs:
        return []
    values, counts = np.unique(needs, return_counts=True)
    price = COMPILING * float(np.mean(needs))
    if len(values) > 24:  # enough to choose from
        kept = np.unique(np.linspace(0, len(values) - 1, 24).astype(int))
        counts = np.add.reduceat(counts, np.concatenate([[0], kept[:-1] + 1]))
        values = values[kept]

    def work(levels: tuple[int, ...]) -> float:
        at = np.searchsorted(levels, values)
        return float((np.asarray(levels)[at] * counts).sum()) + price * len(levels)

    top = int(values[-1])
    lower = [int(v) for v in values[:-1]]
    choices = [(*c, top) for k in range(most) for c in itertools.combinations(lower, k)]
    return list(min(choices, key=work))


def _rounded(targets: int) -> int:
    """Target slots for so many: steps of an eighth, so that the number looks alike in most runs."""
    return -(-targets // 8) * 8
