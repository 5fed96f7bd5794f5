"""`Example`: what a training record or a question becomes once it is tokenised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from llava_jax.errors import LlavaError, PromptError, SampleError
from llava_jax.text.constants import IGNORE, IMAGE_TOKEN

TRUNCATED = "truncated"
"""The note of an example that lost tokens to the length limit."""
LEFT_OUT = "turns left out"
"""The note of an example that lost independent turns to it."""


@dataclass(frozen=True, eq=False)
class Example:
    """A training sample, or a question without labels; `llava_jax.batch.collate` makes arrays of it.

    ids: int32[t], IMAGE_TOKEN (-200) at each image slot.
    images: one per slot, in slot order: whatever the text gave (a path, a URL, a PIL image, ...);
        for `collate`, pixels uint8[S, S, 3], or float32 that is already normalised.
    labels: int32[t], the id itself where trained, IGNORE (-100) elsewhere; None in a question.
    turns: int32[t]; 0 = seen by the whole example, n = seen by turn n alone (independent questions
        after a shared prefix). None in an ordinary conversation.
    id: what errors call it. notes: what was done to it, and how often; see ExampleMaker.

    Raises SampleError (PromptError without labels) where slots and images differ in number, and
    PromptError for a question without ids.
    """

    ids: np.ndarray
    images: tuple[Any, ...] = ()
    labels: np.ndarray | None = None
    turns: np.ndarray | None = None
    id: str = ""
    notes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "ids", np.asarray(self.ids, np.int32).reshape(-1))
        object.__setattr__(self, "images", tuple(self.images))
        for name in ("labels", "turns"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, np.asarray(value, np.int32))
        if self.labels is None and not len(self.ids):
            raise PromptError("the prompt is empty")
        slots = int(np.count_nonzero(self.ids == IMAGE_TOKEN))
        if slots != len(self.images):
            raise self._error(f"{slots} image slots for {len(self.images)} images")

    def _error(self, what: str) -> LlavaError:
        if self.labels is None:
            return PromptError(f"the prompt has {what}")
        return SampleError(f"sample {self.id}: {what}")

    def length(self, image_tokens: int) -> int:
        """Positions in the model, counting `image_tokens` features for each slot."""
        return len(self.ids) + len(self.images) * (image_tokens - 1)

    @cached_property
    def target_count(self) -> int:
        """How many tokens are trained; the first one never is, because nothing predicts it."""
        if self.labels is None:
            return 0
        trained = (self.labels != IGNORE) & (self.ids != IMAGE_TOKEN)
        return int(np.count_nonzero(trained[1:]))

    def select(self, keep: np.ndarray) -> Example:
        """The example with the ids where bool[t] `keep` is True, and the images of their slots."""
        shown = keep[self.ids == IMAGE_TOKEN]
        return replace(
            self,
            ids=self.ids[keep],
            images=tuple(image for image, yes in zip(self.images, shown) if yes),
            labels=None if self.labels is None else self.labels[keep],
            turns=None if self.turns is None else self.turns[keep],
        )

    def truncated(self, max_length: int | None, image_tokens: int) -> Example:
        """The part that fits into `max_length` positions; an image fits as a whole or not at all.

        An example that lost tokens has the note TRUNCATED. None is no limit.
        """
        if max_length is None or self.length(image_tokens) <= max_length:
            return self
        ends = np.cumsum(np.where(self.ids == IMAGE_TOKEN, image_tokens, 1))
        cut = self.select(ends <= max_length)
        return replace(cut, notes={**cut.notes, TRUNCATED: 1})


def sample_turns(example: Example, count: int, rng: np.random.RandomState) -> Example:
    """The example with `count` of its independent turns, in their order; all if it has no more."""
    turns = example.turns
    total = 0 if turns is None else int(turns.max(initial=0))
    if turns is None or not count or total <= count:
        return example
    drawn = np.sort(rng.permutation(total)[:count]) + 1
    number = np.zeros(total + 1, np.int32)  # of each old turn: its new number
    number[drawn] = np.arange(1, count + 1)
    keep = (turns == 0) | np.isin(turns, drawn)
    return replace(example.select(keep), turns=number[turns[keep]])
