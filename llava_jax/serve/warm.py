"""Whatever is compiled or imported on first use is used before the first request.

Requests of each shape are asked of the engine, and a photograph is read.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava_jax.errors import ImageError
from llava_jax.generate import Engine, Job
from llava_jax.images.jpeg import WORTH
from llava_jax.settings import SamplingSettings
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.example import Example

if TYPE_CHECKING:
    from llava_jax.config import LlavaConfig
    from llava_jax.model import LlavaModel

_SHORT = SamplingSettings(max_new_tokens=2)


def warm_pictures(model: LlavaModel) -> None:
    """Reads a picture as large as those for which decoding and resizing have compiled loops."""
    side, file = math.isqrt(WORTH), io.BytesIO()
    Image.new("RGB", (side + 1, side)).save(file, "JPEG")
    # The limits are the operator's, and may be below any picture.
    with contextlib.suppress(ImageError):
        model.pixels(file.getvalue(), exif=True)


def warm_up(engine: Engine, stopping: Callable[[], bool]) -> bool:
    """Runs every shape of `read`, and `see`, `mark`, `copy` and `decode`.

    stopping: asked between two requests. False where it broke off.
    """
    g, context = engine.generator, engine.context
    shapes = [*range(g.step, g.chunk, g.step), g.chunk]
    lengths = [min(n, context - 1) for n in shapes if n - g.step < context - 1]
    # Each of its own token: what an earlier one has read would be taken over, and not be read.
    jobs = [Job(_prompt(g.config, n, i), _SHORT, bias={0: 0.0}) for i, n in enumerate(lengths)]
    if g.config.image_tokens + 1 < context:
        jobs.append(Job(_prompt(g.config, 1, 0, images=1), _SHORT))
    for job in jobs:  # one by one: prompts of one shape would be read together
        engine.run([engine.submit(job)])
        if stopping():
            return False
    whole = g.chunk + 1
    if engine.slots > 1 and whole + 2 < context:
        # The second finds its first chunk in a slot that is taken, and has to copy it.
        never = dict.fromkeys(g.eos_ids, -100.0)  # its answer must not end by itself
        first, second = (Job(_prompt(g.config, whole, 0), _SHORT, bias=never) for _ in range(2))
        first.settings = SamplingSettings()
        engine.submit(first)
        while not first.ids:
            engine.step()
        if not first.done:
            engine.run([engine.submit(second)])
        engine.cancel(first)
    engine.counts.clear()  # of what clients ask from now on
    return True


def _prompt(config: LlavaConfig, tokens: int, token: int, images: int = 0) -> Example:
    size = config.vision.image_size
    ids = np.full(tokens + images, token, np.int32)
    ids[:images] = IMAGE_TOKEN
    return Example(ids, (np.zeros((size, size, 3), np.uint8),) * images)
