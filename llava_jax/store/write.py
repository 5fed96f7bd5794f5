"""`llava-jax data pack`: a LLaVA JSON and its folder of images to ArrayRecord shards, one at a time.

A shard holds so many records in a row, so it is a pure function of the JSON, the folder and its number: they
are made in any order, by any number of processes or machines (`llava_jax.store.beam`), to the same result.
Each appears as a whole and has a row of facts beside it; what is there with its right digest, of pictures that
are as they were, is not made again. So a build that was killed goes on where it was, and a finished folder that
was damaged is mended. manifest.json is written last. `llava_jax.store.folder` says which folders are ours.

Not a builder of tensorflow-datasets, whose format and features these are: `download_and_prepare` makes all
shards in one process, in a folder of a random name, and begins anew after a kill, beside what that one left;
and GeneratorBasedBuilder writes every picture twice and holds a shard in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from llava_jax import __version__, storage
from llava_jax.data.json_file import JsonFile
from llava_jax.data.stored import (
    BEGUN,
    DESCRIBED,
    FORMAT,
    MANIFEST,
    NAME,
    RECORDS,
    SPLIT,
    end_digest,
)
from llava_jax.digests import sha256
from llava_jax.errors import ConfigError, LlavaError, SampleError, counted
from llava_jax.processes import Lost, cores, in_processes
from llava_jax.progress import progress
from llava_jax.store.folder import Job, clean, hold, refuse_other
from llava_jax.store.pictures import digest_of, picture, picture_paths, state
from llava_jax.util import need, read_object, sync_path, write_json

log = logging.getLogger(__name__)

GROUPS = "group_size:1"
"""ArrayRecord's option for random access: each record is compressed and read alone."""
MAKER, SECONDS = f"{__name__}:maker", 3600.0  # the longest that a shard may take

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
    What is there already, begun or finished, is compared with its digests and with the pictures, and made
    anew where it differs. Raises SampleError for a file that cannot be read or changes meanwhile, LlavaError
    where `out` holds something else, another call packs into it, or it cannot be written.
    """
    if storage.is_address(out):
        raise LlavaError(
            f"--out {out}: ArrayRecord writes no address",
            fix="mount the bucket (gcsfuse, mountpoint-s3), or pack to a disk and copy the folder",
        )
    if per_shard < 1 or workers < 1:
        raise ConfigError("--per-shard and --workers are numbers from 1")
    for module in ("tensorflow_datasets", "array_record"):
        need(module, "to pack data", "llava_jax[tfds]")
    source = JsonFile(file)
    count = sum(1 for _ in source.scan())
    if not count:
        raise SampleError(f"{file}: there are no samples")
    job = Job.of(file, images, out, per_shard, count, source.digest())
    refuse_other(job)
    _refuse_wrong_images(source, images)
    with hold(job):
        refuse_other(job)  # what it holds may be of a call that ended just now
        _sources.clear()
        _sources[job.digest] = source, source.state()
        return _pack(job, source, run or _processes(workers))


def _pack(job: Job, source: JsonFile, run: Run) -> dict[str, Any]:
    manifest, rows = _earlier(job)
    done = _unchanged(job, source, rows)
    if manifest and len(done) == job.shards and _is_described(job, manifest):
        clean(job)
        return manifest
    write_json(Path(job.out) / BEGUN, {"format": FORMAT, "job": job.digest})
    if manifest:  # not half-believed: first its good shards get facts of their own, then it goes
        for number, row in done.items():
            write_json(job.facts(number), row)
        (Path(job.out) / MANIFEST).unlink()
    left = [n for n in range(job.shards) if n not in done]
    if done:
        log.info("%s of %s shards are there already", f"{len(done):,}", f"{job.shards:,}")
    with progress(job.count, "packing", "sample") as bar:
        bar.update(sum(row["records"] for row in done.values()))
        for row in run(job, left) if left else ():
            done[row["shard"]] = row
            bar.update(row["records"])
    return _finish(job, source, [done[n] for n in range(job.shards)])


def write_shard(job: Job, number: int) -> dict[str, Any]:
    """Makes one shard and its facts, whatever of it is there. A kill leaves no file that looks whole."""
    records = need("array_record.python.array_record_module", "to pack data", "llava_jax[tfds]")

    source, scanned = _source(job)
    serialize = serializer()
    target = job.shard(number)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    missing, refused, states = [], {}, []
    pictures, digest = 0, hashlib.sha256()
    try:
        writer = records.ArrayRecordWriter(str(temporary), GROUPS)
        for row in job.rows(number):
            record, text = source[row], source.text(row)
            found = []
            for path in picture_paths(record):
                data, seen, why = picture(job.images, path)
                found.append(data)
                states.append((path, seen))
                if why:
                    refused[path] = why
            pictures += len(found)
            if not all(found):
                missing.append(row)
            data = serialize(_id(record), text, found)
            digest.update(data)
            writer.write(data)
        writer.close()
        sync_path(temporary)
        if source.state() != scanned:
            raise _changed(job)
        temporary.replace(target)
    except RuntimeError as error:  # of array_record, which says so of a full disk
        why = str(error).partition("\n")[0]
        raise LlavaError(
            f"{target} cannot be written ({why:.200})", fix="make room on the disk"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    facts = {
        "shard": number,
        "job": job.digest,
        "file": target.name,
        "records": len(job.rows(number)),
        "pictures": pictures,
        "missing": missing,
        "refused": refused,
        "seen": digest_of(states),
        "bytes": target.stat().st_size,
        "end": end_digest(target),
        "sha256": sha256(target),
        "content": digest.hexdigest(),  # of the records alone, whatever wrote them
    }
    write_json(job.facts(number), facts)
    return facts


def finished(job: Job, number: int) -> dict[str, Any] | None:
    """The facts of a shard that is there and is what they say; else None."""
    try:
        return _whole(job, read_object(job.facts(number)))
    except LlavaError:
        return None


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


# What is there already -----------------------------------------------------------------------------


def _earlier(job: Job) -> tuple[dict[str, Any] | None, dict[int, dict[str, Any]]]:
    """(the manifest, if the folder was finished; facts of shards by number), of earlier calls."""
    manifest = Path(job.out) / MANIFEST
    found = read_object(manifest) if manifest.is_file() else None
    rows = {row["shard"]: row for row in found["shards"]} if found else {}
    for number in range(job.shards):
        with contextlib.suppress(LlavaError):  # none, or torn
            rows[number] = read_object(job.facts(number))
    return found, rows


def _is_described(job: Job, manifest: dict[str, Any]) -> bool:
    """Whether all files but the shards are what the manifest says."""
    wanted = {**manifest.get("described", {}), RECORDS: manifest["texts"]}
    try:
        return len(wanted) > len(DESCRIBED) and all(
            sha256(Path(job.out) / name) == digest for name, digest in wanted.items()
        )
    except OSError:
        return False


def _unchanged(job: Job, source: JsonFile, rows: dict[int, dict[str, Any]]) -> dict[int, Any]:
    """Those shards that are what their facts say, of pictures that are as they were."""
    good: dict[int, dict[str, Any]] = {}
    if not rows:
        return good
    gone = 0
    with progress(len(rows), "checking", "shard") as bar, ThreadPoolExecutor(cores()) as pool:
        for row in pool.map(partial(_whole, job), [rows[n] for n in sorted(rows)]):
            bar.update(1)
            if row is None:
                continue
            lost = _lost(job, source, row)
            gone += lost or 0
            if lost is not None:
                good[row["shard"]] = row
    if gone:
        where = job.images or "the current folder"
        what = f"in {where} today, pictures of {counted(gone, 'packed record')} are missing"
        log.warning("%s: their shards stay, whatever else of them has changed", what)
    return good


def _whole(job: Job, facts: dict[str, Any]) -> dict[str, Any] | None:
    try:
        same = facts["job"] == job.digest and sha256(job.shard(facts["shard"])) == facts["sha256"]
    except (OSError, KeyError):
        return None
    return facts if same else None


def _lost(job: Job, source: JsonFile, facts: dict[str, Any]) -> int | None:
    """How many of a shard's records lack a picture that was packed; None where it is to be made anew."""
    if storage.is_address(job.images):  # a request for each picture would take hours
        return None if facts["missing"] else 0
    states, lost, packed_without = [], 0, set(facts["missing"])
    for row in job.rows(facts["shard"]):
        own = [(path, state(job.images, path)) for path in picture_paths(source[row])]
        states += own
        lost += row not in packed_without and any(seen is None for _, seen in own)
    return lost if lost or digest_of(states) == facts.get("seen") else None


# Parts ---------------------------------------------------------------------------------------------


def _processes(workers: int) -> Run:
    def run(job: Job, numbers: list[int]) -> Iterable[dict[str, Any]]:
        count = min(workers, len(numbers))
        if count <= 1:
            for number in numbers:
                yield write_shard(job, number)
            return
        for number, facts in in_processes(MAKER, (job,), numbers, count, SECONDS):
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


_sources: dict[str, tuple[JsonFile, tuple[int, int]]] = {}
"""Of this process, by digest of the job: the file, scanned once, and its state then."""


def _source(job: Job) -> tuple[JsonFile, tuple[int, int]]:
    if job.digest not in _sources:
        _sources.clear()
        source = JsonFile(job.file)
        if sum(1 for _ in source.scan()) != job.count or source.digest() != job.source:
            raise _changed(job)
        _sources[job.digest] = source, source.state()
    return _sources[job.digest]


def _changed(job: Job) -> SampleError:
    fix = "leave the data as it is while it is packed, and run the same command again"
    return SampleError(f"{job.file}: the file changed while it was packed", fix=fix)


def _finish(job: Job, source: JsonFile, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Writes the texts, describes the folder to tensorflow-datasets, and writes the manifest."""
    import tensorflow_datasets as tfds

    out: Any = Path(job.out)
    temporary = out / f".{RECORDS}.{os.getpid()}.tmp"
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as texts:
            for row in range(job.count):
                line = source.text(row) + b"\n"
                digest.update(line)
                texts.write(line)
            texts.flush()
            os.fsync(texts.fileno())
        if source.digest() != job.source:  # what was made of it may be of neither
            for number in range(job.shards):
                job.facts(number).unlink(missing_ok=True)
            raise _changed(job)
        temporary.replace(out / RECORDS)
    finally:
        temporary.unlink(missing_ok=True)
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
        "refused": {path: why for facts in rows for path, why in facts["refused"].items()},
        "texts": digest.hexdigest(),
        "described": {name: sha256(out / name) for name in DESCRIBED},
        "shards": rows,
    }
    write_json(out / MANIFEST, manifest, indent=1)
    clean(job)
    return manifest


def _refuse_wrong_images(source: JsonFile, images: str) -> None:
    """Raises LlavaError where none of the first pictures is below `images`."""
    paths = [path for row in range(min(100, len(source))) for path in picture_paths(source[row])]
    if paths and not any(picture(images, path)[0] for path in paths):
        raise LlavaError(
            f"--images {images or 'is empty, and the current folder'} holds none of the first "
            f"{len(paths)} pictures; looked for {storage.join(images, paths[0])}",
            fix=f"give the folder that {paths[0]} is below",
        )


def _id(record: Any) -> str:
    return str(record.get("id", "")) if isinstance(record, dict) else ""
