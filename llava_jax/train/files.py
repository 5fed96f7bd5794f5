"""The JSON files of a work directory: written whole or not at all, and read with a word where damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Writes `path` as UTF-8; a kill at any moment leaves what was there, or all of the new text."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises ConfigError, naming the file, where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it holds no JSON object", fix="remove this file")
    return found
