"""Everything about the data that can be known before a model is loaded: `open_data`.

Records are read and checked, the holdout split is applied, images are looked for in their
folders, and data.bad_limit is applied, so that a run that cannot work ends before its first step.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llava_jax.data.bad import BadSamples, TooManyBad, first_ids
from llava_jax.data.image_files import (
    NOT_PACKED,
    Images,
    missing_image,
    missing_images,
    refuse_wrong_folder,
    unpacked_image,
)
from llava_jax.data.scan import Scan, scan
from llava_jax.data.settings import DataFile, DataSettings, data_files
from llava_jax.data.stored import Packed, is_packed
from llava_jax.errors import SampleError, counted
from llava_jax.text.records import TAG_NOTES

log = logging.getLogger(__name__)

HELD_SIDE: dict[str, Any] = {
    "holdout_side": "held",
    "bad_report": "",
    "bad_samples": "skip",
    "bad_limit": 1.0,
}
"""Settings that read the held-out samples after training: those that are bad are left out."""


@dataclass(frozen=True)
class Dataset:
    """The records of a run, read and checked. Arrays and lists are over its usable records.

    records: parsed when they are asked for. images: the paths of each.
    index: where it is among all records of all files; file: which of `files` it is from;
    row: where in it. with_image: which have images. words: of the turns, negative without an image.
    independent: whether some record's own turns are. content: a digest of the records. total: how many were read.
    held_out: how many are on the side of the holdout that is not used.
    """

    records: Sequence[Any]
    ids: list[str]
    images: list[tuple[str, ...]]
    index: np.ndarray  # int64[n]
    file: np.ndarray  # int64[n]
    row: np.ndarray  # int64[n]
    with_image: np.ndarray  # bool[n]
    words: np.ndarray  # int32[n]
    independent: bool
    files: list[DataFile]
    content: str
    total: int
    held_out: int
    bad: BadSamples

    def __len__(self) -> int:
        return len(self.records)


def open_data(config: Any, *, process_index: int = 0, say: bool = True) -> Dataset:
    """Reads and checks the data of a training run; needs no model and no tokenizer.

    config: the `data` settings (DataSettings or a mapping); bad samples are listed in its
    bad_report, by process 0 alone for what is found here. say: whether it also logs them.
    Images of held-out samples are looked for too, and named in a warning where they are missing.
    Raises ConfigError for settings; SampleError for files that cannot be read or hold nothing;
    TooManyBad, by kind of reason, where data.bad_limit is exceeded, or for an image folder that
    holds (nearly) none of the images.
    """
    s = DataSettings.read(config)
    files = data_files(s)
    found = scan(files, s)
    held_side = s.holdout_side == "held"
    ours, others = np.flatnonzero(found.held == held_side), np.flatnonzero(found.held != held_side)
    index, ids = found.index[ours], [found.ids[i] for i in ours]
    images = [found.images[i] for i in ours]
    folders = [files[n].image_folder for n in found.file[ours]]
    lost = _missing(found, ours, files)
    bad = [missing_image(int(index[n]), ids[n], path) for n, path in lost.files.items()]
    bad += [unpacked_image(int(index[n]), ids[n], path) for n, path in lost.packed.items()]
    samples = BadSamples(
        strict=s.bad_samples == "error",
        limit=math.ceil(s.bad_limit * (found.total - len(others))),
        total=found.total - len(others),
        report=report_path(s.bad_report, process_index),
    )
    try:
        samples.begin(sorted(found.bad + bad), say=say and process_index == 0)
    except TooManyBad:
        refuse_wrong_folder(lost.looked_for, folders, lost.files)
        if ids or s.bad_samples == "error":
            raise
    if not ids:
        _raise_if_empty(s, files, samples)
    if say and process_index == 0:
        _say_notes(found, ours)
        if not held_side:
            _say_missing_held(found, others, files)
    return Dataset(
        found.records(ours),
        ids,
        images,
        index,
        found.file[ours],
        found.rows(ours),
        np.asarray([bool(paths) for paths in images], bool),
        found.words[ours],
        bool(found.independent[ours].any()),
        files,
        found.content[held_side],
        found.total,
        len(others),
        samples,
    )


def _raise_if_empty(s: DataSettings, files: Sequence[DataFile], found: BadSamples) -> None:
    paths = ", ".join(f.path for f in files)
    if s.holdout_side == "held":
        raise SampleError(f"{paths}: no sample is held out", fix="raise data.holdout")
    if len(found):
        raise TooManyBad(f"{paths}: every sample is bad: {found.summary()}", fix=found.fix())
    raise SampleError(f"{paths}: every sample is held out", fix="lower data.holdout")


def _say_missing_held(found: Scan, held: np.ndarray, files: Sequence[DataFile]) -> None:
    """A warning for the held-out records without their images, which the end of a run leaves out."""
    lost = _missing(found, held, files)
    for why, missing in (("no such image file", lost.files), (NOT_PACKED, lost.packed)):
        if missing:
            named = [f"{found.ids[held[n]]} ({path})" for n, path in missing.items()]
            of = f"{len(missing):,} of {counted(len(held), 'held-out sample')}"
            log.warning("%s will be left out: %s: %s", of, why, first_ids(named))


def report_path(report: str, process_index: int) -> str | None:
    """Where a process lists the bad samples it finds: the first in `report` itself."""
    return (f"{report}.{process_index}" if process_index else report) if report else None


class _Missing(NamedTuple):
    """Images that are not there, by the place of their record among some positions.

    looked_for: the paths of each record below its image folder, none of packed data.
    files: the full path of the first that is no file; packed: the path of what was not there to pack.
    """

    looked_for: list[Images]
    files: dict[int, str]
    packed: dict[int, str]


def _missing(found: Scan, positions: np.ndarray, files: Sequence[DataFile]) -> _Missing:
    packed = [bool(f.weight) and is_packed(f.path) for f in files]
    numbers, rows = found.file[positions].tolist(), found.rows(positions).tolist()
    images = [found.images[i] for i in positions]
    looked_for = [() if packed[n] else paths for n, paths in zip(numbers, images)]
    missing = missing_images(looked_for, [files[n].image_folder for n in numbers])
    lacking = {n: Packed(files[n].path).missing for n in range(len(files)) if packed[n]}
    unpacked = {
        k: paths[0] if len(paths) == 1 else f"one of {', '.join(paths)}"
        for k, (n, row, paths) in enumerate(zip(numbers, rows, images))
        if row in lacking.get(n, ())
    }
    return _Missing(looked_for, missing, unpacked)


def _say_notes(found: Scan, ours: np.ndarray) -> None:
    """One warning for each way in which tags and images do not match."""
    used = set(ours.tolist())
    for note, positions in found.notes.items():
        ids = [found.ids[i] for i in positions if i in used]
        if ids:
            of = f"{len(ids)} of {len(used)} samples ({first_ids(ids)})"
            log.warning("%s: %s: %s", note, of, TAG_NOTES[note])
