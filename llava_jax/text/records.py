"""Reading LLaVA training records: checked turns and images, and the lengths samplers group by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.errors import SampleError
from llava_jax.text.conversation import ASSISTANT, USER

_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}


def sample_name(record: Mapping[str, Any], index: int | None = None) -> str:
    """How errors call a record: its id, or its place in the file."""
    id_ = record.get("id") if isinstance(record, Mapping) else None
    return str(id_) if id_ is not None else f"#{index}" if index is not None else "(no id)"


def read_turns(record: Any, name: str) -> list[tuple[int, str]]:
    """(role, text) of every turn. Raises SampleError if there is none or one is malformed."""
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise SampleError(f"sample {name}: no list of conversations")
    if not turns:
        raise SampleError(f"sample {name}: the conversation is empty")
    checked = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise SampleError(f"sample {name}: turn {i} has no text in `value`")
        role = _ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise SampleError(
                f"sample {name}: turn {i} is from {turn.get('from')!r}, not human or gpt"
            )
        checked.append((role, turn["value"]))
    return checked


def read_images(record: Mapping[str, Any], name: str) -> list[str]:
    """The image paths of a record: `image` is absent, one path, or a list of paths."""
    images = record.get("image")
    images = [] if images is None else [images] if isinstance(images, str) else images
    if not isinstance(images, Sequence) or not all(isinstance(i, str) and i for i in images):
        raise SampleError(f"sample {name}: `image` is neither a path nor a list of paths")
    return list(images)


def lengths(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Words of all turns (split at white space), and 128 for an image (`lengths` of train.py)."""
    return [_words(record) + (128 if "image" in record else 0) for record in records]


def modality_lengths(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Words of all turns, negative for a text-only record (`modality_lengths` of train.py).

    A malformed turn counts nothing: the record is reported when it is read for training.
    """
    return [_words(record) if "image" in record else -_words(record) for record in records]


def _words(record: Mapping[str, Any]) -> int:
    values = (t.get("value") for t in record.get("conversations") or () if isinstance(t, Mapping))
    return sum(len(value.split()) for value in values if isinstance(value, str))
