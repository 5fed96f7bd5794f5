"""What a caption says, word by word: the labels and the stand-in images of the tiny pre-training.

The captions this reads are lists of "a COLOUR SHAPE", each perhaps followed by "at the PLACE", such
as "a red circle at the top left and a blue square at the bottom right".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.errors import SampleError

Phrase = tuple[str, str, str]
"""(colour, shape, place); the place is "" where the caption names none."""

_PHRASE = re.compile(r"an? (\w+) (\w+)(?: at the (\w+(?: \w+)*?))?(?:, | and |\.?$)")


def phrases(caption: str) -> list[Phrase]:
    """The things a caption names. Raises SampleError for a caption of another form."""
    found, end = [], 0
    for match in _PHRASE.finditer(caption):
        if match.start() != end:
            break
        found.append((match[1], match[2], match[3] or ""))
        end = match.end()
    if not found or end != len(caption):
        raise SampleError(f"caption {caption!r} is not a list of 'a COLOUR SHAPE [at the PLACE]'")
    return found


@dataclass(frozen=True)
class CaptionWords:
    """The words that the captions of a data set use, in alphabetical order."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    places: tuple[str, ...]

    @classmethod
    def of(cls, captions: Iterable[str]) -> CaptionWords:
        """Collects them from `captions`."""
        columns = zip(*{phrase for caption in captions for phrase in phrases(caption)})
        return cls(*(tuple(sorted(set(column))) for column in columns))

    def labels(self, captions: Sequence[str]) -> np.ndarray:
        """int32[N, places, 2]: colour and shape at each place, counted from 1; 0 is nothing."""
        out = np.zeros((len(captions), len(self.places), 2), np.int32)
        for row, caption in zip(out, captions):
            for color, shape, place in phrases(caption):
                row[self.places.index(place)] = (
                    1 + self.colors.index(color),
                    1 + self.shapes.index(shape),
                )
        return out
