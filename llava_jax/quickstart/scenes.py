"""Pictures for the quickstart: coloured shapes, at most one per corner, drawn with numpy.

A picture is a smooth dark background with one to three anti-aliased shapes. What stands where is
held as small integer arrays (`Scenes`), from which both the pixels (`render`) and the questions
(`llava_jax.quickstart.questions`) are made, so that an answer can never disagree with its picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

COLORS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")

_RGB = np.array(
    [(226, 58, 50), (52, 176, 82), (58, 116, 234), (245, 206, 58), (164, 82, 214), (238, 239, 242)],
    np.float32,
)
_MIN_SHAPES, _MAX_SHAPES = 1, 3
_CHUNK = 512  # pictures drawn at a time: the temporaries stay in the processor's cache


@dataclass(frozen=True)
class Scenes:
    """N scenes as arrays; axis 1 runs over the four corners in reading order.

    colors, shapes: int8[N, 4], index into COLORS and SHAPES, -1 where the corner is empty.
    geometry: float32[N, 4, 4], (x, y, radius, angle) of each shape; lengths in units of the
        picture's width and relative to the corner's middle, the angle in radians.
    tint: float32[N, 4, 3], what is added to the colour's RGB (0-255).
    background: float32[N, 3, 3], RGB (0-255) at the top left, top right and bottom left.
    """

    colors: np.ndarray
    shapes: np.ndarray
    geometry: np.ndarray
    tint: np.ndarray
    background: np.ndarray

    def __len__(self) -> int:
        return len(self.colors)

    def __getitem__(self, index: slice | np.ndarray | list[int]) -> Scenes:
        return Scenes(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def objects(self) -> Iterator[list[tuple[str, str, str]]]:
        """Per scene its (colour, shape, place) words in reading order."""
        for colors, shapes in zip(self.colors.tolist(), self.shapes.tolist()):
            yield [
                (COLORS[c], SHAPES[s], place)
                for c, s, place in zip(colors, shapes, PLACES)
                if c >= 0
            ]


def sample(count: int, seed: int) -> Scenes:
    """`count` random scenes; the same seed gives the same scenes, on every machine.

    No two shapes of a scene agree in both colour and kind, so that each can be named.
    """
    rng = np.random.default_rng([seed, 0x5CE7E])
    wanted = rng.integers(_MIN_SHAPES, _MAX_SHAPES + 1, count)
    rank = rng.random((count, 4)).argsort(axis=1).argsort(axis=1)
    filled = rank < wanted[:, None]
    geometry = np.stack(
        [
            rng.uniform(-0.055, 0.055, (count, 4)),
            rng.uniform(-0.055, 0.055, (count, 4)),
            rng.uniform(0.115, 0.18, (count, 4)),
            rng.uniform(-0.14, 0.14, (count, 4)),
        ],
        axis=-1,
    )
    looks = rng.random((count, len(COLORS) * len(SHAPES))).argsort(axis=1)[:, :4]
    middle = rng.uniform(18, 66, (count, 1, 3)) + rng.normal(0, 5, (count, 1, 1))
    return Scenes(
        colors=np.where(filled, looks // len(SHAPES), -1).astype(np.int8),
        shapes=np.where(filled, looks % len(SHAPES), -1).astype(np.int8),
        geometry=geometry.astype(np.float32),
        tint=rng.normal(0, 7, (count, 4, 3)).astype(np.float32),
        background=(middle + rng.normal(0, 9, (count, 3, 3))).clip(4, 90).astype(np.float32),
    )


def render(scenes: Scenes, size: int = 64) -> np.ndarray:
    """The pictures of `scenes`, uint8[N, size, size, 3]; `size` is even."""
    pictures = np.empty((len(scenes), size, size, 3), np.uint8)
    for start in range(0, len(scenes), _CHUNK):
        part = scenes[start : start + _CHUNK]
        pictures[start : start + len(part)] = _render_chunk(part, size)
    return pictures


def _render_chunk(scenes: Scenes, size: int) -> np.ndarray:
    ramp = ((np.arange(size) + 0.5) / size).astype(np.float32)
    origin, right, below = (scenes.background[:, i, None, None, :] for i in range(3))
    canvas = origin + (right - origin) * ramp[None, None, :, None]
    canvas = canvas + (below - origin) * ramp[None, :, None, None]

    half = size // 2
    for corner in range(4):
        rows = slice(corner // 2 * half, corner // 2 * half + half)
        columns = slice(corner % 2 * half, corner % 2 * half + half)
        for shape in range(len(SHAPES)):
            chosen = np.flatnonzero(scenes.shapes[:, corner] == shape)
            if not len(chosen):
                continue
            distance, height = _distance(shape, scenes.geometry[chosen, corner], half)
            cover = (0.5 - distance * size).clip(0, 1)[..., None]
            rgb = _RGB[scenes.colors[chosen, corner]] + scenes.tint[chosen, corner]
            lit = rgb[:, None, None, :] - 18.0 * height[..., None]  # light falls from above
            tile = canvas[chosen, rows, columns]
            canvas[chosen, rows, columns] = tile + cover * (lit - tile)
    return (canvas + 0.5).clip(0, 255).astype(np.uint8)


def _distance(shape: int, geometry: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance to the outline (negative inside) and height in it (-1 top, 1 bottom).

    geometry: float32[n, 4] as in `Scenes`. Both results are float32[n, half, half]; distances are
    in units of the picture's width. Outside the corners of a polygon it is a lower bound, which
    is enough for anti-aliasing.
    """
    axis = ((np.arange(half) + 0.5) / half - 0.5).astype(np.float32) / 2
    x0, y0, radius, angle = (geometry[:, i, None, None] for i in range(4))
    x, y = axis[None, None, :] - x0, axis[None, :, None] - y0
    height = np.broadcast_to(y / radius, (len(geometry), half, half)).clip(-1, 1)
    if SHAPES[shape] == "circle":
        return np.sqrt(x * x + y * y) - radius, height
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * x + sin * y, cos * y - sin * x
    if SHAPES[shape] == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius, height
    # An equilateral triangle: three half-planes, moved down so that its middle is the corner's.
    v = v - 0.18 * radius
    sides = np.maximum(v, 0.8660254 * np.abs(u) - 0.5 * v)
    return sides - 0.62 * radius, height
