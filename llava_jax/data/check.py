"""Everything about the data that can be known before a model is loaded: `open_data`.

Records are read and checked, the holdout split is applied, images are looked for in their
folders, and data.bad_limit is applied, so that a run that cannot work ends before its first step.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llava_jax.data.bad import Bad, BadSamples, TooManyBad, bad_sample, first_ids
from llava_jax.data.image_files import missing_image, missing_images, refuse_wrong_folder
from llava_jax.data.records import check_record, read_files, record_name
from llava_jax.data.settings import DataFile, DataSettings, data_files
from llava_jax.errors import ConfigError, SampleError, counted
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.labels import training_version
from llava_jax.text.records import TAG_NOTES, check_turns, image_paths, record_id, tag_note

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

    index: where it is among all records of all files; file: which of `files` it is from.
    with_image: which have images. content: a digest of the records. total: how many were read.
    held_out: how many are on the side of the holdout that is not used.
    """

    records: list[Any]
    ids: list[str]
    index: np.ndarray  # int64[n]
    file: np.ndarray  # int64[n]
    with_image: np.ndarray  # bool[n]
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
    records, places, file_of = read_files(files)
    good, bad, notes = _checked(records, places, s)
    train, held = holdout([records[i] for i in good], s.holdout, s.holdout_seed)
    ours, others = (held, train) if s.holdout_side == "held" else (train, held)
    index = [good[i] for i in ours]
    used = [_without_null(records[i]) for i in index]
    ids = [record_id(records[i], i) for i in index]
    folders = [files[file_of[i]].image_folder for i in index]
    missing = missing_images(used, folders)
    bad += [missing_image(index[n], ids[n], path) for n, path in missing.items()]
    found = BadSamples(
        strict=s.bad_samples == "error",
        limit=math.ceil(s.bad_limit * (len(records) - len(others))),
        total=len(records) - len(others),
        report=report_path(s.bad_report, process_index),
    )
    try:
        found.begin(sorted(bad), say=say and process_index == 0)
    except TooManyBad:
        refuse_wrong_folder(used, folders, missing)
        if used or s.bad_samples == "error":
            raise
    if not used:
        _raise_if_empty(s, files, found)
    if say and process_index == 0:
        _say_notes(notes, records, set(index))
        if s.holdout_side == "train":
            _say_missing_held([good[i] for i in held], records, file_of, files)
    return Dataset(
        used,
        ids,
        np.asarray(index, np.int64),
        np.asarray([file_of[i] for i in index], np.int64),
        np.asarray(["image" in r for r in used], bool),
        files,
        _digest(used),
        len(records),
        len(others),
        found,
    )


def _raise_if_empty(s: DataSettings, files: Sequence[DataFile], found: BadSamples) -> None:
    paths = ", ".join(f.path for f in files)
    if s.holdout_side == "held":
        raise SampleError(f"{paths}: no sample is held out", fix="raise data.holdout")
    if len(found):
        raise TooManyBad(f"{paths}: every sample is bad: {found.summary()}", fix=found.fix())
    raise SampleError(f"{paths}: every sample is held out", fix="lower data.holdout")


def _say_missing_held(
    held: Sequence[int], records: Sequence[Any], file_of: Sequence[int], files: Sequence[DataFile]
) -> None:
    """One warning for the held-out records without their images, which the end of a run leaves out."""
    folders = [files[file_of[i]].image_folder for i in held]
    missing = missing_images([records[i] for i in held], folders)
    if missing:
        named = [f"{record_id(records[held[n]], held[n])} ({path})" for n, path in missing.items()]
        of = f"{len(missing):,} of {counted(len(held), 'held-out sample')}"
        log.warning("%s will be left out: no such image file: %s", of, first_ids(named))


def report_path(report: str, process_index: int) -> str | None:
    """Where a process lists the bad samples it finds: the first in `report` itself."""
    return (f"{report}.{process_index}" if process_index else report) if report else None


def _checked(
    records: Sequence[Any], places: Sequence[str], s: DataSettings
) -> tuple[list[int], list[Bad], dict[str, list[int]]]:
    """(indices of good records, the others with the reason, {note: indices of records it is on})."""
    good: list[int] = []
    bad: list[Bad] = []
    notes: defaultdict[str, list[int]] = defaultdict(list)
    caption = training_version(s.version).kind == "plain"
    for i, (record, place) in enumerate(zip(records, places)):
        name = record_name(record, place)
        try:
            turns, images = check_record(record, place)
            if not s.compat:
                check_turns(turns, images, name, caption=caption)
            if len(images) > s.image_buckets[-1]:
                raise SampleError(
                    f"sample {name}: {len(images)} images are more than the largest of "
                    f"data.image_buckets, {s.image_buckets[-1]}",
                    fix="add a larger one to data.image_buckets",
                )
        except SampleError as e:
            reason = e.message.removeprefix(f"sample {name}: ")
            kind = reason.rpartition(": ")[2] if reason.endswith("are not fetched") else ""
            bad.append(bad_sample(i, record_id(record, i), reason, kind=kind, fix=e.fix))
            continue
        good.append(i)
        tags = sum(text.count(IMAGE_TAG) for _, text in turns)
        if note := tag_note(tags, len(images), caption=caption):
            notes[note].append(i)
    return good, bad, notes


def holdout(records: Sequence[dict], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """(training indices, held-out indices): about `fraction` of the images, by a hash of their paths.

    All records of one image are on the same side, whatever else the data holds and in any order;
    a record without an image is held out by its id. Raises ConfigError for a fraction outside 0..1.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.holdout {fraction} is not a fraction of 0 to below 1")
    sides: tuple[list[int], list[int]] = ([], [])
    for i, record in enumerate(records):
        images = image_paths(record)
        key = images[0] if images else f"id:{record.get('id', i)}"
        name = f"{seed}:{key}".encode(errors="surrogatepass")  # JSON can hold half a pair
        share = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64  # 0 to below 1
        sides[bool(share < fraction)].append(i)  # a numpy.float64 makes a numpy.bool
    return sides


def _without_null(record: Any) -> Any:
    """A record whose image is null, "" or [] as one that has none."""
    if "image" not in record or record["image"]:
        return record
    return {k: v for k, v in record.items() if k != "image"}


def _digest(records: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for record in records:
        turns = [turn["value"] for turn in record["conversations"]]
        own = (record["turns"],) if "turns" in record else ()  # has precedence over data.turns
        digest.update(repr((record.get("id"), record.get("image"), turns, *own)).encode())
    return digest.hexdigest()[:16]


def _say_notes(notes: Mapping[str, list[int]], records: Sequence[Any], used: set[int]) -> None:
    """One warning for each way in which tags and images do not match."""
    for note, indices in notes.items():
        ids = [record_id(records[i], i) for i in indices if i in used]
        if ids:
            of = f"{len(ids)} of {len(used)} samples ({first_ids(ids)})"
            log.warning("%s: %s: %s", note, of, TAG_NOTES[note])
