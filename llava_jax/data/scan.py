"""One pass over the records of a run: what is checked and kept of each, and how it is found again.

A record's text stays in its file. Kept are its place, id, the paths of its images, and a few numbers; so a
data set of any size is held in about 300 bytes a record.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from llava_jax import storage
from llava_jax.data.bad import Bad, bad_sample
from llava_jax.data.json_file import JsonFile
from llava_jax.data.records import check_record, record_name
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.data.stored import is_packed, records_path
from llava_jax.errors import SampleError
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.labels import training_version
from llava_jax.text.records import (
    USERS,
    check_turns,
    modality_lengths,
    record_id,
    tag_note,
)


@dataclass
class Scan:
    """What one pass found. Lists and arrays but `starts` are over the good records, in order.

    index: where each is among all records of all files; file: which of the files it is from.
    starts: the index of each file's first record. held: whether it is on the held-out side.
    words: of its turns, negative without an image. independent: whether its own turns are.
    notes: {note: positions of the records that it is on}. content: a digest of each side.
    """

    files: list[JsonFile | None]
    starts: list[int]
    total: int
    index: np.ndarray  # int64[n]
    file: np.ndarray  # int64[n]
    held: np.ndarray  # bool[n]
    words: np.ndarray  # int32[n]
    independent: np.ndarray  # bool[n]
    ids: list[str]
    images: list[tuple[str, ...]]
    bad: list[Bad]
    notes: dict[str, list[int]]
    content: dict[bool, str]

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """int64: where some of the good records are in their files."""
        starts = np.asarray(self.starts, np.int64)[self.file[positions]]
        return self.index[positions] - starts

    def records(self, positions: np.ndarray) -> Records:
        """Some of the good records, as a sequence that parses each when it is asked for."""
        return Records(self.files, self.file[positions], self.rows(positions))


class Records(Sequence[Any]):
    """Records of several files, by file and row. Those without an image have no key for it."""

    def __init__(self, files: Sequence[JsonFile | None], file: np.ndarray, row: np.ndarray):
        self._files, self._file, self._row = files, file, row

    def __len__(self) -> int:
        return len(self._row)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        file = self._files[int(self._file[index])]
        return None if file is None else without_null(file[int(self._row[index])])


_last: dict[Any, Scan] = {}  # of this process: settings and files -> the pass over them


def scan(files: Sequence[DataFile], s: DataSettings) -> Scan:
    """Reads and checks every record of files with a weight; both sides of the holdout in one pass.

    The last result is kept: a run opens its data for its checks, its steps and its held-out side, and
    reads the files again only if they changed. Raises SampleError for a file that cannot be read.
    """
    key = _key(files, s)
    if key is None or key not in _last:
        _last.clear()
        found = _scan(files, s)
        if key is None:
            return found
        _last[key] = found
    return _last[key]


def _key(files: Sequence[DataFile], s: DataSettings) -> Any:
    """What a scan depends on; None where it cannot be told that a file is the same."""
    rules = (s.version, s.compat, s.image_buckets[-1], s.holdout, s.holdout_seed)
    stats = []
    for file in files:
        if file.weight and storage.is_address(file.path):
            return None
        try:
            found = os.stat(records_path(file.path)) if file.weight else None
        except OSError:
            return None
        same = found and (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        stats.append((os.path.abspath(file.path), same))
    return (*rules, *stats)


@dataclass
class _Found:
    """What the pass adds to."""

    index: list[int] = field(default_factory=list)
    file: list[int] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    independent: list[bool] = field(default_factory=list)


def _scan(files: Sequence[DataFile], s: DataSettings) -> Scan:
    opened = [
        JsonFile(records_path(f.path), lines=is_packed(f.path)) if f.weight else None for f in files
    ]
    check = _Check(s)
    kept, starts, total = _Found(), [], 0
    ids: list[str] = []
    images: list[tuple[str, ...]] = []
    digests = {False: hashlib.sha256(), True: hashlib.sha256()}
    for n, (source, file) in enumerate(zip(opened, files)):
        starts.append(total)
        name = Path(file.path).name
        for row, record in enumerate(() if source is None else source.scan()):
            position = len(ids)
            paths = check(total, record, f"{name}[{row}]", position)
            if paths is not None:
                record = without_null(record)
                held = is_held(record, position, paths, s.holdout, s.holdout_seed)
                kept.index.append(total)
                kept.file.append(n)
                kept.held.append(held)
                kept.words.append(modality_lengths([record])[0])
                kept.independent.append(record.get("turns") == "independent")
                ids.append(record_id(record, total))
                images.append(paths)
                digests[held].update(_content(record))
            total += 1
    if not total:
        paths = ", ".join(f.path for f in files)
        raise SampleError(f"{paths}: there are no samples", fix="set data.path")
    return Scan(
        opened,
        starts,
        total,
        np.asarray(kept.index, np.int64),
        np.asarray(kept.file, np.int64),
        np.asarray(kept.held, bool),
        np.asarray(kept.words, np.int32),
        np.asarray(kept.independent, bool),
        ids,
        images,
        check.bad,
        dict(check.notes),
        {side: digest.hexdigest()[:16] for side, digest in digests.items()},
    )


class _Check:
    """Checks records one after the other. bad: what was wrong; notes: what is odd, by position."""

    def __init__(self, s: DataSettings):
        self._compat, self._most = s.compat, s.image_buckets[-1]
        self._caption = training_version(s.version).kind == "plain"
        self.bad: list[Bad] = []
        self.notes: defaultdict[str, list[int]] = defaultdict(list)

    def __call__(
        self, index: int, record: Any, place: str, position: int
    ) -> tuple[str, ...] | None:
        """The paths of a record's images; None if it is bad."""
        name = record_name(record, place)
        try:
            turns, images = check_record(record, place)
            if not self._compat:
                check_turns(turns, images, name, caption=self._caption)
            if len(images) > self._most:
                raise SampleError(
                    f"sample {name}: {len(images)} images are more than the largest of "
                    f"data.image_buckets, {self._most}",
                    fix="add a larger one to data.image_buckets",
                )
        except SampleError as e:
            reason = e.message.removeprefix(f"sample {name}: ")
            kind = reason.rpartition(": ")[2] if reason.endswith("are not fetched") else ""
            bad = bad_sample(index, record_id(record, index), reason, kind=kind, fix=e.fix)
            self.bad.append(bad)
            return None
        tags = sum(text.count(IMAGE_TAG) for _, text in turns)
        if note := tag_note(tags, len(images), caption=self._caption):
            self.notes[note].append(position)
        return images


def is_held(
    record: Mapping[str, Any], index: int, images: Sequence[str], fraction: float, seed: int
) -> bool:
    """Whether a record is held out: by a hash of its first image's path, or of its id without one."""
    if not fraction:
        return False
    key = images[0] if images else f"id:{record_id(record, index)}"
    name = f"{seed}:{key}".encode(errors="surrogatepass")  # JSON can hold half a pair
    share = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64  # 0 to below 1
    return bool(share < fraction)  # a numpy.float64 makes a numpy.bool


def without_null(record: Any) -> Any:
    """A record whose image is null, "" or [] as one that has none."""
    if "image" not in record or record["image"]:
        return record
    return {k: v for k, v in record.items() if k != "image"}


def _content(record: Mapping[str, Any]) -> bytes:
    """What the digest is made of."""
    turns = [turn["value"] for turn in record["conversations"]]
    own = (record["turns"],) if "turns" in record else ()  # has precedence over data.turns
    asked = [str(turn["from"]).lower() in USERS for turn in record["conversations"]]
    # Roles that take turns from a question on are not told, so that digests of old runs stay the same.
    roles = () if all(a == (i % 2 == 0) for i, a in enumerate(asked)) else (asked,)
    return repr((record.get("id"), record.get("image"), turns, *own, *roles)).encode()
