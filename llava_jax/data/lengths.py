"""How long every sample of a data set is: counted once, in several processes, and kept on disk.

Packing is planned from these numbers. The file lies beside the data (else in the user's cache folder)
and is named after a digest of all that they depend on: records, tokenizer, template and limits. So a
change of any of them counts anew, and one of them that is back finds its file again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llava_jax import storage
from llava_jax.data.check import Dataset
from llava_jax.data.packing import Sizes
from llava_jax.data.settings import DataSettings
from llava_jax.errors import LlavaError
from llava_jax.processes import Lost, cores, in_processes
from llava_jax.progress import progress
from llava_jax.text.example import LEFT_OUT, TRUNCATED, Example
from llava_jax.text.records import image_paths
from llava_jax.text.sample import ExampleMaker, check_trained
from llava_jax.util import take_lock

log = logging.getLogger(__name__)

FORMAT = 2
"""Part of the digest: another number where what is counted changes."""
MANY = 5_000
"""From so many records on, several processes count, and the result is kept."""
CHUNK = 1_000
"""Records that a process takes at a time."""
JOB, SECONDS = f"{__name__}:counter", 600.0  # the longest that a chunk may take


class Lengths(NamedTuple):
    """What each record needs, int32[n] each; 0 positions and targets where it cannot be trained.

    cut: 1 where it loses tokens to the length limit.
    """

    length: np.ndarray
    images: np.ndarray
    targets: np.ndarray
    cut: np.ndarray

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.length, self.images, self.targets)


class Rule(NamedTuple):
    """What becomes of an Example before it is given out."""

    max_length: int | None
    turns_per_sample: int
    compat: bool
    image_tokens: int


def sample_lengths(
    data: Dataset, make: Callable[[Any, str], Example], settings: DataSettings, image_tokens: int
) -> Lengths:
    """What each record needs; where some of its turns are drawn anew in each epoch, the most that
    they can need.

    make: an ExampleMaker, or another function, whose results are not kept. Raises LlavaError where
    a process that counts ends.
    """
    s = settings
    rule = Rule(s.max_length, s.turns_per_sample, s.compat, image_tokens)
    if len(data) < MANY or not isinstance(make, ExampleMaker):
        return _measure(make, rule, data.records, data.ids)
    first = data.files[0].path
    name = f"{Path(first).name}.lengths-{_digest(data, make, rule)}.npz"
    folders = [_cache_folder()]
    if not storage.is_address(first):
        path = Path(first).absolute()
        folders.insert(0, path if path.is_dir() else path.parent)  # a folder: packed data
    for folder in folders:
        if (found := _read(folder / name, len(data))) is not None:
            return found
    with _only_one(folders, name) as file:
        if file and (found := _read(file, len(data))) is not None:
            return found  # another process counted meanwhile
        found = _count(data, make, rule)
        if file:
            _write(file, found)
    return found


# One record ---------------------------------------------------------------------------------------


def _measure(
    make: Callable[[Any, str], Example], rule: Rule, records: Sequence[Any], ids: Sequence[str]
) -> Lengths:
    needs = [_need(make, rule, record, name) for record, name in zip(records, ids)]
    return Lengths(*np.asarray(needs, np.int32).reshape(-1, 4).T)


def _need(make: Any, rule: Rule, record: Any, name: str) -> tuple[int, int, int, int]:
    try:
        example = make(record, name)
        length, targets = _of_turns(example, rule)
        cut = example.truncated(rule.max_length, rule.image_tokens)
        if not rule.compat:
            check_trained(cut, rule.max_length)
    except LlavaError:
        return 0, len(image_paths(record)), 0, 0  # for what replaces it
    # Where turns are drawn, of the longest of them: the whole record is never shown.
    long = rule.max_length is not None and length > rule.max_length
    lost = long or bool({TRUNCATED, LEFT_OUT} & example.notes.keys())
    return min(length, cut.length(rule.image_tokens)), len(cut.images), targets, lost


def _of_turns(example: Example, rule: Rule) -> tuple[int, int]:
    """(positions, targets) of an Example, with the longest of its turns where some are drawn."""
    turns, count = example.turns, rule.turns_per_sample
    cut = example.truncated(rule.max_length, rule.image_tokens)
    length, targets = example.length(rule.image_tokens), cut.target_count
    if turns is None or not count or turns.max(initial=0) <= count:
        return length, targets
    of_turn = np.sort(np.bincount(turns)[1:])  # ids of each
    trained = np.sort(np.bincount(turns[np.asarray(example.labels) >= 0])[1:])
    return length - int(of_turn[:-count].sum()), int(trained[-count:].sum())


# All of them --------------------------------------------------------------------------------------


def _count(data: Dataset, make: ExampleMaker, rule: Rule) -> Lengths:
    """In a process per core: Python counts one record at a time."""
    started, total = time.monotonic(), len(data)
    slices = [slice(at, at + CHUNK) for at in range(0, total, CHUNK)]
    # Records are read when their turn comes.
    chunks = ((part, data.records[part], data.ids[part]) for part in slices)
    found = Lengths(*(np.zeros(total, np.int32) for _ in Lengths._fields))
    count = min(cores(), len(slices))
    with progress(total, "counting lengths", "sample") as bar:
        for (part, _, ids), result in in_processes(JOB, (make, rule), chunks, count, SECONDS):
            if isinstance(result, Lost):
                raise LlavaError(
                    f"the lengths of samples {part.start} to {part.start + len(ids) - 1} "
                    f"were not counted: {result.why}",
                    fix="a message may be above; without one, the system may have lacked memory",
                )
            for column, values in zip(found, result):
                column[part] = values
            bar.update(len(ids))
    log.info("lengths of %s samples counted in %.0f s", f"{total:,}", time.monotonic() - started)
    return found


def counter(make: ExampleMaker, rule: Rule) -> Callable[[Any], Lengths]:
    """What a counting process does with (slice, records, ids); see `llava_jax.processes`."""
    return lambda chunk: _measure(make, rule, *chunk[1:])


# On disk ------------------------------------------------------------------------------------------


def _digest(data: Dataset, make: ExampleMaker, rule: Rule) -> str:
    facts = [FORMAT, data.content, make.identity(), list(rule)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _cache_folder() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "llava_jax" / "lengths"


def _seal(sizes: Lengths) -> str:
    return hashlib.sha256(b"".join(column.tobytes() for column in sizes)).hexdigest()


def _read(file: Path, count: int) -> Lengths | None:
    """The lengths in a file; None where it is missing, or damaged, which is said."""
    if not file.is_file():
        return None
    try:
        with np.load(file) as stored:
            found = Lengths(*(stored[name].astype(np.int32) for name in Lengths._fields))
            if all(len(column) == count for column in found) and str(stored["seal"]) == _seal(
                found
            ):
                return found
    except Exception as error:  # numpy and zipfile raise what they like
        log.debug("%s: %s", file, error)
    log.warning("%s is damaged: lengths are counted again", file)
    return None


@contextlib.contextmanager
def _only_one(folders: Sequence[Path], name: str) -> Iterator[Path | None]:
    """The file of the first folder that can be written to; other processes of the host wait here."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / f"{name}.lock").open("a")
            break
        except OSError as error:
            log.debug("%s: %s", folder, error)
    else:
        log.warning("no folder for lengths can be written to: every start counts them again")
        yield None
        return
    with lock:
        take_lock(lock, wait=True)
        try:
            yield folder / name
        finally:
            Path(lock.name).unlink(missing_ok=True)


def _write(file: Path, sizes: Lengths) -> None:
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            np.savez_compressed(out, seal=np.array(_seal(sizes)), **sizes._asdict())
        temporary.replace(file)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next start counts again", file, error.strerror)
        temporary.unlink(missing_ok=True)
