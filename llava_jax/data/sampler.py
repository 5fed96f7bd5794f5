"""In which order samples are seen, which are held out, and which may replace a bad one.

All of it depends on a seed and the number of the epoch alone, so any epoch is known without walking
through the ones before it. `group_by_modality_length` is the original's rule
(llava/train/llava_trainer.py), exact when given the permutations that it drew.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.data.check import Dataset
from llava_jax.data.settings import DataSettings
from llava_jax.errors import ConfigError, SampleError

MAX_TRIES = 100
"""Samples looked at for one that may replace a bad one; after that, its place stays empty."""

# Last words of the keys of `seeded_random`, after (seed, epoch, ...): one for each purpose.
TURNS, AUGMENT, REPLACE, WEIGHTS, FILL = 0, 1, 2, 3, 4

Permute = Callable[[int], Sequence[int] | np.ndarray]
"""n -> a permutation of range(n); called in a fixed order."""


def seeded_random(*key: int) -> np.random.RandomState:
    """Random numbers determined by `key` alone, the same in every version of numpy.

    numpy keeps the streams of SeedSequence, MT19937 and RandomState for good (NEP 19), those of
    Generator not: a run must go on in the same order after an upgrade.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


# Epochs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """An epoch has an entry for each time that it shows a record.

    records: int64[samples], the record of each entry. order: int64[samples], entries as shown.
    by_modality: for text (False) and images (True), the entries of such records.
    """

    records: np.ndarray
    order: np.ndarray
    by_modality: dict[bool, np.ndarray]


class Epochs:
    """The epochs of a data set. Threads may share it.

    Without weights the entries are the records; with them, a file of weight 2.5 has two entries for
    each of its records, and one for each of a half that is drawn anew in every epoch.
    """

    def __init__(self, data: Dataset, settings: DataSettings):
        self._settings, self._with_image = settings, data.with_image
        weighted = settings.holdout_side == "train"  # the held-out side shows each record once
        self._files = [
            (np.flatnonzero(data.file == n), file.weight if weighted else 1.0)
            for n, file in enumerate(data.files)
            if file.weight
        ]
        self.samples = sum(_entries(len(records), weight) for records, weight in self._files)
        if not self.samples:
            raise SampleError("data.weights leave no sample in an epoch", fix="raise them")
        self._lengths: np.ndarray | None = None
        if settings.group_by_modality:
            self._lengths = np.where(data.words == 0, 1, data.words).astype(np.int64)
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=2)(self._make)

    def __getitem__(self, number: int) -> Epoch:
        with self._lock:  # else every thread that reaches a new epoch would make it
            return self._cached(number)

    def records(self, number: int) -> np.ndarray:
        """int64[samples]: the record of each entry of epoch `number`."""
        entries = []
        for n, (records, weight) in enumerate(self._files):
            whole = math.floor(weight)
            rest = _entries(len(records), weight) - whole * len(records)
            rng = seeded_random(self._settings.seed, number, n, WEIGHTS)
            drawn = np.sort(rng.permutation(len(records))[:rest]) if rest else []
            entries += [*[records] * whole, records[np.asarray(drawn, np.int64)]]
        return np.concatenate(entries)

    def replacements(self, number: int, entry: int) -> Iterator[int]:
        """Up to MAX_TRIES entries that may replace `entry`, of its modality, drawn at random.

        Each is drawn among all entries alike, so that no record is trained more often for being near
        many bad ones. Held-out samples are replaced by none: a loss over them counts each once.
        """
        if self._settings.holdout_side == "held":
            return
        epoch = self[number]
        pool = epoch.by_modality[bool(self._with_image[epoch.records[entry]])]
        rng = seeded_random(self._settings.seed, number, entry, REPLACE)
        for share in rng.random_sample(MAX_TRIES):
            yield int(pool[int(share * len(pool))])

    def _make(self, number: int) -> Epoch:
        s, records = self._settings, self.records(number)
        order = epoch_order(
            len(records),
            s.seed,
            number,
            shuffle=s.shuffle,
            lengths=None if self._lengths is None else self._lengths[records].tolist(),
            batch_size=s.batch_size,
            groups=s.groups,
        )
        image = self._with_image[records]
        return Epoch(
            records, order, {kind: np.flatnonzero(image == kind) for kind in (False, True)}
        )


def _entries(count: int, weight: float) -> int:
    """How often an epoch shows the `count` records of a file, all together."""
    whole = math.floor(weight)
    return whole * count + round((weight - whole) * count)


# The order of an epoch ----------------------------------------------------------------------------


def seeded_permutations(seed: int, epoch: int) -> Permute:
    """Permutations that depend on the seed, the epoch and how many were drawn before."""
    drawn = itertools.count()
    return lambda n: seeded_random(seed, epoch, next(drawn)).permutation(n)


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
    groups: int = 1,
) -> np.ndarray:
    """int64[count]: the order of one epoch: as stored, shuffled, or grouped by modality and length.

    lengths: of text.records.modality_lengths; given, batches hold one modality and similar lengths.
    groups: parts of similar total length in every batch (one per device); divides batch_size.
    """
    permute = seeded_permutations(seed, epoch)
    if lengths is not None:
        if batch_size % groups:
            raise ConfigError(f"batch_size {batch_size} is not a multiple of groups {groups}")
        order = group_by_modality_length(lengths, batch_size // groups, groups, permute)
    else:
        order = permute(count) if shuffle else np.arange(count)
    return np.asarray(order, np.int64)


def group_by_modality_length(
    lengths: Sequence[int], batch_size: int, world_size: int, permute: Permute
) -> list[int]:
    """The original's order: every batch of batch_size * world_size is of one modality but the last.

    Raises SampleError for a length of 0, whose modality is unknown.
    """
    for i, length in enumerate(lengths):
        if length == 0:
            raise SampleError(f"sample {i} has no words, so it cannot be grouped by length")
    image = [i for i, n in enumerate(lengths) if n > 0]
    text = [i for i, n in enumerate(lengths) if n < 0]
    if not image or not text:
        # Text alone keeps its negative lengths, so the shortest come first: the original's way.
        return group_by_length(lengths, batch_size, world_size, permute)

    size = batch_size * world_size
    batches: list[list[int]] = []
    rest: list[int] = []
    for members in (image, text):
        own = [abs(lengths[i]) for i in members]
        order = [members[i] for i in group_by_length(own, batch_size, world_size, permute)]
        cut = [order[i : i + size] for i in range(0, len(order), size)]
        batches += cut[:-1]
        rest += cut[-1]  # even when it is full, as in the original
    shuffled = [batches[int(i)] for i in permute(len(batches))]
    return [i for batch in [*shuffled, sorted(rest)] for i in batch]


def group_by_length(
    lengths: Sequence[int], batch_size: int, world_size: int, permute: Permute
) -> list[int]:
    """Shuffled, cut into batches of batch_size * world_size, each sorted and dealt to world_size parts."""
    size = batch_size * world_size
    order = [int(i) for i in permute(len(lengths))]
    out: list[int] = []
    for start in range(0, len(order), size):
        batch = sorted(order[start : start + size], key=lambda i: lengths[i], reverse=True)
        for part in split_to_even_chunks(batch, lengths, world_size):
            out += part
    return out


def split_to_even_chunks(
    indices: Sequence[int], lengths: Sequence[int], num_chunks: int
) -> list[list[int]]:
    """Deals `indices` to chunks of as many members and about the same total length.

    Each index goes to the chunk with the least total so far; a chunk that is full takes no more.
    Where the members cannot be dealt evenly, chunk k takes every num_chunks-th from k.
    """
    if len(indices) % num_chunks:
        return [list(indices[k::num_chunks]) for k in range(num_chunks)]
    members = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0] * num_chunks
    for index in indices:
        least = totals.index(min(totals))
        chunks[least].append(index)
        totals[least] += lengths[index]
        if len(chunks[least]) == members:
            totals[least] = float("inf")
    return chunks
