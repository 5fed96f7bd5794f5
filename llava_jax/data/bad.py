"""The samples that cannot be used: counted once each, grouped by reason, listed in a file."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.errors import SampleError

log = logging.getLogger(__name__)

SHOWN = 5
"""Kinds per error line, ids per kind, and log lines about a kind during a run."""

_OWN_WORDS = re.compile(r"'[^']*'|\"[^\"]*\"|\d+")  # what differs among samples of a kind


class TooManyBad(SampleError):
    """More samples are bad than data.bad_limit allows, or one is and data.bad_samples is "error"."""


class Bad(NamedTuple):
    """One bad sample: its index among all records, its id, why, and what to do about it."""

    index: int
    id: str
    reason: str
    kind: str = ""  # the reason without what differs from sample to sample
    fix: str | None = None

    def row(self) -> dict[str, Any]:
        """JSON-ready, as the report lists it: the fix goes with the reason."""
        reason = f"{self.reason} ({self.fix})" if self.fix else self.reason
        return {"index": self.index, "id": self.id, "reason": reason, "kind": self.kind}


def bad_sample(
    index: int, sample_id: str, reason: str, *, kind: str = "", fix: str | None = None
) -> Bad:
    """A Bad whose kind, where not given, is the reason without its names and numbers."""
    return Bad(index, sample_id, reason, kind or _OWN_WORDS.sub("_", reason), fix)


def first_ids(ids: Sequence[str]) -> str:
    """The first SHOWN of many ids, for a message."""
    return ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")


class BadSamples:
    """Counts the samples that cannot be used, once each, and stops the run where there are too many.

    strict: raise at the first. limit: the largest number to accept. total: of how many; where all of
    them are bad there is nothing to train, whatever the limit.
    report: a JSON lines file that lists them, begun anew: what an earlier run found may be mended.
    """

    def __init__(
        self,
        *,
        strict: bool,
        limit: int,
        total: int | None = None,
        report: str | Path | None = None,
    ):
        self._strict, self._limit, self._total = strict, limit, total
        self._report = Path(report) if report else None
        self._found: dict[int, Bad] = {}
        self._kinds: Counter[str] = Counter()

    def begin(self, found: Sequence[Bad], *, say: bool = True) -> None:
        """Takes what is known before the first step. Raises TooManyBad; the report is written first.

        say: list and log it; several processes find the same, and one of them says so.
        """
        if self._report:
            self._report.parent.mkdir(parents=True, exist_ok=True)
            if say:
                self._report.write_text("", encoding="utf-8")
            else:  # most processes find nothing of their own to list
                self._report.unlink(missing_ok=True)
        self._take(found, listed=say)
        if self._found:
            self._check_limit(next(iter(self._found.values())))
        for kind, count in self._kinds.most_common(SHOWN) if say else ():
            fix = self._fix(kind)
            more = (f": {fix}" if fix else "") + self._listed
            log.warning("%s left out: %s (%s)%s", _samples(count), kind, self._ids(kind), more)

    def add(self, bad: Bad) -> None:
        """Takes one sample. Raises TooManyBad if strict or if there are now too many."""
        if bad.index not in self._found:
            self._take([bad])
            count = self._kinds[bad.kind]
            if count <= SHOWN:
                log.warning("sample %s is left out: %s", bad.id, bad.reason)
            elif count == SHOWN + 1:
                log.warning("further samples of this kind are counted without a line each")
        self._check_limit(bad)

    def restore(self, rows: Sequence[dict[str, Any]]) -> None:
        """Takes rows of an earlier `rows`, without logging them or checking the limit again."""
        self._take(
            [bad_sample(r["index"], r["id"], r["reason"], kind=r.get("kind", "")) for r in rows]
        )

    def rows(self) -> list[dict[str, Any]]:
        """[{"index", "id", "reason", "kind"}], by index."""
        return [self._found[i].row() for i in sorted(self._found)]

    def kinds(self) -> dict[str, int]:
        """How many samples are bad for each kind of reason, most frequent first."""
        return dict(self._kinds.most_common())

    def summary(self) -> str:
        """The most frequent kinds of reasons, each with its count and the first ids."""
        parts = [f"{k} ({n:,}: {self._ids(k)})" for k, n in self._kinds.most_common(SHOWN)]
        if more := len(self._kinds) - len(parts):
            parts.append(f"and {more} other reasons")
        return "; ".join(parts)

    def fix(self) -> str:
        """What to do about the most frequent kind."""
        return self._fix(max(self._kinds, key=lambda k: self._kinds[k])) or "fix the data"

    def __len__(self) -> int:
        return len(self._found)

    def __contains__(self, index: int) -> bool:
        return index in self._found

    def _take(self, found: Sequence[Bad], *, listed: bool = True) -> None:
        new = {b.index: b for b in found if b.index not in self._found}
        self._found |= new
        self._kinds.update(b.kind for b in new.values())
        if self._report and new and listed:
            with self._report.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(bad.row()) + "\n" for bad in new.values())

    def _fix(self, kind: str) -> str | None:
        return next((b.fix for b in self._found.values() if b.kind == kind and b.fix), None)

    @property
    def _listed(self) -> str:
        return f"; all are listed in {self._report}" if self._report else ""

    def _ids(self, kind: str) -> str:
        return first_ids([b.id for b in self._found.values() if b.kind == kind])

    def _check_limit(self, last: Bad) -> None:
        if self._strict:
            fix = last.fix or 'data.bad_samples="skip" goes on without it'
            raise TooManyBad(f"sample {last.id}: {last.reason}", fix=fix)
        count = len(self._found)
        if count == self._total:
            raise TooManyBad(f"every sample is bad: {self.summary()}", fix=self.fix())
        if count > self._limit:
            raise TooManyBad(
                f"{_samples(count)} bad, more than data.bad_limit allows ({self._limit:,}): "
                + self.summary(),
                fix=f"{self.fix()}, or raise data.bad_limit{self._listed}",
            )


def _samples(count: int) -> str:
    return "1 sample is" if count == 1 else f"{count:,} samples are"
