"""Finished rows of plans, kept in a file of JSON lines, so that no program is compiled twice."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import llava_jax
from llava_jax.errors import ConfigError
from llava_jax.settings import flat
from llava_jax.util import parse_values, read_text, write_text


def key_of(config: Any, assumed: dict[str, Any], topology: str, versions: dict[str, str]) -> str:
    """Digest of all that a row follows from: settings, assumptions, machine, compilers, our code."""
    facts = [sorted((n, repr(v)) for n, v in flat(config)), assumed, topology, versions, _code()]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _code() -> str:
    """Digest of this package's own source: a row of an earlier state is made anew."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(llava_jax.__file__)).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Kept:
    """The rows of a file, which is made anew with each row added; of no file, if `path` is None.

    Raises ConfigError for a file that holds something else.
    """

    def __init__(self, path: Path | None):
        self._path, self.rows = path, {}
        if path is None or not path.exists():
            return
        for row in parse_values(read_text(path, ConfigError), path, ConfigError):
            if not isinstance(row, dict) or not {"key", "compiled", "target"} <= set(row):
                raise ConfigError(
                    f"{path}: holds something else than rows of a plan", fix="name another file"
                )
            self.rows[row["key"]] = row

    def get(self, key: str) -> dict[str, Any] | None:
        """The finished row with this key."""
        return self.rows.get(key)

    def same_program(self, digest: str, target: str) -> dict[str, Any] | None:
        """A row of the same program, for a chip that differs in memory and bandwidth at most."""
        for row in self.rows.values():
            if (row["compiled"]["digest"], row["target"]) == (digest, target):
                return row
        return None

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a finished row; it is in the file when this returns."""
        self.rows[row["key"]] = row
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, sort_keys=True) for row in self.rows.values())
            write_text(self._path, "".join(f"{line}\n" for line in lines))
