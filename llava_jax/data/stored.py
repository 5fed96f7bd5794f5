"""Reading a data set that `llava-jax data pack` made: a folder of ArrayRecord shards, named as data.path.

    records.jsonl                               the records as they stood in the JSON, one a line
    llava-train.array_record-00000-of-00004     the same with the bytes of their pictures (ArrayRecord)
    dataset_info.json, features.json            what tfds.builder_from_directory reads
    manifest.json                               counts and digests; written last, so it vouches for the rest

Texts are read from records.jsonl, as those of any JSON; a picture is one random access to its shard. Before
either, the folder is compared with its manifest: the digest of all but the shards, of which size and end must do,
since reading them takes minutes. A shard's record is compared with its line when its turn comes.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax import storage
from llava_jax.digests import sha256
from llava_jax.errors import SampleError
from llava_jax.reader import Reader
from llava_jax.util import need, read_object

MANIFEST, RECORDS, BEGUN = "manifest.json", "records.jsonl", "packing.json"
NAME, SPLIT = "llava", "train"
DESCRIBED = ("dataset_info.json", "features.json")
FORMAT = 1
AGAIN = "run the same llava-jax data pack again: it makes anew what is damaged"


def records_path(path: str) -> str:
    """The file of the records that `path` names: itself, or records.jsonl of a packed folder.

    Raises SampleError for a folder that is not packed, or not to its end, or not as its manifest says, or is
    packed and at an address.
    """
    if storage.is_address(path):
        if storage.is_file(storage.join(path, MANIFEST)):
            raise SampleError(
                f"{path}: packed data are read from a disk, since ArrayRecord opens no address",
                fix="mount the bucket (gcsfuse, mountpoint-s3), or copy the folder to this host",
            )
        return path
    folder = Path(path)
    if not os.path.isdir(folder):
        return path
    if not (folder / MANIFEST).is_file():
        begun = (folder / BEGUN).exists()
        raise SampleError(
            f"{path}: this is a folder{' that is not packed to its end' if begun else ''}, not a file",
            fix="run the same llava-jax data pack again" if begun else "name a file of it",
        )
    _facts(folder)
    return str(folder / RECORDS)


def is_packed(path: str) -> bool:
    """Whether `path` is a packed folder."""
    return os.path.isfile(Path(path) / MANIFEST)


class Packed:
    """The pictures of a packed folder, which is as its manifest says. Threads may share it."""

    def __init__(self, path: str):
        self.path = Path(path)
        self._found = _facts(self.path)
        self.missing = self._found.missing

    def picture(self, row: int, k: int) -> bytes:
        """The bytes of picture `k` of a record; none where it was missing when the data were packed.

        Raises SampleError, naming the shard, where it cannot be read or holds another record.
        """
        shard = self._found.shard_of(row)
        try:
            found = self._source[row]
        except SampleError:
            raise
        except Exception as error:  # what the libraries raise of damaged bytes
            why = str(error).partition("\n")[0]
            raise SampleError(f"{shard}: cannot be read ({why:.200})", fix=AGAIN) from None
        start, end = self._found.lines[row : row + 2].tolist()
        if found["record"] != os.pread(self._texts, end - start, start).rstrip(b"\n"):
            raise SampleError(f"{shard}: is not the shard that was packed here", fix=AGAIN)
        pictures = found["images"]
        return pictures[k] if k < len(pictures) else b""  # none: it was no record to pack

    @functools.cached_property
    def _texts(self) -> int:
        self._file = open(self.path / RECORDS, "rb")  # noqa: SIM115
        return self._file.fileno()

    @functools.cached_property
    def _source(self) -> Any:
        tfds = need("tensorflow_datasets", "to read packed data", "llava_jax[tfds]")
        return tfds.builder_from_directory(self.path).as_data_source(SPLIT)


class Facts(NamedTuple):
    """What a manifest says of a folder that is so.

    missing: rows that lack a picture. lines: int64[records + 1], where each begins in records.jsonl.
    shards: their files; firsts: int64, the row of each one's first record.
    """

    missing: set[int]
    lines: np.ndarray
    shards: list[Path]
    firsts: np.ndarray

    def shard_of(self, row: int) -> Path:
        """The file that holds a record."""
        return self.shards[int(np.searchsorted(self.firsts, row, "right")) - 1]


_known: dict[Path, tuple[Any, Facts]] = {}  # of this process: folder -> its files' states, facts


def _facts(folder: Path) -> Facts:
    """Reads and checks a packed folder, once for as long as none of its files changes."""
    found = Reader(read_object(folder / MANIFEST, SampleError), f"{folder}", SampleError)
    if found.integer("format") != FORMAT:
        raise SampleError(f"{folder}: packed by another version", fix="pack the data again")
    shards = [Reader(row, f"{folder / MANIFEST}", SampleError) for row in found.list("shards")]
    files = [folder / shard.word("file", "") for shard in shards]
    states = _states(folder, [*files, folder / RECORDS, folder / MANIFEST])
    if folder in _known and _known[folder][0] == states:
        return _known[folder][1]
    counts = [shard.integer("records", high=2**48) for shard in shards]
    for shard, file in zip(shards, files):
        size = shard.integer("bytes", high=2**60)
        if states[file.name][0] != size:
            raise SampleError(
                f"{file}: has {states[file.name][0]:,} bytes, not the {size:,} that were packed",
                fix=AGAIN,
            )
        if shard.has("end") and end_digest(file) != shard.word("end", ""):
            raise SampleError(f"{file}: is not the shard that was packed here", fix=AGAIN)
    for name, digest in (found.data.get("described") or {}).items():
        if name in DESCRIBED and (not (folder / name).is_file() or sha256(folder / name) != digest):
            raise SampleError(f"{folder / name}: is not what was packed", fix=AGAIN)
    digest, lines = _lines(folder / RECORDS)
    if digest != found.word("texts", "") or len(lines) != sum(counts) + 1:
        raise SampleError(f"{folder / RECORDS}: is not what was packed", fix=AGAIN)
    missing = {row for row in found.list("missing") if isinstance(row, int)}
    facts = Facts(missing, lines, files, np.cumsum([0, *counts[:-1]]))
    _known[folder] = states, facts
    return facts


def _states(folder: Path, files: list[Path]) -> dict[str, tuple[int, int, int]]:
    """{name: (size, time of change, inode)}. Raises SampleError for a file that is not there."""
    with os.scandir(folder) as entries:
        stats = {e.name: e.stat() for e in entries if e.is_file()}
    for file in files:
        if file.name not in stats:
            raise SampleError(f"{file}: is missing", fix=AGAIN)
    return {
        f.name: (stats[f.name].st_size, stats[f.name].st_mtime_ns, stats[f.name].st_ino)
        for f in files
    }


def end_digest(shard: Path) -> str:
    """SHA-256 of a shard's last bytes, which say where all of its records are."""
    with shard.open("rb") as file:
        file.seek(max(0, shard.stat().st_size - 2**16))
        return hashlib.sha256(file.read()).hexdigest()


def _lines(path: Path) -> tuple[str, np.ndarray]:
    """(SHA-256 of a file, int64: where each of its lines begins, and its end)."""
    digest, at, starts = hashlib.sha256(), 0, [np.zeros(1, np.int64)]
    with path.open("rb") as file:
        while block := file.read(2**22):
            digest.update(block)
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (at + 1))
            at += len(block)
    return digest.hexdigest(), np.concatenate(starts)
