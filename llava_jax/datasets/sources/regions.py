"""Questions about regions, as RefCOCO and Visual Genome both ask them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llava_jax.datasets.boxes import Box, box_text, to_padded
from llava_jax.datasets.prompts import BOX, REGION
from llava_jax.datasets.source import sentence


def region_pair(
    text: str, box: Sequence[float], width: int, height: int, rng: random.Random
) -> tuple[str, str] | None:
    """One of the two questions, drawn: describe this box, or give the box of this text.

    box: x1, y1, x2, y2 in pixels. The box is written on the padded picture (see `boxes`). A text in
    a question is as the owner has it, as an answer it is a sentence, as in the published file. None
    for a box without an area inside the picture, or an empty text.
    """
    text = text.strip().rstrip(".").rstrip()
    padded: Box = to_padded(box, width, height)
    if not (text and padded[0] < padded[2] and padded[1] < padded[3]):  # NaN is not less
        return None
    written = box_text(padded)
    if rng.random() < 0.5:
        return REGION.format(written), sentence(text)
    return BOX.format(text), written
