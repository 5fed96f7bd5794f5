"""Reading LLaVA training records: checked turns and images, and the lengths a sampler groups by."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.errors import SampleError
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.conversation import ASSISTANT, USER

_ROLES = {"human": USER, "user": USER, "gpt": ASSISTANT, "assistant": ASSISTANT}
USERS = tuple(name for name, role in _ROLES.items() if role == USER)
"""Who asks, in small letters."""
_OTHER_TURNS = ("messages", "conversation", "turns", "dialog", "dialogue")
_BUILD = 'llava-jax data build turns it into LLaVA\'s form: a recipe with source = "records"'
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can hold half a pair; UTF-8 cannot


def record_id(record: Any, index: int | str = "(no id)") -> str:
    """The sample's own id, or `index` where it has none."""
    own = record.get("id") if isinstance(record, Mapping) else None
    return str(index if own is None or own == "" else own)


def read_turns(record: Any, name: str) -> list[tuple[int, str]]:
    """(role, text) of every turn. Raises SampleError if there is none or one is malformed."""
    turns = record.get("conversations") if isinstance(record, Mapping) else None
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        other = next((k for k in _OTHER_TURNS if isinstance(record, Mapping) and k in record), None)
        instead = f", but `{other}`" if other else ""
        fix = _BUILD if other else None
        raise SampleError(f"sample {name}: no list of conversations{instead}", fix=fix)
    if not turns:
        raise SampleError(f"sample {name}: the conversation is empty")
    checked = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("value"), str):
            raise _no_text(turn, i, name)
        role = _ROLES.get(str(turn.get("from")).lower())
        if role is None:
            raise SampleError(
                f"sample {name}: turn {i} is from {turn.get('from')!r}, not human or gpt"
            )
        text = turn["value"]
        if not text.isascii() and _SURROGATE.search(text):
            raise SampleError(f"sample {name}: turn {i} holds half of a surrogate pair")
        checked.append((role, text))
    return checked


def _no_text(turn: Any, i: int, name: str) -> SampleError:
    if isinstance(turn, Mapping) and "content" in turn:
        return SampleError(
            f"sample {name}: turn {i} has no text in `value`, but `content`",
            fix=_BUILD,
        )
    return SampleError(f"sample {name}: turn {i} has no text in `value`")


def image_paths(record: Mapping[str, Any], name: str = "") -> tuple[str, ...]:
    """The image paths of a record, in order: `image` is absent, one path, or a list of paths."""
    images = record.get("image")
    images = [images] if isinstance(images, str) and images else images or ()
    if not isinstance(images, Sequence) or not all(isinstance(i, str) and i for i in images):
        raise SampleError(f"sample {name}: `image` is neither a path nor a list of paths")
    return tuple(images)


def check_turns(
    turns: Sequence[tuple[int, str]], images: Sequence[str], name: str, *, caption: bool
) -> None:
    """Raises SampleError for a conversation that cannot be trained, whatever the tokenizer.

    caption: a stage-1 sample, which is an image and two turns.
    """
    first = 1 if turns[0][0] == ASSISTANT else 0  # an answer without a question is dropped
    if any(role != i % 2 for i, (role, _) in enumerate(turns[first:])):
        raise SampleError(f"sample {name}: human and gpt do not alternate")
    if caption and (len(turns) - first != 2 or not images):
        # Without numbers: samples are counted by the words of their reason.
        found = "more turns or fewer" if images else "no image"
        raise SampleError(
            f"sample {name}: a caption sample needs an image and two turns (data.version plain), "
            f"and this one has {found}"
        )
    if len(images) > 1:
        tags = sum(text.count(IMAGE_TAG) for _, text in turns[first:])
        if tags not in (0, len(images)) and not (caption and IMAGE_TAG not in turns[first][1]):
            raise SampleError(f"sample {name}: {tags} {IMAGE_TAG} tags for {len(images)} images")
    if not any(role == ASSISTANT and text.strip() for role, text in turns[first:]):
        raise SampleError(f"sample {name}: no turn has an answer to train")


TAG_NOTES = {
    "image without tag": f"no {IMAGE_TAG} in the text, so the image is not shown",
    "tag without image": f"{IMAGE_TAG} is trained as text",
    "more tags than images": f"the image is shown at every {IMAGE_TAG}",
}
"""A mismatch of tags and images, as `tag_note` names it -> its consequence."""


def tag_note(tags: int, images: int, *, caption: bool = False) -> str | None:
    """The name of a mismatch between `<image>` tags and images, or None.

    caption: a stage-1 sample, whose image is shown even without a tag.
    """
    if tags and not images:
        return "tag without image"
    if images and not tags:
        return None if caption else "image without tag"
    return "more tags than images" if tags > images else None


def modality_lengths(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Words of all turns, negative for a text-only record (`modality_lengths` of train.py).

    A malformed turn counts nothing: the record is reported when it is read for training.
    """
    lengths = []
    for record in records:
        turns = record.get("conversations") or ()
        texts = (turn.get("value") for turn in turns if isinstance(turn, Mapping))
        words = sum(len(text.split()) for text in texts if isinstance(text, str))
        lengths.append(words if "image" in record else -words)
    return lengths
