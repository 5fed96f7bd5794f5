"""What became of the samples of a run: given, seen, replaced, empty, cut, noted, bad."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llava_jax.data.bad import SHOWN, BadSamples
from llava_jax.data.check import Dataset
from llava_jax.data.layout import Layout
from llava_jax.data.sampler import Epochs

COUNTS = ("given", "replaced", "empty", "cut", "image_replaced", "image_empty")
"""The last two are the part of `replaced` and `empty` that images caused, which a host knows only of
its own rows; everything else is the same on every host."""


def join_counts(hosts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The COUNTS of a run from those of its hosts, the first one first."""
    total = {name: hosts[0][name] for name in COUNTS}
    for host in hosts[1:]:
        for name in ("replaced", "empty"):
            total[name] += host[f"image_{name}"]
            total[f"image_{name}"] += host[f"image_{name}"]
    return total


class Account:
    """Counts batches as they are given out. Not for threads: what is made ahead does not count yet.

    A sample's notes count the first time that it is seen, so per sample and not per visit.
    """

    def __init__(self, data: Dataset, epochs: Epochs, layout: Layout):
        self._data, self._epochs, self._layout = data, epochs, layout
        self.counts = dict.fromkeys(COUNTS, 0)
        self._notes: Counter[str] = Counter()
        self._noted: defaultdict[str, list[str]] = defaultdict(list)
        self._seen = np.zeros(len(data), bool)

    def add(self, info: Mapping[str, Any], noted: Iterable[tuple[int, Iterable[str]]]) -> None:
        """One batch given out. noted: (record, notes) of the samples whose turn it was."""
        for name in COUNTS:
            self.counts[name] += info[name]
        for record, notes in noted:
            if not self._seen[record]:
                self._seen[record] = True
                for note in notes:
                    self._notes[note] += 1
                    if len(self._noted[note]) < SHOWN:
                        self._noted[note].append(self._data.ids[record])

    def state(self) -> dict[str, Any]:
        """JSON-ready, for `restore`."""
        noted = {note: list(ids) for note, ids in self._noted.items()}
        return {"counts": dict(self.counts), "notes": dict(self._notes), "noted": noted}

    def restore(self, state: Mapping[str, Any], step: int, *, images: bool = True) -> None:
        """Goes on from `state` at global step `step`; which were seen follows from the step.

        images: whether the counts that images caused are those of this host.
        """
        self.counts |= state.get("counts", {})
        if not images:
            for name in ("replaced", "empty"):
                self.counts[name] -= self.counts[f"image_{name}"]
                self.counts[f"image_{name}"] = 0
        self._notes = Counter(state.get("notes", {}))
        self._noted = defaultdict(list, {k: list(v) for k, v in state.get("noted", {}).items()})
        self._seen[:] = False
        number, within = self._layout.locate(step)
        for earlier in range(number):
            self._seen[self._epochs.records(earlier)] = True
            if self._seen.all():
                return
        if within:
            entries = self._layout.before(number, within)
            self._seen[self._epochs[number].records[entries]] = True

    def report(self, bad: BadSamples) -> dict[str, Any]:
        """Everything, JSON-ready; the keys are explained in docs/data.md."""
        return {
            "records": self._data.total,
            "held_out": self._data.held_out,
            "samples": self._epochs.samples,
            **self.counts,
            "seen": int(self._seen.sum()),
            "notes": dict(self._notes.most_common()),
            "noted": dict(self._noted),
            "bad_count": len(bad),
            "bad_kinds": bad.kinds(),
            "bad": bad.rows(),
        }
