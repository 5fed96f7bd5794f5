"""SHA256SUMS: the digest of every file of a folder, beside them, in the form that `sha256sum -c` reads.

SHA-256, and not a faster checksum, since processors compute it at 1 to 2 GB a second and core, files are
read by several threads at once, and anyone can check a folder without this package. Imports no jax.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_sums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Writes SHA256SUMS of all files under `folder`, durably; what stood in it before is replaced.

    known: {path within the folder: digest} of files that need not be read again. Raises OSError.
    """
    known = known or {}
    names = list(_files(folder))
    unread = [name for name in names if name not in known]
    with ThreadPoolExecutor(_threads()) as pool:
        read = dict(zip(unread, pool.map(lambda name: sha256(folder / name), unread)))
    text = "".join(f"{known.get(name) or read[name]}  {name}\n" for name in names)
    with open(folder / SUMS, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def damages(
    folder: Path, part: int = 0, parts: int = 1, progress: Callable[[int], object] = lambda _: None
) -> list[str]:
    """What is not as SHA256SUMS says, a line each: files changed, missing, unreadable or not listed.

    Reads every byte once, several files at a time. part, parts: reads one share of the files only, so
    that processes can divide them. progress: gets the size of each file that was read.
    """
    try:
        *lines, rest = (folder / SUMS).read_bytes().decode("utf-8").split("\n")
    except FileNotFoundError:
        return [f"{SUMS} is missing"]
    except (OSError, UnicodeDecodeError):
        return [f"{SUMS} cannot be read"]
    found = [_LINE.fullmatch(line) for line in lines]
    wanted = {match[2]: match[1] for match in found if match}
    if rest or not all(found) or len(wanted) < len(found):
        return [f"{SUMS} is damaged"]
    there = set(_files(folder))
    problems = [f"{name} is missing" for name in sorted(wanted.keys() - there)]
    problems += [f"{name} is not in {SUMS}" for name in sorted(there - wanted.keys())]

    def one(name: str) -> str | None:
        try:
            size, digest = (folder / name).stat().st_size, sha256(folder / name)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        progress(size)
        return None if digest == wanted[name] else f"{name} is damaged"

    with ThreadPoolExecutor(_threads()) as pool:
        read = pool.map(one, sorted(wanted.keys() & there)[part::parts])
    return problems + [line for line in read if line]


def size_of(folder: Path) -> int:
    """The bytes that `damages` reads."""
    return sum((folder / name).stat().st_size for name in _files(folder))


def _files(folder: Path) -> Iterator[str]:
    """All files under `folder`, in one order; hidden ones are the file system's, not ours."""
    for base, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = (Path(base) / name).relative_to(folder).as_posix()
            if path != SUMS and not name.startswith("."):
                yield path


def _threads() -> int:
    return min(16, os.cpu_count() or 1)
