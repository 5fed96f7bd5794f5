"""A LLaVA training record to an Example: token ids, labels, and the images in slot order.

A record is {"id", "image"?: path or list of paths, "turns"?: one of TURNS, "conversations": [{"from":
"human" | "gpt", "value"}]}, and `<image>` in a record that has images is a slot. Everything else in it
is plain text, `</s>` included. `compat` gives the original's ids and labels instead: see `text.compat`.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.compat import compat_sample
from llava_jax.text.constants import IGNORE, IMAGE_TAG, IMAGE_TOKEN
from llava_jax.text.conversation import ASSISTANT, USER
from llava_jax.text.example import TRUNCATED, Example
from llava_jax.text.labels import Labelled, label, training_version
from llava_jax.text.prompt import slot_parts
from llava_jax.text.records import check_turns, read_images, read_turns, sample_name, tag_note
from llava_jax.text.tokenizer import Part, Tokenizer

TURNS = ("conversation", "independent")

Round = tuple[list[Part], list[Part]]
"""A question and its answer."""


class ExampleMaker:
    """Makes Examples of records, all with the same tokenizer and settings.

    version: a `--version` of the original: "v1" for LLaVA-1.5, "plain" for stage 1, ...
    max_length: positions after image features went in; what is longer is cut, never inside the
        features of an image. None: no limit.
    image_tokens: features per image (`LlavaConfig.image_tokens`).
    turns: "conversation", or "independent": every question of a record is trained as if it were
        alone with the image; the text in front of it and the image are shared by all. A record's own
        "turns" goes before it, so that one file may hold both.
    compat: the original's ids and labels. Tags collapse to one per turn, a sample that it gives up
        has no labels, and text samples are cut at max_length tokens.

    `notes` counts what was done to samples: "truncated" (lost tokens), "turns left out" (did not
    fit), "empty answers", "unanswered question", "leading answer", "image without tag" (not shown),
    "tag without image" (trained as text), "more tags than images" (one image serves them all),
    "kept as a conversation" (independent turns are not possible), "mismatch" (compat: given up).
    An Example names its own, so that they can be counted by sample.
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
        caption = self.version.kind == "plain"
        self._slot = slot_parts(tokenizer, self.version.template, use_im_start_end and not caption)
        self.notes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __call__(self, record: Mapping[str, Any], index: int | None = None) -> Example:
        """The Example of a record; `index` names it in errors where it has no id.

        Raises SampleError, with the sample's id, if it is malformed or leaves nothing to train.
        """
        name = sample_name(record, index)
        notes: Counter[str] = Counter()
        turns, images = read_turns(record, name), read_images(record, name)
        tags = sum(text.count(IMAGE_TAG) for _, text in turns)
        if note := tag_note(tags, len(images), caption=self.version.kind == "plain"):
            notes[note] += 1
        if self.compat:
            example = self._compat(record, name, images, notes)
        else:
            rounds, images = self._rounds(turns, images, name, notes)
            alone = self._turns_of(record, name) == "independent"
            example = self._own(rounds, images, name, notes, alone)
            example = example.truncated(self.max_length, self.image_tokens)
            check_trained(example, self.max_length)
        if TRUNCATED in example.notes:
            notes[TRUNCATED] += 1
        with self._lock:  # threads share a maker
            self.notes.update(notes)
        return replace(example, notes=tuple(notes))

    def _own(
        self,
        rounds: list[Round],
        images: list[str],
        name: str,
        notes: Counter[str],
        alone: bool,
    ) -> Example:
        """alone: the rounds are independent, if they can be."""
        if alone and self.version.kind != "plain" and len(rounds) > 1:
            if all(IMAGE_TOKEN not in q for q, _ in rounds[1:]) and all(
                IMAGE_TOKEN not in a for _, a in rounds
            ):
                return self._independent(name, rounds, images, notes)
            notes["kept as a conversation"] += 1
        labelled = self._label(rounds)
        return Example(labelled.ids, images, labelled.labels, id=name)

    def _turns_of(self, record: Mapping[str, Any], name: str) -> str:
        own = record.get("turns")
        if not isinstance(own, str):  # absent, or some number that means nothing here
            return self.turns
        if own not in TURNS:
            raise SampleError(f"sample {name}: `turns` is {own!r}, not {' or '.join(TURNS)}")
        return own

    # Reading the turns -------------------------------------------------------------------------

    def _rounds(
        self, turns: list[tuple[int, str]], images: list[str], name: str, notes: Counter[str]
    ) -> tuple[list[Round], list[str]]:
        """The rounds that have an answer to train, and one image per slot in them.

        A question without an answer is left out; its images move to the next question.
        """
        caption = self.version.kind == "plain"
        check_turns(turns, images, name, caption=caption)
        if turns[0][0] == ASSISTANT:
            notes["leading answer"] += 1
            turns = turns[1:]
        messages, images = self._place_images([text for _, text in turns], images)
        if len(turns) % 2:
            notes["unanswered question"] += 1
        rounds: list[Round] = []
        waiting: list[Part] = []
        for question, answer in zip(messages[::2], messages[1::2]):
            if any(part.strip() if isinstance(part, str) else True for part in answer):
                rounds.append((waiting + question, answer))
                waiting = []
            else:
                notes["empty answers"] += 1
                waiting += [*self._slot, "\n"] * question.count(IMAGE_TOKEN)
        if not rounds:
            raise SampleError(f"sample {name}: no turn has an answer to train")
        slots = sum(part == IMAGE_TOKEN for pair in rounds for parts in pair for part in parts)
        return rounds, images[:slots]

    def _place_images(
        self, texts: list[str], images: list[str]
    ) -> tuple[list[list[Part]], list[str]]:
        """Turns `<image>` tags into slots, and says which image each slot shows.

        A single tag of a turn goes to its front, as in the original; several keep their places.
        One image serves all tags of a record, and several tags in one turn are then one slot.
        """
        if not images:
            return [[text] for text in texts], []
        if self.version.kind == "plain" and IMAGE_TAG not in texts[0]:
            texts = [IMAGE_TAG * len(images), *texts[1:]]  # its instruction is discarded anyway
        texts = [
            _tag_first(text) if len(images) == 1 or text.count(IMAGE_TAG) == 1 else text
            for text in texts
        ]
        messages = [self._split_tags(text) for text in texts]
        slots = sum(text.count(IMAGE_TAG) for text in texts)
        return messages, images * slots if len(images) == 1 else images[:slots]

    def _split_tags(self, text: str) -> list[Part]:
        """Text with tags to parts; never an empty list, which would be an open turn."""
        parts: list[Part] = []
        for i, piece in enumerate(text.split(IMAGE_TAG)):
            parts += self._slot if i else []
            parts += [piece] if piece else []
        return parts or [""]

    # Ids and labels ----------------------------------------------------------------------------

    def _label(self, rounds: Sequence[Round]) -> Labelled:
        messages = [message for q, a in rounds for message in ((USER, q), (ASSISTANT, a))]
        return label(self.tokenizer, self.version, messages)

    def _independent(
        self, name: str, rounds: list[Round], images: list[str], notes: Counter[str]
    ) -> Example:
        """Every round behind the prefix that all of them share, each as if it were the only one."""
        front = self._front(rounds[0][0])
        singles = [self._label(rounds[:1])]
        singles += [self._label([(_behind(front, q), a)]) for q, a in rounds[1:]]
        start = _shared_prefix(singles)
        ids, labels, turns = singles[0].ids[:start], singles[0].labels[:start], [0] * start
        length = start + len(images) * (self.image_tokens - 1)  # no slot is after the prefix
        for n, single in enumerate(singles, 1):
            length += len(single.ids) - start
            if n > 1 and self.max_length is not None and length > self.max_length:
                length -= len(single.ids) - start
                notes["turns left out"] += 1  # half a question is worth nothing, but for the first
                continue
            ids, labels = ids + single.ids[start:], labels + single.labels[start:]
            turns = turns + [n] * (len(ids) - len(turns))
        return Example(ids, images, labels, turns, name)

    def _front(self, question: list[Part]) -> list[Part]:
        """The part of a question up to its last image slot; empty without one."""
        at = [i for i, part in enumerate(question) if part == IMAGE_TOKEN]
        behind = len(self._slot) - self._slot.index(IMAGE_TOKEN)  # with what closes the slot
        return question[: at[-1] + behind] if at else []

    # The original ------------------------------------------------------------------------------

    def _compat(
        self, record: Mapping[str, Any], name: str, images: list[str], notes: Counter[str]
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
        ids, labels = sample.ids.tolist(), sample.labels.tolist()
        labels = [IGNORE if x == IMAGE_TOKEN else x for x in labels]
        slots = ids.count(IMAGE_TOKEN)
        images = images * slots if len(images) == 1 else images[:slots]
        example = Example(ids, images, labels, id=name)
        example = example.truncated(self.max_length, self.image_tokens)
        # The original takes every padding id for padding, an `<unk>` in the text too, and drops it
        # before image features go in (the attention mask of train.py and llava_arch.py).
        return example.select(example.ids != self.tokenizer.pad_id)


def check_trained(example: Example, max_length: int | None) -> None:
    """Raises SampleError if nothing of an example is trained, say because of its length."""
    if not example.target_count:
        why = f"within its first {max_length} tokens" if TRUNCATED in example.notes else "in it"
        raise SampleError(f"sample {example.id}: there is nothing to train {why}")


def _tag_first(text: str) -> str:
    if IMAGE_TAG not in text:
        return text
    return f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()


def _behind(front: list[Part], question: list[Part]) -> list[Part]:
    """A question as it reads behind the images of the first one."""
    text = "".join(part for part in question if isinstance(part, str))
    if not front:
        return question
    text = text.strip()
    return [*front, f"\n{text}"] if text else front


def _shared_prefix(singles: Sequence[Labelled]) -> int:
    """How many ids all prompts begin with, up to the last slot or, without one, the question."""
    first = singles[0]
    if IMAGE_TOKEN in first.ids:
        limit = len(first.ids) - first.ids[::-1].index(IMAGE_TOKEN)
    else:
        limit = next((i for i, m in enumerate(first.message) if m >= 0), 0)
    for single in singles[1:]:
        pairs = zip(first.ids[:limit], single.ids)
        limit = next((i for i, (a, b) in enumerate(pairs) if a != b), min(limit, len(single.ids)))
    return limit
