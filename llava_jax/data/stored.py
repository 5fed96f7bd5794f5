"""Reading a data set that `llava-jax data pack` made: a folder of ArrayRecord shards, named as data.path.

    records.jsonl                               the records as they stood in the JSON, one a line
    llava-train.array_record-00000-of-00004     the same with the bytes of their pictures (ArrayRecord)
    dataset_info.json, features.json            what tfds.builder_from_directory reads
    manifest.json                               counts and digests; written last, so it vouches for the rest

Texts are read from records.jsonl, as those of any JSON; a picture is one random access to its shard.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from llava_jax import storage
from llava_jax.errors import SampleError
from llava_jax.reader import Reader
from llava_jax.util import need, read_object

MANIFEST, RECORDS = "manifest.json", "records.jsonl"
NAME, SPLIT = "llava", "train"
FORMAT = 1


def records_path(path: str) -> str:
    """The file of the records that `path` names: itself, or records.jsonl of a packed folder.

    Raises SampleError for a folder that is not packed, or not to its end, or is packed and at an address.
    """
    if storage.is_address(path):
        if storage.is_file(storage.join(path, MANIFEST)):
            raise SampleError(
                f"{path}: packed data are read from a disk, since ArrayRecord opens no address",
                fix="mount the bucket (gcsfuse, mountpoint-s3), or copy the folder to this host",
            )
        return path
    folder = Path(path)
    if not folder.is_dir():
        return path
    if not (folder / MANIFEST).is_file():
        begun = any(folder.glob("shard-*.json")) or any(folder.glob(f"{NAME}-{SPLIT}*"))
        raise SampleError(
            f"{path}: this is a folder{' that is not packed to its end' if begun else ''}, not a file",
            fix="run the same llava-jax data pack again" if begun else "name a file of it",
        )
    return str(folder / RECORDS)


def is_packed(path: str) -> bool:
    """Whether `path` is a packed folder."""
    return (Path(path) / MANIFEST).is_file()


class Packed:
    """The pictures of a packed folder. Threads may share it."""

    def __init__(self, path: str):
        self.path = Path(path)
        found = Reader(read_object(self.path / MANIFEST, SampleError), path, SampleError)
        if found.integer("format") != FORMAT:
            raise SampleError(f"{path}: packed by another version", fix="pack the data again")
        self.missing = {row for row in found.list("missing") if isinstance(row, int)}

    def picture(self, row: int, k: int) -> bytes:
        """The bytes of picture `k` of a record; none where it was missing when the data were packed."""
        return self._source[row]["images"][k]

    @functools.cached_property
    def _source(self) -> Any:
        tfds = need("tensorflow_datasets", "to read packed data", "llava_jax[tfds]")
        return tfds.builder_from_directory(self.path).as_data_source(SPLIT)
