"""Packing as arithmetic on lengths: which samples share a row, and which rows share a group.

Nothing here knows texts or devices: the same sizes make the same rows on every host. Samples need
positions, images and targets. A row has room for so many positions; the rows of a group share image
and target slots (llava_jax/batch.py), so rows are dealt to groups evenly.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

WINDOW = 16_384
"""Samples among which `fill_rows` looks for those that fill a row."""
CARRIED = 0.12
"""The part of a window that is left to the next one: the last samples of a window fit badly."""
LONG = 1.5
"""From so many times the mean on, samples are given out first: they are the hardest to place."""
TRIED = 16
"""Lengths tried, downwards, where the longest that fit have too many images or targets."""
CANDIDATES = 16
"""Samples tried for the last place but one of a row."""
CROWDED = 1.5
"""A step may hold so many times the rows that were wanted, so that devices divide them."""


class Sizes(NamedTuple):
    """What each of many samples or rows needs: int32[n] each."""

    length: np.ndarray
    images: np.ndarray
    targets: np.ndarray

    def at(self, index: np.ndarray) -> Sizes:
        """Of some of them."""
        return Sizes(*(column[index] for column in self))

    def sums(self, rows: Iterable[Sequence[int]]) -> Sizes:
        """What rows of them need together."""
        index = [np.asarray(row, np.int64) for row in rows]
        return Sizes(*(np.array([c[row].sum() for row in index], np.int64) for c in self))


# One step: its own samples in few rows ------------------------------------------------------------


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of `capacity` that hold all samples, longest first, each into the fullest row it fits.

    Ties keep their order, so the same lengths always make the same rows.
    """
    rows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (positions left, -row), rising
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(left, (lengths[i], -len(rows)))
        free, row = left.pop(at) if at < len(left) else (capacity, -len(rows))
        if -row == len(rows):
            rows.append([])
        rows[-row].append(i)
        bisect.insort(left, (free - lengths[i], row))
    return rows


def deal(rows: Sizes, groups: int) -> np.ndarray:
    """int64[R]: rows in an order whose R / groups consecutive ones need as few slots as possible.

    Those that need most come first, each to the group that is then the least filled.
    """
    count = len(rows.length)
    members = count // groups
    if members == 1 or groups == 1:
        return np.arange(count)
    need = np.stack([rows.images, rows.targets], 1) / np.maximum(
        [rows.images.sum(), rows.targets.sum()], 1
    )  # [R, 2]
    filled, taken = np.zeros((groups, 2)), np.zeros(groups, np.int64)
    order = np.empty((groups, members), np.int64)
    for row in np.argsort(-need.sum(1), kind="stable"):
        after = (filled + need[row]).max(1) + (taken == members) * 9.0
        group = int(np.argmin(after))
        order[group, taken[group]] = row
        filled[group] += need[row]
        taken[group] += 1
    return order.ravel()


def rows_of_step(wanted: float, parts: int) -> int:
    """How many full rows make a step of about `wanted`: 1, 2, 4 or a multiple of 8, so that one device
    and eight have the same plan.

    `parts` (micro-batches times devices along the batch) divide it, unless a step would hold far more
    than was wanted; empty rows then serve the other parts.
    """

    def nearest(parts: int) -> int:
        step = math.lcm(8, parts)
        near = [n for n in (1, 2, 4) if n % parts == 0]
        near.append(max(step, round(wanted / step) * step))
        return min(near, key=lambda n: abs(n - wanted))

    found = nearest(parts)
    return found if found <= CROWDED * wanted else nearest(1)


# An epoch: rows that are full ---------------------------------------------------------------------


class Rows(NamedTuple):
    """Rows of samples: row r holds `entries[starts[r]:starts[r + 1]]`."""

    entries: np.ndarray  # int32[n]
    starts: np.ndarray  # int64[R + 1]

    def __getitem__(self, r) -> list[int]:
        return self.entries[self.starts[r] : self.starts[r + 1]].tolist()

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sums(self, sizes: Sizes) -> Sizes:
        """What each row needs."""
        return Sizes(
            *(np.add.reduceat(c[self.entries].astype(np.int64), self.starts[:-1]) for c in sizes)
        )


def fill_rows(
    sizes: Sizes,
    order: np.ndarray,
    capacity: int,
    step_rows: int,
    rng: np.random.RandomState,
) -> Rows:
    """Rows of `capacity` positions that hold each entry of `order` once and are nearly full.

    Entries are taken in windows along `order`. A row begins with the longest of the window, goes on
    with any, and ends with the pair that leaves the least. What a window packs badly is left to the
    next one. Images and targets of a row are bounded a little above their mean, and `step_rows` rows
    after each other, a step, need about the same, so that few slots suffice.
    rng: gives the steps of a window their order.
    """
    bound = _bounds(sizes, capacity)
    done: list[list[int]] = []
    carried: list[int] = []
    for start in range(0, len(order), WINDOW):
        last = start + WINDOW >= len(order)
        entries = [*carried, *order[start : start + WINDOW].tolist()]
        made = _Window(sizes, entries, capacity, bound).rows(0 if last else int(CARRIED * WINDOW))
        keep = len(made) if last else len(made) // step_rows * step_rows
        packed = {e for row in made[:keep] for e in row}
        carried = [e for e in entries if e not in packed]
        done += _even_steps(sizes, made[:keep], step_rows, rng)
    starts = np.cumsum([0, *map(len, done)])
    return Rows(np.fromiter((e for row in done for e in row), np.int32, len(order)), starts)


def _even_steps(
    sizes: Sizes, rows: list[list[int]], step_rows: int, rng: np.random.RandomState
) -> list[list[int]]:
    """Rows of a window in an order whose steps are alike; a step that is not full comes last."""
    steps = len(rows) // step_rows
    rest = rows[steps * step_rows :]
    order = deal(sizes.sums(rows[: steps * step_rows]), steps).reshape(steps, -1) if steps else []
    return [rows[r] for n in rng.permutation(steps) for r in order[n]] + rest


def _bounds(sizes: Sizes, capacity: int) -> tuple[int, int]:
    """The most images and targets of a row: a margin above the mean, and what one sample may need
    beside others that need the mean.
    """
    found = []
    for need, margin in ((sizes.images, 1.4), (sizes.targets, 1.6)):
        mean = capacity * need.sum() / max(sizes.length.sum(), 1)  # of a row
        beside = mean * (1 - sizes.length / capacity)
        found.append(int(np.ceil(max(margin * mean, (need + beside).max()))))
    return found[0], found[1]


class _Window:
    """The entries of a window by length, of which rows are made."""

    def __init__(self, sizes: Sizes, entries: list[int], capacity: int, bound: tuple[int, int]):
        self._length = sizes.length[entries].tolist()
        self._images = sizes.images[entries].tolist()
        self._targets = sizes.targets[entries].tolist()
        self._entries, self._capacity, self._bound = entries, capacity, bound
        self._free = [True] * len(entries)
        self._left = len(entries)
        self._next = 0  # the first that may be free, in the window's own order
        self._by_length: list[list[int]] = [[] for _ in range(capacity + 1)]
        for i in range(len(entries) - 1, -1, -1):
            self._by_length[self._length[i]].append(i)
        # From a length that is used up to a lower one; found lazily.
        self._below = list(range(capacity + 1))
        self._least = min(self._length, default=1)
        self._mean = max(sum(self._length) / max(len(entries), 1), 1.0)

    def rows(self, leave: int) -> list[list[int]]:
        """Rows of entries, until no more than `leave` are left."""
        made = []
        while self._left > leave:
            made.append([self._entries[i] for i in self._row()])
        return made

    def _row(self) -> list[int]:
        longest = self._longest(self._capacity)
        first = (
            self._by_length[longest][-1] if longest > LONG * self._mean else self._candidates()[0]
        )
        row, room = [first], self._take(first, (self._capacity, *self._bound))
        while room[0] >= self._least:
            more = round(room[0] / self._mean)  # about how many go in
            picked = self._any(room) if more > 2 else self._pair(room)
            if not picked:
                break
            for i in picked:
                row.append(i)
                room = self._take(i, room)
        return row

    def _any(self, room: tuple[int, int, int]) -> list[int]:
        """The next of the window that fits."""
        for i in self._candidates():
            if self._fits(i, room):
                return [i]
        return self._pair(room)

    def _pair(self, room: tuple[int, int, int]) -> list[int]:
        """The one or two, of a few candidates, that leave the least of a row."""
        one = self._fitting(room)
        best, left = ([one], room[0] - self._length[one]) if one is not None else ([], room[0])
        for i in self._candidates():
            if left == 0:
                break
            if not self._fits(i, room):
                continue
            after = room[0] - self._length[i]
            other = None
            if after >= self._least:
                beside = (after, room[1] - self._images[i], room[2] - self._targets[i])
                other = self._fitting(beside, i)
            picked = [i] if other is None else [i, other]
            if (rest := room[0] - sum(self._length[k] for k in picked)) < left:
                best, left = picked, rest
        return best

    def _fits(self, i: int, room: tuple[int, int, int]) -> bool:
        return (
            self._length[i] <= room[0]
            and self._images[i] <= room[1]
            and self._targets[i] <= room[2]
        )

    def _candidates(self) -> list[int]:
        """The next free ones, in the window's own order."""
        free, at, end = self._free, self._next, len(self._free)
        while at < end and not free[at]:
            at += 1
        self._next = at
        found = []
        while at < end and len(found) < CANDIDATES:
            if free[at]:
                found.append(at)
            at += 1
        return found

    def _fitting(self, room: tuple[int, int, int], but: int = -1) -> int | None:
        """One of the longest that fit; a few are looked at where images or targets are too many."""
        length = room[0]
        for _ in range(TRIED):
            length = self._longest(length)
            for i in self._by_length[length][-4:]:
                if self._free[i] and i != but and self._fits(i, room):
                    return i
            length -= 1
            if length <= 0:
                break
        return None

    def _longest(self, length: int) -> int:
        """The longest length of a free entry up to `length`; 0 if there is none."""
        below, at = self._below, length
        while at > 0:
            stack = self._by_length[at]
            while stack and not self._free[stack[-1]]:
                stack.pop()
            if stack:
                break
            below[at] = below[at - 1]
            at = below[at]
        while length > at:  # the way is shorter next time
            below[length], length = at, below[length]
        return at

    def _take(self, i: int, room: tuple[int, int, int]) -> tuple[int, int, int]:
        self._free[i] = False
        self._left -= 1
        return room[0] - self._length[i], room[1] - self._images[i], room[2] - self._targets[i]
