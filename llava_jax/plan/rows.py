"""Finished rows of plans, kept in a file of JSON lines, so that no program is compiled twice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llava_jax
from llava_jax.errors import ConfigError
from llava_jax.plan.table import describe, table
from llava_jax.settings import flat
from llava_jax.util import json_lines, parse_values, read_text, take_lock, write_text


def key_of(config: Any, assumed: dict[str, Any], machine: str) -> str:
    """Digest of what is asked: settings, assumptions, machine."""
    facts = [sorted((n, repr(v)) for n, v in flat(config)), assumed, machine]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def digest_of(*files: str) -> str:
    """Digest of some of this package's files, all of its source if none is named."""
    digest, home = hashlib.sha256(), Path(str(llava_jax.__file__)).parent
    for path in [home / file for file in files] or sorted(home.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class Kept:
    """The rows of a file, which is made anew with each row added; of no file, if `path` is None.

    Raises ConfigError for a file that holds something else.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self.rows: dict[str, dict[str, Any]] = _read(path) if path else {}

    def get(self, key: str, made_by: dict[str, Any]) -> dict[str, Any] | None:
        """The finished row with this key, if what made it is what would make it now.

        made_by: versions of the compilers, digests of the code that reads programs and of all code.
        """
        row = self.rows.get(key)
        return row if row and all(row.get(name) == made_by[name] for name in made_by) else None

    def same_program(
        self, digest: str, target: str, made_by: dict[str, Any]
    ) -> dict[str, Any] | None:
        """A row with the same program, compiled by the same compiler and read by the same code.

        It may be of other code, and of a chip that differs in memory and bandwidth.
        """
        wanted = (digest, target, made_by["versions"], made_by["reader"])
        for row in self.rows.values():
            found = (row["compiled"]["digest"], row["target"], row["versions"], row["reader"])
            if found == wanted:
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a finished row; it is in the file when this returns."""
        self.rows[row["key"]] = row
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self._path):  # another plan may have added rows to the file
            self.rows = {**_read(self._path), **self.rows}
            lines = (json.dumps(row, sort_keys=True) for row in self.rows.values())
            write_text(self._path, "".join(f"{line}\n" for line in lines))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    text, rows = read_text(path, ConfigError), {}
    parse_values(text, path, ConfigError)
    for number, line in json_lines(text):
        found = parse_values(line, path, ConfigError)
        if len(found) != 1 or not _is_row(found[0]):
            raise ConfigError(
                f"{path}: line {number} holds something else than a row of a plan",
                fix="name another file for --out",
            )
        rows[found[0]["key"]] = found[0]
    return rows


def _is_row(row: Any) -> bool:
    """Whether a value has what a row is shown and compared by."""
    try:
        describe(row)
        table([row])
        texts = (row["key"], row["target"], row["reader"], row["compiled"]["digest"])
        return (
            all(isinstance(text, str) for text in texts)
            and isinstance(row["fits"], bool)
            and isinstance(row["versions"], dict)
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError):
        return False


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Other processes of the host wait here. The lock's file stays, else two could lock two files."""
    target = Path(os.path.realpath(path))
    with target.with_name(f".{target.name}.lock").open("a") as lock:
        take_lock(lock, wait=True)
        yield
