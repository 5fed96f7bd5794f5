"""The folder that `llava-jax data pack` makes: its files, whose it is, and one call at a time.

It is ours if it holds our manifest.json, or packing.json, which is there from the first write to the last. In
one that is not, nothing is written or removed unless it is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llava_jax import storage
from llava_jax.data.stored import BEGUN, FORMAT, MANIFEST, NAME, RECORDS, SPLIT
from llava_jax.errors import LlavaError
from llava_jax.util import read_object, take_lock

_TEMPORARY = re.compile(
    rf"\.({NAME}-{SPLIT}\.array_record-[0-9]+-of-[0-9]+|{re.escape(RECORDS)}|shard-[0-9]+\.json"
    rf"|{re.escape(MANIFEST)}|{re.escape(BEGUN)})(\.[0-9]+)?\.tmp"
)


@dataclass(frozen=True)
class Job:
    """What is packed, where to, and in how large shards."""

    file: str
    images: str
    out: str
    per_shard: int
    count: int  # of records
    source: str  # digest of the file
    digest: str  # of it, the folder's name and `per_shard`

    @classmethod
    def of(cls, file: str, images: str, out: str, per_shard: int, count: int, source: str) -> Job:
        """The job of these arguments of `llava_jax.store.write.pack`, with the file's digest."""
        named = images if storage.is_address(images) or not images else os.path.normpath(images)
        digest = hashlib.sha256(json.dumps([FORMAT, named, per_shard]).encode())
        digest.update(bytes.fromhex(source))
        return cls(file, images, out, per_shard, count, source, digest.hexdigest()[:16])

    @property
    def shards(self) -> int:
        return max(1, -(-self.count // self.per_shard))

    def rows(self, number: int) -> range:
        """The records of a shard."""
        first = number * self.per_shard
        return range(first, min(first + self.per_shard, self.count))

    def shard(self, number: int) -> Path:
        """The file of a shard, named as tensorflow-datasets names it."""
        return Path(self.out) / (f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{self.shards:05d}")

    def facts(self, number: int) -> Path:
        """The row that says that it is whole."""
        return Path(self.out) / f"shard-{number:05d}.json"


def refuse_other(job: Job) -> None:
    """Raises LlavaError where the folder holds anything, and is not an earlier part of this job."""
    folder, fix = Path(job.out), "give another --out, or delete it"
    if not folder.exists():
        return
    if not folder.is_dir():
        raise LlavaError(f"{folder} is not a folder", fix="give another --out")
    ours = [name for name in (MANIFEST, BEGUN) if (folder / name).exists()]
    for name in ours:
        try:
            same = read_object(folder / name).get("job") == job.digest
        except LlavaError:
            same = False
        if not same:
            raise LlavaError(
                f"{folder} holds {name}, which is not of this JSON, --images (as it was written then) and "
                f"--per-shard",
                fix=fix,
            )
    others = sorted(p.name for p in folder.iterdir() if not _TEMPORARY.fullmatch(p.name))
    if others and not ours:
        raise LlavaError(f"{folder} holds {others[0]}, which data pack did not make", fix=fix)


@contextlib.contextmanager
def hold(job: Job) -> Iterator[None]:
    """Makes the folder and keeps other calls out of it. Raises LlavaError where one is at work."""
    folder = Path(job.out)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)  # of the folder itself: no file to leave behind
    try:
        if take_lock(lock) is False:
            fix = "wait for it, or give another --out"
            raise LlavaError(f"another call packs into {folder}", fix=fix)
        yield
    finally:
        os.close(lock)


def clean(job: Job) -> None:
    """Removes what only a folder that is not finished needs, and what killed processes left."""
    for path in (*map(job.facts, range(job.shards)), Path(job.out) / BEGUN):
        if path.exists():  # a finished folder may be read-only
            path.unlink(missing_ok=True)
    for path in Path(job.out).glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)
