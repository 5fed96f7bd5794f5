"""`llava-jax data pack`: a LLaVA JSON and its folder of images to ArrayRecord shards, one at a time.

A shard holds so many records in a row, so it is a pure function of the JSON, the folder and its number: they
are made in any order, by any number of processes or machines (`llava_jax.store.beam`), to the same result.
Each appears as a whole and has a row of facts beside it; what is there with its right digest is not made
again, so a build that was killed goes on where it was. manifest.json is written last.

Not a builder of tensorflow-datasets, whose format and features these are: `download_and_prepare` makes all
shards in one process, in a folder of a random name, and begins anew after a kill, beside what that one left;
and GeneratorBasedBuilder writes every picture twice and holds a shard in memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from llava_jax import __version__, storage
from llava_jax.data.json_file import JsonFile
from llava_jax.data.stored import FORMAT, MANIFEST, NAME, RECORDS, SPLIT
from llava_jax.digests import sha256
from llava_jax.errors import LlavaError, SampleError
from llava_jax.processes import Lost, in_processes
from llava_jax.progress import progress
from llava_jax.util import need, read_object, sync_path, write_json

log = logging.getLogger(__name__)

GROUPS = "group_size:1"
"""ArrayRecord's option for random access: each record is compressed and read alone."""
JOB, SECONDS = f"{__name__}:maker", 3600.0  # the longest that a shard may take


@dataclass(frozen=True)
class Job:
    """What is packed, where to, and in how large shards."""

    file: str
    images: str
    out: str
    per_shard: int
    count: int  # of records
    digest: str  # of the file, the folder's name and `per_shard`

    @property
    def shards(self) -> int:
        return max(1, -(-self.count // self.per_shard))

    def shard(self, number: int) -> Path:
        """The file of a shard, named as tensorflow-datasets names it."""
        return Path(self.out) / (f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{self.shards:05d}")

    def texts(self, number: int) -> Path:
        """Its part of records.jsonl."""
        return Path(self.out) / f"records-{number:05d}.jsonl"

    def facts(self, number: int) -> Path:
        """The row that says that it is whole."""
        return Path(self.out) / f"shard-{number:05d}.json"


Run = Callable[[Job, list[int]], Iterable[dict[str, Any]]]
"""Makes some shards of a job, anywhere; gives the facts of each as it is done."""


def pack(
    file: str,
    images: str,
    out: str,
    *,
    per_shard: int = 1000,
    workers: int = 1,
    run: Run | None = None,
) -> dict[str, Any]:
    """Packs `file` with the pictures below `images` into the folder `out`; returns the manifest.

    per_shard: records of a shard. workers: processes that make them. run: who makes them instead.
    Raises SampleError for a file that cannot be read, LlavaError where `out` holds something else.
    """
    if storage.is_address(out):
        raise LlavaError(
            f"--out {out}: ArrayRecord writes no address",
            fix="mount the bucket (gcsfuse, mountpoint-s3), or pack to a disk and copy the folder",
        )
    for module in ("tensorflow_datasets", "array_record"):
        need(module, "to pack data", "llava_jax[tfds]")
    source = JsonFile(file)
    count = sum(1 for _ in source.scan())
    if not count:
        raise SampleError(f"{file}: there are no samples")
    job = Job(file, images, out, per_shard, count, _digest(file, images, per_shard))
    folder = Path(out)
    _refuse_other(job)
    if (folder / MANIFEST).is_file():
        return read_object(folder / MANIFEST)
    _refuse_wrong_images(source, images)
    folder.mkdir(parents=True, exist_ok=True)
    done = {n: row for n in range(job.shards) if (row := finished(job, n))}
    left = [n for n in range(job.shards) if n not in done]
    if done:
        log.info("%s of %s shards are there already", f"{len(done):,}", f"{job.shards:,}")
    with progress(count, "packing", "sample") as bar:
        bar.update(sum(row["records"] for row in done.values()))
        for row in (run or _processes(workers))(job, left):
            done[row["shard"]] = row
            bar.update(row["records"])
    return _finish(job, [done[n] for n in range(job.shards)])


def write_shard(job: Job, number: int) -> dict[str, Any]:
    """Makes one shard and its facts, whatever of it is there. A kill leaves no file that looks whole."""
    records = need("array_record.python.array_record_module", "to pack data", "llava_jax[tfds]")

    source = _source(job)
    first = number * job.per_shard
    rows = range(first, min(first + job.per_shard, job.count))
    serialize = serializer()
    target, texts = job.shard(number), job.texts(number)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    missing, pictures, digest = [], 0, hashlib.sha256()
    writer = records.ArrayRecordWriter(str(temporary), GROUPS)
    try:
        lines = []
        for row in rows:
            text = source.text(row)
            found = [_picture(job.images, path) for path in _paths(source[row])]
            pictures += len(found)
            if not all(found):
                missing.append(row)
            data = serialize(_id(source[row]), text, found)
            digest.update(data)
            writer.write(data)
            lines.append(text + b"\n")
        writer.close()
        sync_path(temporary)
        _put(texts, b"".join(lines))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "shard": number,
        "job": job.digest,
        "file": target.name,
        "records": len(rows),
        "pictures": pictures,
        "missing": missing,
        "bytes": target.stat().st_size,
        "sha256": sha256(target),
        "content": digest.hexdigest(),  # of the records alone, whatever wrote them
        "texts": hashlib.sha256(b"".join(lines)).hexdigest(),
    }
    write_json(job.facts(number), facts)
    return facts


def finished(job: Job, number: int) -> dict[str, Any] | None:
    """The facts of a shard that is there and is what they say; else None."""
    try:
        facts = read_object(job.facts(number))
        whole = (
            facts["job"] == job.digest
            and sha256(job.shard(number)) == facts["sha256"]
            and sha256(job.texts(number)) == facts["texts"]
        )
    except (LlavaError, OSError, KeyError):
        return None
    return facts if whole else None


def features() -> Any:
    """The tfds features of a sample: its id, its JSON, and the original bytes of its pictures."""
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {"id": text(), "record": text(), "images": tfds.features.Sequence(text())}
    )


def serializer() -> Callable[[str, bytes, list[bytes]], bytes]:
    """serialize(id, record, pictures) -> the bytes of an example, as tensorflow-datasets reads them."""
    from tensorflow_datasets.core import example_serializer

    described = features()
    serial = example_serializer.ExampleSerializer(described.get_serialized_info())

    def serialize(own_id: str, record: bytes, pictures: list[bytes]) -> bytes:
        example = {"id": own_id.encode(errors="replace"), "record": record, "images": pictures}
        made = serial.get_tf_example(described.encode_example(example))
        return made.SerializeToString(deterministic=True)  # else its fields' order is the process's

    return serialize


# Parts ---------------------------------------------------------------------------------------------


def _processes(workers: int) -> Run:
    def run(job: Job, numbers: list[int]) -> Iterable[dict[str, Any]]:
        count = min(workers, len(numbers))
        if count <= 1:
            for number in numbers:
                yield write_shard(job, number)
            return
        for number, facts in in_processes(JOB, (job,), numbers, count, SECONDS):
            if isinstance(facts, Lost):
                raise LlavaError(
                    f"{job.shard(number)} was not written: {facts.why}",
                    fix="run the same command again: the other shards stay",
                )
            yield facts

    return run


def maker(job: Job) -> Callable[[int], dict[str, Any]]:
    """What a process does with the number of a shard; see `llava_jax.processes`."""
    return partial(write_shard, job)


_sources: dict[str, JsonFile] = {}  # of this process, by digest of the job: scanned once


def _source(job: Job) -> JsonFile:
    if job.digest not in _sources:
        _sources.clear()
        source = JsonFile(job.file)
        if sum(1 for _ in source.scan()) != job.count:
            raise SampleError(f"{job.file}: the file changed while it was packed")
        _sources[job.digest] = source
    return _sources[job.digest]


def _finish(job: Job, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Joins the texts, describes the folder to tensorflow-datasets, and writes the manifest."""
    import tensorflow_datasets as tfds

    out: Any = Path(job.out)
    temporary = out / f".{RECORDS}.{os.getpid()}.tmp"
    digest = hashlib.sha256()
    with temporary.open("wb") as joined:
        for number in range(job.shards):
            texts = job.texts(number).read_bytes()
            digest.update(texts)
            joined.write(texts)
        joined.flush()
        os.fsync(joined.fileno())
    temporary.replace(out / RECORDS)
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[row["records"] for row in rows],
        num_bytes=sum(row["bytes"] for row in rows),
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=out, dataset_name=NAME, split=SPLIT, filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=str(out),
        features=features(),
        split_infos=[split],
        version="1.0.0",
        check_data=False,
    )
    manifest = {
        "format": FORMAT,
        "version": __version__,
        "job": job.digest,
        "records": job.count,
        "pictures": sum(row["pictures"] for row in rows),
        "missing": [row for facts in rows for row in facts["missing"]],
        "texts": digest.hexdigest(),
        "shards": [{k: v for k, v in row.items() if k not in ("job", "missing")} for row in rows],
    }
    write_json(out / MANIFEST, manifest, indent=1)
    for number in range(job.shards):
        job.texts(number).unlink(missing_ok=True)
        job.facts(number).unlink(missing_ok=True)
    for path in out.glob(".*.tmp"):  # of processes that were killed
        path.unlink(missing_ok=True)
    return manifest


def _refuse_other(job: Job) -> None:
    """Raises LlavaError where the folder holds anything but an earlier part of this job."""
    folder = Path(job.out)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise LlavaError(f"{folder} is not a folder", fix="give another --out")
    for path in sorted(folder.iterdir()):
        ours = path.name.startswith(
            (".", "shard-", "records", NAME, MANIFEST, "dataset_info", "features")
        )
        if path.name == MANIFEST or path.name.startswith("shard-"):
            try:
                ours = read_object(path).get("job") == job.digest
            except LlavaError:
                ours = path.name != MANIFEST  # torn: made again
        if not ours:
            fix = "give another --out, or delete it"
            raise LlavaError(f"{folder} holds {path.name}, which is of other data", fix=fix)


def _refuse_wrong_images(source: JsonFile, images: str) -> None:
    """Raises LlavaError where none of the first pictures is below `images`."""
    paths = [path for row in range(min(100, len(source))) for path in _paths(source[row])]
    if paths and not any(_picture(images, path) for path in paths):
        raise LlavaError(
            f"--images {images or 'is empty, and the current folder'} holds none of the first "
            f"{len(paths)} pictures; looked for {storage.join(images, paths[0])}",
            fix=f"give the folder that {paths[0]} is below",
        )


def _digest(file: str, images: str, per_shard: int) -> str:
    digest = hashlib.sha256(json.dumps([FORMAT, str(images), per_shard]).encode())
    if storage.is_address(file):
        digest.update(storage.read(file))
    else:
        digest.update(bytes.fromhex(sha256(Path(file))))
    return digest.hexdigest()[:16]


def _paths(record: Any) -> tuple[str, ...]:
    """The paths of its images; none of a record that training will call bad."""
    from llava_jax.data.records import check_record

    try:
        return check_record(record, "")[1]
    except SampleError:
        return ()


def _id(record: Any) -> str:
    return str(record.get("id", "")) if isinstance(record, dict) else ""


def _picture(folder: str, path: str) -> bytes:
    try:
        return storage.read(storage.join(folder, path))
    except (OSError, ValueError):
        return b""


def _put(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    sync_path(temporary)
    temporary.replace(path)
