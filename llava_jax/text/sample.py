"""Turns a LLaVA training record into an Example: token ids, labels, and the images in slot order.

A record is {"id", "image"?: path or list of paths, "turns"?: one of TURNS, "conversations": [{"from":
"human" | "gpt", "value"}]}, and `<image>` in a record that has images is a slot. Everything else in it
is plain text, `</s>` included. `compat` gives the original's ids and labels instead: see `text.compat`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.compat import compat_sample
from llava_jax.text.constants import IGNORE, IMAGE_TAG, IMAGE_TOKEN
from llava_jax.text.conversation import ASSISTANT, USER
from llava_jax.text.example import LEFT_OUT, TRUNCATED, Example
from llava_jax.text.labels import TrainingVersion, tokenise, training_pieces, training_version
from llava_jax.text.prompt import slot_parts
from llava_jax.text.records import check_turns, image_paths, read_turns, record_id, tag_note
from llava_jax.text.tokenizer import Part, Tokenizer

TURNS = ("conversation", "independent")

Round = tuple[list[Part], list[Part]]
"""A question and its answer."""


class ExampleMaker:
    """Makes Examples of records, all with the same tokenizer and settings. Threads may share it.

    version: a `--version` of the original: "v1" for LLaVA-1.5, "plain" for stage 1, ...
    max_length: positions, image features included; longer samples are cut, never inside the
        features of an image. None: no limit.
    image_tokens: features per image (`LlavaConfig.image_tokens`).
    turns: "conversation", or "independent": every question of a record is trained as if it were
        alone with the image; the text before it and the image are shared by all. A record's own
        "turns" takes precedence, so that one file may hold both.
    compat: the original's ids and labels. Tags collapse to one per turn, a sample that it gives up
        has no labels, and text samples are cut at max_length tokens.

    The notes of an Example count what was done to it: "truncated" (lost tokens), "turns left out"
    (did not fit), "empty answers", "unanswered question", "leading answer", "image without tag" (not
    shown), "tag without image" (trained as text), "more tags than images" (one image serves them
    all), "trained as a conversation" (independent turns are not possible), "mismatch" (compat: given up).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        version: str = "v1",
        max_length: int | None = 2048,
        image_tokens: int = 576,
        turns: str = "conversation",
        compat: bool = False,
        use_im_start_end: bool = False,
    ):
        if turns not in TURNS:
            raise ConfigError(f"turns {turns!r} is neither conversation nor independent")
        if compat and turns != "conversation":
            raise ConfigError("compat trains conversations, not independent turns")
        self.tokenizer, self.version = tokenizer, training_version(version)
        self.max_length, self.image_tokens = max_length, image_tokens
        self.turns, self.compat, self.use_im_start_end = turns, compat, use_im_start_end
        self._caption = self.version.kind == "plain"
        wrapped = use_im_start_end and not self._caption
        self._slot = slot_parts(tokenizer, self.version.template, wrapped)

    def identity(self) -> dict[str, Any]:
        """All that its Examples depend on, JSON-ready."""
        names = ("max_length", "image_tokens", "turns", "compat", "use_im_start_end")
        own = {name: getattr(self, name) for name in names}
        return {"tokenizer": self.tokenizer.digest, "version": self.version.name, **own}

    def __call__(self, record: Mapping[str, Any], name: str | None = None) -> Example:
        """The Example of a record; `name` is its id there and in errors, by default its own.

        Raises SampleError, with the name, if it is malformed or leaves nothing to train.
        """
        name = record_id(record) if name is None else name
        notes: Counter[str] = Counter()
        turns, images = read_turns(record, name), image_paths(record, name)
        tags = sum(text.count(IMAGE_TAG) for _, text in turns)
        if note := tag_note(tags, len(images), caption=self._caption):
            notes[note] += 1
        if self.compat:
            example = self._compat(record, name, images, notes)
        else:
            check_turns(turns, images, name, caption=self._caption)
            rounds, images = place_rounds(turns, images, notes, caption=self._caption)
            if stand_alone(record, name, rounds, self.turns, notes):
                ids, labels, numbers = self._join(rounds, len(images), notes)
            else:
                rounds = [(self._shown(q), self._shown(a)) for q, a in rounds]
                ids, labels, _ = _tokenise(self.tokenizer, self.version, rounds)
                numbers = None
            example = Example(ids, images, labels, numbers, name)
            example = example.truncated(self.max_length, self.image_tokens)
            check_trained(example, self.max_length)
        return replace(example, notes={**notes, **example.notes})

    # Ids and labels ----------------------------------------------------------------------------

    def _shown(self, parts: list[Part]) -> list[Part]:
        """Parts with every image slot as the model expects it, with what stands around it."""
        return [p for part in parts for p in (self._slot if part == IMAGE_TOKEN else [part])]

    def _join(self, rounds: list[Round], images: int, notes: Counter[str]):
        """(ids, labels, turns): every round after the prefix that all share, as if it were alone."""
        prompts = [(tuple(self._shown(q)), tuple(a)) for q, a in alone_rounds(rounds)]
        alone = [_alone(self.tokenizer, self.version, q, a) for q, a in prompts]
        start = _shared_prefix(alone)
        joined = [(alone[0][0][:start], alone[0][1][:start], np.zeros(start, np.int32))]
        length = start + images * (self.image_tokens - 1)  # every slot is in the prefix
        for n, (ids, labels, _) in enumerate(alone, 1):
            more = len(ids) - start
            if n > 1 and self.max_length is not None and length + more > self.max_length:
                notes[LEFT_OUT] += 1  # half a question is useless, except in the first round
                continue
            joined.append((ids[start:], labels[start:], np.full(more, n, np.int32)))
            length += more
        return (np.concatenate(arrays) for arrays in zip(*joined))

    # The original ------------------------------------------------------------------------------

    def _compat(
        self, record: Mapping[str, Any], name: str, images: tuple[str, ...], notes: Counter[str]
    ) -> Example:
        sample = compat_sample(
            record,
            self.tokenizer,
            self.version.name,
            max_length=self.max_length or 1 << 30,
            use_im_start_end=self.use_im_start_end,
            name=name,
        )
        if sample.mismatch:
            notes["mismatch"] += 1
        labels = np.where(sample.labels == IMAGE_TOKEN, IGNORE, sample.labels)
        slots = int((sample.ids == IMAGE_TOKEN).sum())
        images = images * slots if len(images) == 1 else images[:slots]
        example = Example(sample.ids, images, labels, id=name)
        example = example.truncated(self.max_length, self.image_tokens)
        # The original takes every padding id for padding, an `<unk>` in the text too, and drops it
        # before image features go in (the attention mask of train.py and llava_arch.py).
        return example.select(example.ids != self.tokenizer.pad_id)


def check_trained(example: Example, max_length: int | None) -> None:
    """Raises SampleError if no token of an example is trained, for instance because it was cut."""
    if not example.target_count:
        why = f"within its first {max_length} tokens" if TRUNCATED in example.notes else "in it"
        raise SampleError(f"sample {example.id}: there is nothing to train {why}")


# What a record's questions and answers are, whatever the tokenizer --------------------------------


def place_rounds(
    turns: list[tuple[int, str]],
    images: tuple[str, ...],
    notes: Counter[str],
    *,
    caption: bool = False,
) -> tuple[list[Round], tuple[str, ...]]:
    """The rounds that have an answer to train, with IMAGE_TOKEN where an image stands, and one image
    per slot in them.

    A question without an answer is left out; its images move to the next question.
    caption: of a stage-1 sample, whose image is shown even without a tag.
    """
    if turns[0][0] == ASSISTANT:
        notes["leading answer"] += 1
        turns = turns[1:]
    messages, images = _place_images([text for _, text in turns], images, caption)
    if len(turns) % 2:
        notes["unanswered question"] += 1
    rounds: list[Round] = []
    waiting: list[Part] = []
    for question, answer in zip(messages[::2], messages[1::2]):
        if any(not isinstance(part, str) or part.strip() for part in answer):
            rounds.append((waiting + question, answer))
            waiting = []
        else:
            notes["empty answers"] += 1
            waiting += [IMAGE_TOKEN, "\n"] * question.count(IMAGE_TOKEN)
    slots = sum(parts.count(IMAGE_TOKEN) for pair in rounds for parts in pair)
    return rounds, images[:slots]


def _place_images(
    texts: list[str], images: tuple[str, ...], caption: bool
) -> tuple[list[list[Part]], tuple[str, ...]]:
    """Turns `<image>` tags into slots, and says which image each slot shows.

    A single tag of a turn goes to its front, as in the original; several keep their places.
    One image serves all tags of a record, and several tags in one turn are then one slot.
    """
    if not images:
        return [[text] for text in texts], ()
    if caption and IMAGE_TAG not in texts[0]:
        texts = [IMAGE_TAG * len(images), *texts[1:]]  # its instruction is discarded anyway
    one = len(images) == 1
    texts = [_tag_first(t) if one or t.count(IMAGE_TAG) == 1 else t for t in texts]
    slots = sum(text.count(IMAGE_TAG) for text in texts)
    return [_split_tags(text) for text in texts], images * slots if one else images[:slots]


def _tag_first(text: str) -> str:
    if IMAGE_TAG not in text:
        return text
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


def _split_tags(text: str) -> list[Part]:
    """Text with tags to parts; never an empty list, which would be an open turn."""
    parts: list[Part] = []
    for i, piece in enumerate(text.split(IMAGE_TAG)):
        parts += [IMAGE_TOKEN] if i else []
        parts += [piece] if piece else []
    return parts or [""]


def stand_alone(
    record: Mapping[str, Any], name: str, rounds: list[Round], turns: str, notes: Counter[str]
) -> bool:
    """Whether the rounds are independent turns: several, wanted, and all images come first.

    turns: one of TURNS, where the record has none of its own.
    """
    own = record.get("turns")
    if isinstance(own, str) and own not in TURNS:
        raise SampleError(f"sample {name}: `turns` is {own!r}, not {' or '.join(TURNS)}")
    wanted = own if isinstance(own, str) else turns  # a number there means nothing here
    if wanted != "independent" or len(rounds) < 2:
        return False
    later = [q for q, _ in rounds[1:]] + [a for _, a in rounds]
    if any(IMAGE_TOKEN in parts for parts in later):
        notes["trained as a conversation"] += 1
        return False
    return True


def alone_rounds(rounds: list[Round]) -> list[Round]:
    """Independent rounds, each as if it alone stood after the images, which all come first."""
    first, answer = rounds[0]
    slots = [i for i, part in enumerate(first) if part == IMAGE_TOKEN]
    front = first[: slots[-1] + 1] if slots else []
    return [(first, answer), *((_after(front, q), a) for q, a in rounds[1:])]


def _after(front: list[Part], question: list[Part]) -> list[Part]:
    """A later question, as it reads after the shared images."""
    if not front:
        return question
    text = "".join(part for part in question if isinstance(part, str)).strip()
    return [*front, f"\n{text}"] if text else front


# Ids ----------------------------------------------------------------------------------------------


def _tokenise(tokenizer: Tokenizer, version: TrainingVersion, rounds: Sequence[Round]):
    messages = [message for q, a in rounds for message in ((USER, q), (ASSISTANT, a))]
    return tokenise(tokenizer, training_pieces(version, messages))


# The same short question with the same answer is asked of many images.
@functools.lru_cache(8192)
def _alone(
    tokenizer: Tokenizer, version: TrainingVersion, question: tuple[Part], answer: tuple[Part]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = _tokenise(tokenizer, version, [(list(question), list(answer))])
    for array in arrays:
        array.flags.writeable = False
    return arrays


def _shared_prefix(alone: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> int:
    """How many ids all prompts begin with, up to the last slot or, without one, the question."""
    ids, _, messages = alone[0]
    slots = np.flatnonzero(ids == IMAGE_TOKEN)
    limit = int(slots[-1]) + 1 if len(slots) else int(np.argmax(messages >= 0))
    for other, *_ in alone[1:]:
        limit = min(limit, len(other))
        differs = np.flatnonzero(ids[:limit] != other[:limit])
        limit = int(differs[0]) if len(differs) else limit
    return limit
