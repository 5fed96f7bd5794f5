"""The pictures of a record, as `llava-jax data pack` takes them: their bytes, and what tells that they changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from llava_jax import storage
from llava_jax.errors import ImageError, SampleError
from llava_jax.images.decode import DEFAULT_LIMITS, read_image

State = tuple[int, int] | None
"""Size and time of the last change of a file; None of one that is not there. Of an address (0, 0)."""


def picture_paths(record: Any) -> tuple[str, ...]:
    """The paths of its images; none of a record that training will call bad."""
    from llava_jax.data.records import check_record

    try:
        return check_record(record, "")[1]
    except SampleError:
        return ()


def picture(folder: str, path: str) -> tuple[bytes, State, str]:
    """(bytes, state, why the gate of images refused it) of a picture; no reason where it is not there."""
    seen = state(folder, path)
    try:
        return (
            read_image(storage.source(storage.join(folder, path)), DEFAULT_LIMITS, path),
            seen,
            "",
        )
    except ImageError as error:
        why = error.message if error.fix is None else f"{error.message}: {error.fix}"
        return b"", seen, "" if error.code == "not_found" else why


def state(folder: str, path: str) -> State:
    """Of a picture on a disk; (0, 0) at an address, where asking for each would take hours."""
    if storage.is_address(folder):
        return 0, 0
    try:
        return _state(os.stat(storage.join(folder, path)))
    except (OSError, ValueError):
        return None


def digest_of(states: Sequence[tuple[str, State]]) -> str:
    """What changes where a picture does."""
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def _state(found: os.stat_result) -> State:
    return found.st_size, found.st_mtime_ns
