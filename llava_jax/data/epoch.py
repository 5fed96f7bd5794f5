"""Which record sits where in an epoch, and which others may stand in for it.

An epoch has a seat for every sample that it shows. Without weights the seats are the records; with
them, a file of weight 2.5 has two seats for each of its records, and one for each of a half that is
drawn anew in every epoch. All of it depends on the seed and the epoch alone.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llava_jax.data.check import Dataset
from llava_jax.data.order import epoch_order, lasting_random
from llava_jax.data.settings import DataSettings
from llava_jax.errors import SampleError
from llava_jax.text.records import modality_lengths

MAX_TRIES = 100
"""Samples looked at for one that may stand in for a bad one; beyond, its place stays empty."""

# Last words of the keys of `lasting_random`, after (seed, epoch, ...): one for each purpose.
TURNS, AUGMENT, STAND_IN, WEIGHTS = 0, 1, 2, 3


@dataclass(frozen=True)
class Epoch:
    """places: int64[samples], the record of each seat; order: int64[samples], seats as shown.

    alike: for text (False) and images (True), the seats of such records.
    """

    places: np.ndarray
    order: np.ndarray
    alike: dict[bool, np.ndarray]


class Epochs:
    """The epochs of a data set. Threads may share it."""

    def __init__(self, data: Dataset, settings: DataSettings):
        self._settings, self._with_image = settings, data.with_image
        weighted = (
            settings.holdout_side == "train"
        )  # the held side is for looking, each record once
        self._parts = [
            (np.flatnonzero(data.file == n), file.weight if weighted else 1.0)
            for n, file in enumerate(data.files)
            if file.weight
        ]
        self.samples = sum(_share(len(places), weight) for places, weight in self._parts)
        if not self.samples:
            raise SampleError("data.weights leave no sample in an epoch", fix="raise them")
        self._lengths: np.ndarray | None = None
        if settings.group_by_modality:
            self._lengths = np.asarray([n or 1 for n in modality_lengths(data.records)], np.int64)
        self._lock = threading.Lock()
        self._cached = functools.lru_cache(maxsize=2)(self._make)

    def __getitem__(self, number: int) -> Epoch:
        with self._lock:  # else every thread that reaches a new epoch would make it
            return self._cached(number)

    def places(self, number: int) -> np.ndarray:
        """int64[samples]: the record of each seat of epoch `number`."""
        drawn = [
            _drawn(places, weight, lasting_random(self._settings.seed, number, n, WEIGHTS))
            for n, (places, weight) in enumerate(self._parts)
        ]
        return np.concatenate(drawn)

    def stand_ins(self, number: int, seat: int) -> Iterator[int]:
        """Up to MAX_TRIES seats that may stand in for `seat`, of its modality, drawn at random.

        Each draw is among all seats alike, so that no record is trained more often for standing
        near many bad ones.
        """
        epoch = self[number]
        pool = epoch.alike[bool(self._with_image[epoch.places[seat]])]
        rng = lasting_random(self._settings.seed, number, seat, STAND_IN)
        for share in rng.random_sample(MAX_TRIES):
            yield int(pool[int(share * len(pool))])

    def _make(self, number: int) -> Epoch:
        s = self._settings
        places = self.places(number)
        order = epoch_order(
            len(places),
            s.seed,
            number,
            shuffle=s.shuffle,
            lengths=None if self._lengths is None else self._lengths[places].tolist(),
            batch_size=s.batch_size,
            groups=s.groups,
        )
        image = self._with_image[places]
        alike = {kind: np.flatnonzero(image == kind) for kind in (False, True)}
        return Epoch(places, order, alike)


def _share(count: int, weight: float) -> int:
    """Seats of a file of `count` records."""
    whole = math.floor(weight)
    return whole * count + round((weight - whole) * count)


def _drawn(places: np.ndarray, weight: float, rng: np.random.RandomState) -> np.ndarray:
    whole = math.floor(weight)
    rest = _share(len(places), weight) - whole * len(places)
    some = np.sort(rng.permutation(len(places))[:rest]) if rest else np.zeros(0, np.int64)
    return np.concatenate([*[places] * whole, places[some]])
