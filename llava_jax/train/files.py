"""The The JSON files of a work directory, read with a clear error where one is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.util import read_object


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`. Raises ConfigError, naming the file, where there is none."""
    try:
        return read_object(path, ConfigError)
    except ConfigError as e:
        raise ConfigError(f"{path} is damaged: {e.message}", fix="remove this file") from None
