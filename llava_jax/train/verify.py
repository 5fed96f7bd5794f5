"""`llava-jax verify`: every file of a run's checkpoints and exports, against its SHA256SUMS."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from llava_jax.digests import SUMS, damages, size_of
from llava_jax.errors import LlavaError, counted
from llava_jax.progress import progress
from llava_jax.util import printable

EPILOG = """\
example:
  llava-jax verify runs/mine runs/mine/export

DIR is a work directory, a folder of checkpoints, one checkpoint, or an exported or converted model;
all that lie in it are checked. Nothing is changed. Exit code 0: all files are as they were written;
1: some are not, and each is named.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `llava-jax verify`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what to check")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Checks all folders and names what is damaged; 1 where something is."""
    found = sorted({folder for given in args.folders for folder in written(given)})
    bad = 0
    with progress(
        sum(map(size_of, found)), "verify", "B", quiet=args.quiet, unit_scale=True
    ) as bar:
        for folder in found:
            problems = damages(folder, progress=bar.update)
            bad += bool(problems)
            for line in problems:
                print(printable(f"{folder}: {line}", keep=""))
    good = counted(len(found) - bad, "folder")
    print(f"{good} as written" + (f", {bad:,} damaged" if bad else ""))
    return int(bad > 0)


def written(given: Path) -> Iterator[Path]:
    """The folders in `given` that have, or should have, a SHA256SUMS.

    Raises LlavaError where there are none.
    """
    if not given.is_dir():
        raise LlavaError(f"{given} is not a folder" if given.exists() else f"no folder {given}")
    count, seen = 0, set()
    for base, folders, files in os.walk(given, followlinks=True):
        folders.sort()
        at = os.stat(base)
        if (at.st_dev, at.st_ino) in seen:  # a link that leads back, or a second one
            folders.clear()
            continue
        seen.add((at.st_dev, at.st_ino))
        if SUMS in files or _should_have(Path(base), files):
            folders.clear()
            count += 1
            yield Path(base)
        folders[:] = [name for name in folders if not name.startswith(".")]  # half-written ones
    if not count:
        raise LlavaError(f"{given} holds no checkpoint and no exported model")


def _should_have(folder: Path, files: list[str]) -> bool:
    """Whether a folder is a checkpoint of a run or a model, by what else is in it."""
    step = folder.parent.name == "checkpoints" and folder.name.partition(".")[0].isdigit()
    return step or any(name.endswith(".safetensors") for name in files)
