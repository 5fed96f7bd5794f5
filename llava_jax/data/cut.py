"""Says which samples are longer than data.max_length: when the first is cut, and at the end of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.data.bad import first_ids
from llava_jax.errors import counted
from llava_jax.text.example import LEFT_OUT, TRUNCATED

log = logging.getLogger(__name__)

LOST = {TRUNCATED: "were cut", LEFT_OUT: "lost questions"}


class CutNotice:
    """Warns once of samples that lose tokens to data.max_length, with where the limit comes from."""

    def __init__(self, max_length: int | None, model: LlavaConfig):
        self._limit, self._said = limit_in_words(max_length, model), False

    def expect(self, count: int, total: int) -> None:
        """Warns, before the first step, that `count` of `total` samples will be cut."""
        self._said = True
        if count:
            of = f"{count:,} of {counted(total, 'sample')} ({count / total:.1%})"
            log.warning("%s are longer than %s and will be cut", of, self._limit)

    def see(self, noted: Iterable[tuple[int, Iterable[str]]], ids: Sequence[str]) -> None:
        """Takes (record, notes) of a batch, and warns where it has the first sample that is cut."""
        if self._said:
            return
        lost = [ids[record] for record, notes in noted if set(notes) & set(LOST)]
        if lost:
            self._said = True
            log.warning(
                "sample %s is longer than %s and is cut; the end of the run says how many were",
                lost[0],
                self._limit,
            )

    def lines(self, report: Mapping[str, Any]) -> Iterator[str]:
        """What to say at the end of a run. report: of the loader (data_report.json)."""
        for note, words in LOST.items():
            if count := report["notes"].get(note, 0):
                of = f"{count:,} of {counted(report['seen'], 'sample')}"
                ids = first_ids(report["noted"][note])
                ids += ", ..." if count > len(report["noted"][note]) else ""
                yield f"{of} were longer than {self._limit} and {words}: {ids}"


def limit_in_words(max_length: int | None, model: LlavaConfig) -> str:
    """ "data.max_length 208", and that this is the model's own limit where it is."""
    words = f"data.max_length {max_length}"
    if max_length == model.max_length:
        positions = model.language.max_positions
        words += f" (max_length of the model's config, which has {positions:,} positions)"
    return words
