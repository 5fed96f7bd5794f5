"""Boxes between the pixels of a picture and the numbers that are trained.

Four ways to write one box [x1, y1, x2, y2], corners of its top left and bottom right:
- pixels of the picture;
- x, y, width, height in pixels, as COCO and Visual Genome have them;
- fractions of the square that the picture is padded to before the tower sees it: what LLaVA-1.5 was
  trained on (LLaVA issue 606), two decimals, such as "[0.28, 0.34, 0.4, 0.71]";
- whole numbers of 0 to 1000 of the picture itself, as Qwen-VL and InternVL write them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llava_jax.errors import SampleError

Box = tuple[float, float, float, float]
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


def from_corner(box: Sequence[float]) -> Box:
    """x, y, width, height to x1, y1, x2, y2."""
    x, y, width, height = box
    return x, y, x + width, y + height


def to_padded(box: Sequence[float], width: int, height: int) -> Box:
    """Pixels to fractions of the padded square; what lies outside of the picture is cut off.

    The margins are those of expand2square (llava/mm_utils.py): half of the difference, rounded down,
    on the left or on top. Raises SampleError for a picture without a size.
    """
    side, left, top = _square(width, height)
    x1, y1, x2, y2 = box
    return (
        (min(max(x1, 0), width) + left) / side,
        (min(max(y1, 0), height) + top) / side,
        (min(max(x2, 0), width) + left) / side,
        (min(max(y2, 0), height) + top) / side,
    )


def from_padded(box: Sequence[float], width: int, height: int) -> Box:
    """Fractions of the padded square to pixels, cut off at the picture's borders."""
    side, left, top = _square(width, height)
    x1, y1, x2, y2 = (v * side for v in box)
    return (
        min(max(x1 - left, 0.0), width),
        min(max(y1 - top, 0.0), height),
        min(max(x2 - left, 0.0), width),
        min(max(y2 - top, 0.0), height),
    )


def to_thousand(box: Sequence[float], width: int, height: int) -> tuple[int, int, int, int]:
    """Pixels to whole numbers of 0 to 1000 of the picture, which is not padded."""
    _square(width, height)
    x1, y1, x2, y2 = (
        min(max(round(v / size * 1000), 0), 1000)
        for v, size in zip(box, (width, height, width, height))
    )
    return x1, y1, x2, y2


def from_thousand(box: Sequence[float], width: int, height: int) -> Box:
    """Numbers of 0 to 1000 of the picture to pixels."""
    x1, y1, x2, y2 = (v / 1000 * size for v, size in zip(box, (width, height, width, height)))
    return x1, y1, x2, y2


def box_text(box: Sequence[float]) -> str:
    """Fractions as the published data writes them: two decimals, without a zero at their end."""
    return f"[{', '.join(str(round(float(v), 2)) for v in box)}]"


def read_box(text: str) -> Box | None:
    """The first box that is written in a text; None where there is none."""
    if not (found := _BOX.search(text)):
        return None
    x1, y1, x2, y2 = map(float, found.groups())
    return x1, y1, x2, y2


def _square(width: int, height: int) -> tuple[int, int, int]:
    """(side, left margin, top margin) of the square that a picture is padded to."""
    if width <= 0 or height <= 0:
        raise SampleError(f"a picture of {width} x {height} pixels has no boxes")
    side = max(width, height)
    return side, (side - width) // 2, (side - height) // 2
