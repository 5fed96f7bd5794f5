"""`llava-jax data check FILE --images DIR`: every record and every picture, and what is wrong with them.

Records and pictures are looked at by several processes, one file's records after the other's; nothing is
whole in memory but digests and paths. Nothing is written unless --report or --clean says so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_jax.data import stored
from llava_jax.data.image_files import missing_images
from llava_jax.data.json_file import JsonFile
from llava_jax.datasets import findings as f
from llava_jax.datasets.build import MEGABYTE
from llava_jax.datasets.check_report import REPORTS, in_words, write_report
from llava_jax.datasets.evaluations import WORDS, files_of, normal, questions_of
from llava_jax.datasets.findings import Finding, OfPicture, OfRecord
from llava_jax.datasets.prompt import maker_of, prompt_of, workers_of
from llava_jax.datasets.writer import open_writer, refuse_there
from llava_jax.errors import LlavaError, SampleError
from llava_jax.images.decode import Limits
from llava_jax.processes import Lost, in_processes
from llava_jax.progress import progress
from llava_jax.storage import is_address
from llava_jax.text.records import USERS, image_paths, record_id
from llava_jax.text.sample import ExampleMaker

log = logging.getLogger(__name__)

RECORD_JOB = "llava_jax.datasets.findings:record_job"
PICTURE_JOB = "llava_jax.datasets.findings:picture_job"
RECORDS, PICTURES = 200, 16
"""Of how many each process takes at a time."""
SECONDS = 60.0
"""The longest that a process may take for them before it is ended."""
LISTED = 1000
"""Notes of a kind that are listed; what is bad is listed whole."""


@dataclass
class Checked:
    """What was found. rows: [(index or None, id or path, Finding)]; counts: by kind.

    peak_mb: of the largest process that read pictures; seconds: of records, and of pictures.
    against: what was compared, one line of each evaluation.
    bad_records: indices; bad_pictures, doubled, seen: of what `clean` may leave out.
    """

    data: JsonFile
    images: str
    records: int = 0
    pictures: int = 0
    peak_mb: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    against: list[str] = field(default_factory=list)
    rows: list[tuple[int | None, str, Finding]] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    bad_records: set[int] = field(default_factory=set)
    bad_pictures: set[str] = field(default_factory=set)
    doubled: set[int] = field(default_factory=set)
    seen_records: set[int] = field(default_factory=set)
    seen_pictures: set[str] = field(default_factory=set)

    def add(self, index: int | None, name: str, finding: Finding) -> None:
        """Counts a finding, and lists it unless there are many of its kind."""
        self.counts[finding.kind] += 1
        if finding.kind in f.BAD or self.counts[finding.kind] <= LISTED:
            self.rows.append((index, name, finding))

    @property
    def file(self) -> str:
        """The path of the records."""
        return str(self.data.path)

    @property
    def bad(self) -> int:
        """How many findings are of what training would not take."""
        return sum(n for kind, n in self.counts.items() if kind in f.BAD)


def run(args: argparse.Namespace) -> int:
    """Prints what is found; 1 if training would leave something out."""
    if args.unique and not args.clean:
        raise LlavaError(
            "--unique leaves records out of --clean, which is not given", fix="add --clean FILE"
        )
    if args.clean:  # before hours of work
        refuse_there(Path(args.clean), "give another --clean")
    for name in REPORTS if args.report else ():
        refuse_there(Path(args.report) / name, "give another --report")
    tokenizer, config = prompt_of(args)
    checked = check(
        args.file,
        args.images,
        maker_of(args, tokenizer, config),
        against=args.against,
        workers=workers_of(args),
    )
    print(in_words(checked))
    if args.report:
        write_report(checked, Path(args.report))
    if args.clean:
        kept = clean(checked, Path(args.clean), unique=args.unique)
        print(f"{args.clean}: {kept:,} of {checked.records:,} records")
    return 1 if checked.bad else 0


def check(
    file: str,
    images: str,
    make: ExampleMaker,
    *,
    against: Iterable[str] = (),
    workers: int = 1,
    limits: Limits | None = None,
) -> Checked:
    """Looks at every record of a file and at every picture that they name below `images`.

    make: says what the prompt is. against: folders of pictures and files of questions of evaluations.
    limits: of pictures, those of training by default. Raises SampleError where the file is no data.
    """
    limits = limits or Limits()
    file = stored.records_path(file)
    checked = Checked(JsonFile(file), str(images))
    asked, pictures = _evaluations(checked, against, workers, limits)
    started = time.monotonic()
    users = _records(checked, make, asked, workers)
    checked.seconds["records"] = time.monotonic() - started
    if not checked.records:
        raise SampleError(f"{file}: there are no samples")
    if Path(file).name == stored.RECORDS and stored.is_packed(str(Path(file).parent)):
        log.warning("%s is packed: no picture in it is looked at, only which were missing", file)
        for row in sorted(stored.Packed(str(Path(file).parent)).missing - checked.bad_records):
            checked.bad_records.add(row)
            finding = Finding(f.MISSING, "when the data were packed")
            checked.add(row, record_id(checked.data[row], row), finding)
        users = {}
    checked.pictures = len(users)
    started = time.monotonic()
    _pictures(checked, users, pictures, workers, limits)
    checked.seconds["pictures"] = time.monotonic() - started
    return checked


# Records ------------------------------------------------------------------------------------------


def _records(
    checked: Checked, make: ExampleMaker, asked: set[str], workers: int
) -> dict[str, tuple[int, str]]:
    """Looks at the records; {path of a picture: (index, id) of the first record that names it}."""
    seen = _Seen()
    read = 0  # megabytes
    job, setup = RECORD_JOB, (make, Path(checked.file).name)
    size = 0 if is_address(checked.file) else os.path.getsize(checked.file) // MEGABYTE
    with progress(max(1, size), "records", "MB") as bar:
        rows = enumerate(checked.data.scan())
        chunks = iter(lambda: list(itertools.islice(rows, RECORDS)), [])
        for chunk, result in _whole(in_processes(job, setup, chunks, workers, SECONDS), job, setup):
            for (index, record), found in zip(chunk, result):
                _take_record(checked, index, found, seen)
                if asked:
                    _take_questions(checked, index, found.id, record, asked)
            checked.records += len(chunk)
            if more := checked.data.position() // MEGABYTE - read:
                bar.update(more)
                read += more
    for index, digest in sorted(seen.later):
        checked.doubled.add(index)
        name, detail = record_id(checked.data[index], index), f"as record {seen.first[digest]}"
        checked.add(index, name, Finding(f.DOUBLE_RECORD, detail))
    return seen.users


@dataclass
class _Seen:
    """What records are compared with. Chunks come in any order: the first is the one of the lowest index.

    users: {path of a picture: (index, id) of the first record that names it}.
    first: {digest: index of the first record of it}; later: (index, digest) of all others.
    """

    users: dict[str, tuple[int, str]] = field(default_factory=dict)
    first: dict[bytes, int] = field(default_factory=dict)
    later: list[tuple[int, bytes]] = field(default_factory=list)


def _take_record(checked: Checked, index: int, found: OfRecord, seen: _Seen) -> None:
    for finding in found.findings:
        checked.add(index, found.id, finding)
        if finding.kind in f.BAD:
            checked.bad_records.add(index)
    for path in found.images:
        seen.users[path] = min(seen.users.get(path, (index, found.id)), (index, found.id))
    if found.digest:
        known = seen.first.setdefault(found.digest, index)
        if known != index:
            seen.first[found.digest] = min(known, index)
            seen.later.append((max(known, index), found.digest))


def _whole(results: Iterator[tuple[Any, Any]], job: str, setup: tuple) -> Iterator[tuple[Any, Any]]:
    """Results of chunks; those whose process was lost are asked for again, one element at a time."""
    lost = []
    for chunk, result in results:
        if isinstance(result, Lost):
            log.warning("%s while it read %s: its work is done again", result.why, _name(chunk[0]))
            lost.append(chunk)
        else:
            yield chunk, result
    singles = [[element] for chunk in lost for element in chunk]
    for single, result in in_processes(job, setup, singles, 1, SECONDS):
        if not isinstance(result, Lost):
            yield single, result
        elif isinstance(single[0], str):
            yield single, ([OfPicture(single[0], b"", b"", [Finding(f.DEADLY, result.why)])], 0)
        else:
            name = str(single[0][0])
            yield single, [OfRecord(name, (), b"", [Finding(f.MALFORMED, result.why)])]


def _name(element: Any) -> str:
    return element if isinstance(element, str) else f"record {element[0]}"


# Pictures -----------------------------------------------------------------------------------------


def _pictures(
    checked: Checked,
    users: dict[str, tuple[int, str]],
    evaluations: tuple[dict[bytes, str], f.Looks],
    workers: int,
    limits: Limits,
) -> None:
    theirs, their_looks = evaluations
    paths = list(users)
    missing = missing_images([(path,) for path in paths], [checked.images] * len(paths))
    for n, full in missing.items():
        _take(checked, users, paths[n], Finding(f.MISSING, f"looked for {full}"))
    there = [path for n, path in enumerate(paths) if n not in missing]
    digests: dict[bytes, str] = {}
    looks = f.Looks()
    with progress(len(there), "pictures", "picture") as bar:
        for found in _look(checked, checked.images, there, workers, limits, bar):
            for finding in found.findings:
                _take(checked, users, found.path, finding)
            if not found.digest:
                continue
            first = digests.setdefault(found.digest, found.path)
            if first != found.path:
                _take(checked, users, found.path, Finding(f.DOUBLE_PICTURE, f"as {first}"))
            elif alike := looks.find(found.look):
                _take(checked, users, found.path, Finding(f.ALIKE, f"as {alike}"))
            else:
                looks.add(found.look, found.path)
            if seen := theirs.get(found.digest) or their_looks.find(found.look):
                checked.seen_pictures.add(found.path)
                _take(checked, users, found.path, Finding(f.SEEN_PICTURE, f"as {seen}"))


def _look(
    checked: Checked | None, folder: str, paths: list[str], workers: int, limits: Limits, bar: Any
) -> Iterator[OfPicture]:
    job, setup = PICTURE_JOB, (folder, limits)
    chunks = (paths[at : at + PICTURES] for at in range(0, len(paths), PICTURES))
    for chunk, (found, peak) in _whole(
        in_processes(job, setup, chunks, workers, SECONDS), job, setup
    ):
        if checked:
            checked.peak_mb = max(checked.peak_mb, peak)
        yield from found
        bar.update(len(chunk))


def _take(checked: Checked, users: dict[str, tuple[int, str]], path: str, finding: Finding) -> None:
    index, name = users[path]
    checked.add(index, name, Finding(finding.kind, f"{path}: {finding.detail}"))
    if finding.kind in f.BAD:
        checked.bad_pictures.add(path)


# Evaluations --------------------------------------------------------------------------------------


def _evaluations(
    checked: Checked, against: Iterable[str], workers: int, limits: Limits
) -> tuple[set[str], tuple[dict[bytes, str], f.Looks]]:
    """(questions, (paths of pictures by the digest of their bytes, and by looks)) of all of them.

    What was read is told in `checked.against`. Raises LlavaError for a path that has nothing to check by.
    """
    asked: set[str] = set()
    pictures: dict[bytes, str] = {}
    looks = f.Looks()
    for name in against:
        found = files_of(name)
        questions = {q for path in found.texts for q in questions_of(path)}
        asked |= questions
        names = [str(path.relative_to(found.root)) for path in found.pictures]
        good, failed = 0, []
        with progress(len(names), f"pictures of {found.root.name}", "picture") as bar:
            for made in _look(None, str(found.root), names, workers, limits, bar):
                if made.digest:
                    good += 1
                    pictures[made.digest] = str(found.root / made.path)
                    looks.add(made.look, str(found.root / made.path))
                else:
                    failed.append(made.path)
        if failed:
            some = f"{len(failed):,} pictures cannot be read and are not compared"
            log.warning("--against %s: %s: %s", name, some, ", ".join(sorted(failed)[:3]))
        if not questions and not good:
            raise LlavaError(
                f"--against {name}: {len(found.texts):,} files of questions and {len(names):,} pictures,"
                f" and among them no picture that can be read and no question of {WORDS} words",
                fix="name the folder of its pictures, or a JSON, CSV or TSV file of its questions",
            )
        files = (
            f"{len(found.texts):,} files with {len(questions):,} questions of {WORDS} words or more"
        )
        checked.against.append(f"{name}: {files}, {good:,} pictures")
    return asked, (pictures, looks)


def _take_questions(checked: Checked, index: int, name: str, record: Any, asked: set[str]) -> None:
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        for turn in record["conversations"]:
            if str(turn["from"]).lower() not in USERS:
                continue
            if shared := next((q for q in normal(turn["value"]) if q in asked), None):
                checked.add(index, name, Finding(f.SEEN_QUESTION, shared[:80]))
                checked.seen_records.add(index)


# A cleaned file -----------------------------------------------------------------------------------


def clean(checked: Checked, out: Path, *, unique: bool = False) -> int:
    """Writes the records that training would take; how many there are.

    unique: also without those that are there twice, and those that an evaluation shares.
    """
    kept = 0
    with open_writer(out) as writer:
        for index in range(len(checked.data)):
            if index in checked.bad_records:
                continue
            record = checked.data[index]
            paths = image_paths(record)
            if any(path in checked.bad_pictures for path in paths):
                continue
            if unique and (
                index in checked.doubled
                or index in checked.seen_records
                or any(path in checked.seen_pictures for path in paths)
            ):
                continue
            writer.write(record)
            kept += 1
        writer.finish()
    return kept
