"""Everything about the data that can be known before a model is loaded: `open_data`.

Records are read and checked, the side of the holdout is taken, images are looked for in their
folders, and data.bad_limit is judged, so that a run that cannot be ends before its first step.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.data.bad import SHOWN, Bad, BadSamples, TooManyBad, bad_sample
from llava_jax.data.order import holdout
from llava_jax.data.records import check_record, image_paths, read_records, record_id, record_name
from llava_jax.data.settings import DataFile, DataSettings, data_files
from llava_jax.errors import SampleError
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.labels import training_version
from llava_jax.text.records import TAG_NOTES, check_turns, tag_note

log = logging.getLogger(__name__)

MOST = 0.9
"""Part of a folder's images that must be missing for the folder itself to be called wrong."""


@dataclass(frozen=True)
class Dataset:
    """The records of a run, read and checked. Arrays and lists are over its usable records.

    index: place among all records of all files; file: which of `files` each is from.
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


def open_data(config: Any, *, process_index: int = 0) -> Dataset:
    """Reads and checks the data of a training run; needs no model and no tokenizer.

    config: the `data` settings (DataSettings or a mapping); bad samples are listed in its
    bad_report, by process 0 alone for what is found here.
    Raises ConfigError for settings; SampleError for files that cannot be read or hold nothing;
    TooManyBad, by kind of reason, where data.bad_limit is passed, or for an image folder that
    holds (nearly) none of the images.
    """
    s = DataSettings.read(config)
    files = data_files(s)
    records, names, file_of = _read(files)
    good, bad, notes = _checked(records, names, s)
    kept, aside = holdout([records[i] for i in good], s.holdout, s.holdout_seed)
    if s.holdout_side == "held":
        kept, aside = aside, kept
    index = [good[i] for i in kept]
    used = [_without_null(records[i]) for i in index]
    found = BadSamples(
        strict=s.bad_samples == "error",
        limit=math.ceil(s.bad_limit * (len(index) + len(bad))),
        total=len(index) + len(bad),
        report=report_path(s.bad_report, process_index),
    )
    missing = missing_images(used, [files[file_of[i]].image_folder for i in index])
    full = {index[n]: path for n, path in missing.items()}
    bad += [_missing(i, record_id(records[i], i), path) for i, path in full.items()]
    try:
        found.begin(sorted(bad), say=process_index == 0)
    except TooManyBad:
        _refuse_wrong_folder(used, index, file_of, files, full)
        if not used and s.bad_samples == "skip":
            _refuse_nothing(s, files, found)
        raise
    if not used:
        _refuse_nothing(s, files, found)
    if process_index == 0:
        _say_notes(notes, records, set(index))
    return Dataset(
        used,
        [record_id(records[i], i) for i in index],
        np.asarray(index, np.int64),
        np.asarray([file_of[i] for i in index], np.int64),
        np.asarray(["image" in r for r in used], bool),
        files,
        _digest(used),
        len(records),
        len(aside),
        found,
    )


def _refuse_nothing(s: DataSettings, files: Sequence[DataFile], found: BadSamples) -> None:
    paths = ", ".join(f.path for f in files)
    if s.holdout_side == "held":
        raise SampleError(f"{paths}: no sample is held out", fix="raise data.holdout")
    if len(found):
        raise TooManyBad(f"{paths}: every sample is bad: {found.summary()}", fix=found.fix())
    raise SampleError(f"{paths}: every sample is held out", fix="lower data.holdout")


def report_path(report: str, process_index: int) -> str | None:
    """Where a process lists the bad samples it finds: the first in `report` itself."""
    return (f"{report}.{process_index}" if process_index else report) if report else None


# Records ------------------------------------------------------------------------------------------


def _read(files: Sequence[DataFile]) -> tuple[list[Any], list[str], list[int]]:
    """(records, what errors call each, which file each is of); files of weight 0 are not opened."""
    records: list[Any] = []
    names: list[str] = []
    file_of: list[int] = []
    for n, file in enumerate(files):
        if not file.weight:
            continue
        found = read_records(file.path)
        records += found
        short = Path(file.path).name
        names += [f"{short}[{i}]" for i in range(len(found))]
        file_of += [n] * len(found)
    if not records:
        raise SampleError(
            f"{', '.join(f.path for f in files)}: there are no samples", fix="set data.path"
        )
    return records, names, file_of


def _checked(
    records: Sequence[Any], names: Sequence[str], s: DataSettings
) -> tuple[list[int], list[Bad], dict[str, list[int]]]:
    """(indices of good records, the others with the reason, {note: indices of records it is on})."""
    good: list[int] = []
    bad: list[Bad] = []
    notes: defaultdict[str, list[int]] = defaultdict(list)
    caption = training_version(s.version).kind == "plain"
    for i, (record, name) in enumerate(zip(records, names)):
        try:
            turns, images = check_record(record, name)
            if not s.compat:
                check_turns(turns, images, name, caption=caption)
            if len(images) > s.image_buckets[-1]:
                raise SampleError(
                    f"sample {name}: {len(images)} images are more than the largest of "
                    f"data.image_buckets, {s.image_buckets[-1]}",
                    fix="add a larger one to data.image_buckets",
                )
        except SampleError as e:
            reason = e.message.removeprefix(f"sample {record_name(record, name)}: ")
            reason = reason.removeprefix(f"sample {name}: ")
            kind = reason.rpartition(": ")[2] if reason.endswith("are not fetched") else ""
            bad.append(bad_sample(i, record_id(record, i), reason, kind=kind, fix=e.fix))
            continue
        good.append(i)
        tags = sum(text.count(IMAGE_TAG) for _, text in turns)
        if tags != len(images) and (note := tag_note(tags, len(images), caption=caption)):
            notes[note].append(i)
    return good, bad, notes


def _without_null(record: Any) -> Any:
    """A record whose image is null, "" or [] as one that has none."""
    if "image" not in record or record["image"]:
        return record
    return {k: v for k, v in record.items() if k != "image"}


def _digest(records: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for record in records:
        turns = [turn["value"] for turn in record["conversations"]]
        own = (record["turns"],) if "turns" in record else ()  # goes before data.turns
        digest.update(repr((record.get("id"), record.get("image"), turns, *own)).encode())
    return digest.hexdigest()[:16]


def _say_notes(notes: Mapping[str, list[int]], records: Sequence[Any], used: set[int]) -> None:
    """One warning for each way in which tags and images do not match."""
    for note, places in notes.items():
        ids = [record_id(records[i], i) for i in places if i in used]
        if ids:
            shown = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
            means = TAG_NOTES[note]
            log.warning("%s: %d of %d samples (%s): %s", note, len(ids), len(used), shown, means)


# Images -------------------------------------------------------------------------------------------


def missing_images(records: Sequence[Any], folders: Sequence[str]) -> dict[int, str]:
    """{place in `records`: full path of its first image that is not a file}; names in exact case.

    folders: the image folder of each record. Every folder with images is listed once.
    """
    listed: dict[tuple[str, str], Callable[[str], bool]] = {}
    missing: dict[int, str] = {}
    for n, (record, folder) in enumerate(zip(records, folders)):
        for path in image_paths(record):
            head, _, name = path.rpartition("/")
            holds = listed.get((folder, head))
            if holds is None:
                holds = listed[folder, head] = _files_in(os.path.join(folder, head))
            if not holds(name):
                missing[n] = os.path.abspath(os.path.join(folder, path)).replace("\0", "")
                break
    return missing


def _files_in(folder: str) -> Callable[[str], bool]:
    """Whether a name is that of a file in `folder`."""
    try:
        with os.scandir(folder or ".") as entries:
            return {e.name for e in entries if _is_file(e)}.__contains__
    except PermissionError:  # a folder that may be entered but not listed
        return lambda name: os.path.isfile(os.path.join(folder, name))
    except (OSError, ValueError):  # ValueError: a null byte or half a surrogate pair in the name
        return lambda name: False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _missing(index: int, sample_id: str, path: str) -> Bad:
    folder = os.path.dirname(path)
    if os.path.isdir(folder):
        return bad_sample(index, sample_id, f"{path}: the file does not exist", kind=_NO_FILE)
    kind = f"the folder {folder} does not exist"
    return bad_sample(index, sample_id, f"{path}: {kind}", kind=kind)


_NO_FILE = "the image file does not exist"


def _refuse_wrong_folder(
    records: Sequence[Any],
    index: Sequence[int],
    file_of: Sequence[int],
    files: Sequence[DataFile],
    missing: dict[int, str],
) -> None:
    """Raises SampleError, naming folder and path, where a folder lacks (nearly) all its images."""
    wanted: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    first: dict[str, tuple[str, str]] = {}
    for record, i in zip(records, index):
        if "image" in record:
            folder = files[file_of[i]].image_folder
            wanted[folder] += 1
            if i in missing:
                lost[folder] += 1
                first.setdefault(folder, (image_paths(record)[0], missing[i]))
    for folder, count in wanted.items():
        if lost[folder] < MOST * count:
            continue
        path, full = first[folder]
        what = "none" if lost[folder] == count else f"only {count - lost[folder]:,}"
        where = f"{folder!r} holds" if folder else "is empty, and the current folder holds"
        better = next(_folders_with(path, folder), None)
        raise TooManyBad(
            f"data.image_folder {where} {what} of the images of {count:,} samples; "
            f"looked for {full}",
            fix=f"set data.image_folder={better}"
            if better
            else f"set data.image_folder to the folder that {path} is below",
        )


def _folders_with(path: str, folder: str) -> Iterator[str]:
    """Folders close to `folder` in which `path` is a file."""
    base = Path(folder or ".").absolute()
    try:
        below = sorted(p for p in base.iterdir() if p.is_dir())[:100] if base.is_dir() else []
    except OSError:
        below = []
    for candidate in (base.parent, *below):
        if (candidate / path).is_file():
            yield str(candidate)
