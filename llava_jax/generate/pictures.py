"""Whose features are on the device, and in which places: a picture that is asked about again is not seen again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llava_jax.generate.generator import Generator
from llava_jax.generate.job import Job

_ROOM = 32  # pictures whose features stay, at least


class Pictures:
    """The places of an engine's state. room: how many there are. rows: pictures seen in one call.

    counts: the engine's.
    """

    def __init__(self, generator: Generator, rows: int, counts: Counter[str]):
        touched = -(-generator.chunk // generator.config.image_tokens) + 1  # that a chunk can show
        self.room = max(rows * touched, _ROOM)
        self.places: OrderedDict[bytes, int] = OrderedDict()
        self._generator, self._rows, self._counts = generator, rows, counts

    def see(self, group: Sequence[Job], call: Callable[..., Any]) -> list[np.ndarray]:
        """int32[t] for each job: the feature rows of its next positions, on the device by then.

        call: runs one of the generator's programs on the engine's state. It is not kept: an engine whose
        parts hold it would keep its memory until the garbage collector comes.
        """
        per = self._generator.config.image_tokens
        parts = [job.rows[job.read : job.read + self._generator.chunk] for job in group]
        needed: dict[bytes, tuple[Any, str]] = {}
        for job, rows in zip(group, parts):
            for i in np.unique(rows[rows >= 0] // per):
                needed[job.pictures[i]] = job.prompt.images[i], job.adapter
        for key in [key for key in needed if key in self.places]:
            self.places.move_to_end(key)
            self._counts["pictures_reused"] += 1
        missing: dict[tuple, list] = {}
        for key, (pixels, adapter) in needed.items():
            if key not in self.places:
                # One that came normalised is float, and needs another program.
                encoded = pixels.dtype == np.uint8
                eyes = adapter if adapter in self._generator.eyes else ""
                missing.setdefault((encoded, eyes), []).append((key, pixels))
        for (_, eyes), todo in missing.items():
            for start in range(0, len(todo), self._rows):
                some = todo[start : start + self._rows]
                call("see", *self._placed(some, set(needed)), eyes=eyes)
                self._counts["pictures_seen"] += len(some)
        found = []
        for job, rows in zip(group, parts):
            images = np.array([self.places.get(key, 0) for key in job.pictures], np.int32)
            found.append(
                np.where(rows >= 0, images[rows // per] * per + rows % per, -1).astype(np.int32)
                if len(images)
                else rows
            )
        return found

    def _placed(
        self, pictures: Sequence[tuple[bytes, Any]], keep: set[bytes]
    ) -> tuple[np.ndarray, np.ndarray]:
        """(pixels, places) of `rows` pictures, in place of those that were not asked for the longest."""
        at = []
        for key, _ in pictures:
            place = len(self.places)
            if place >= self.room:
                old = next(k for k in self.places if k not in keep)
                place = self.places.pop(old)
            self.places[key] = place
            at.append(place)
        rows = [*range(len(pictures)), *[0] * (self._rows - len(pictures))]
        images = np.stack([pictures[i][1] for i in rows])
        as_read = np.uint8 if images.dtype == np.uint8 else np.float32
        return images.astype(as_read, copy=False), np.array(at, np.int32)[rows]
