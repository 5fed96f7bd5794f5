"""From a picture to the pixels that the vision tower takes, bit for bit as the original does it.

`to_pixels` gives uint8, a quarter of the memory and traffic of floats; `normalize` (or the model, on
the device) makes floats of it. Sources: llava/mm_utils.py and train.py of the original (expand2square),
and transformers' CLIPImageProcessor: bicubic resize by Pillow, centre crop, 1/255, mean and std.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.images.resample import resize_window

_BICUBIC = Image.Resampling.BICUBIC
_STRIP_PIXELS = 4 * 2**20  # how much of a padded picture exists at a time
_LARGEST_RESIZE = 16 * 2**20  # pixels of a resized picture before only its centre is made
_RESCALE = 0.00392156862745098  # CLIPImageProcessor's rescale_factor


def to_pixels(image: Image.Image, config: LlavaConfig) -> np.ndarray:
    """uint8[H, W, 3] for the tower: an RGB picture padded to a square, or plainly resized and cropped.

    `config.image_aspect_ratio` "pad" puts the picture in the middle of a square of the tower's mean
    colour; "square" is CLIP's own: shortest edge to the tower's size, centre crop.
    Memory is bounded by the picture's own, whatever its aspect ratio.
    """
    size = config.vision.image_size
    if config.image_aspect_ratio == "pad":
        return np.asarray(_pad_resize(image, size, pad_color(config.vision)))
    return _resize_crop(image, size)


def pad_color(vision: VisionConfig) -> tuple[int, int, int]:
    """The colour around a padded picture: (122, 116, 104) for CLIP's mean."""
    r, g, b = (int(255 * m) for m in vision.image_mean)
    return r, g, b


def normalize(pixels: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """float32[..., H, W, 3] of uint8[..., H, W, 3]: (x / 255 - mean) / std, exact to CLIPImageProcessor.

    mean, std: three numbers each. Channels stay last; the original's are first.
    """
    table = _normalized(tuple(mean), tuple(std))
    return np.stack([table[c][pixels[..., c]] for c in range(3)], axis=-1)


@lru_cache(maxsize=8)
def _normalized(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32[3, 256]: the value of every uint8 in every channel."""
    # The processor multiplies in double and rounds to single before it subtracts the mean.
    scaled = (np.arange(256, dtype=np.float64) * _RESCALE).astype(np.float32)
    mean32, std32 = np.array(mean, np.float32), np.array(std, np.float32)
    return (scaled[None] - mean32[:, None]) / std32[:, None]


def _pad_resize(image: Image.Image, size: int, color: tuple[int, int, int]) -> Image.Image:
    """The picture centred on a square of `color`, resized to size x size, the square never made.

    Padding 1x8192 would take 268 MB. Pillow resizes across first and then down, so a square can be
    resized across strip by strip, and rows of one colour stay that colour.
    """
    width, height = image.size
    side = max(width, height)
    if side * side <= _STRIP_PIXELS:
        square = Image.new("RGB", (side, side), color)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        return square.resize((size, size), _BICUBIC)
    narrow = Image.new("RGB", (size, side), color)
    if width > height:
        narrow.paste(image.resize((size, height), _BICUBIC), (0, (side - height) // 2))
    else:
        rows = max(1, _STRIP_PIXELS // side)
        for top in range(0, side, rows):
            strip = Image.new("RGB", (side, min(rows, side - top)), color)
            part = image.crop((0, top, width, top + strip.height))
            strip.paste(part, ((side - width) // 2, 0))
            narrow.paste(strip.resize((size, strip.height), _BICUBIC), (0, top))
    return narrow.resize((size, size), _BICUBIC)


def _resize_crop(image: Image.Image, size: int) -> np.ndarray:
    """uint8[size, size, 3]: the shortest edge resized to `size`, then the centre."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long = int(size * long / short)
    start = (long - size) // 2
    if long * size <= _LARGEST_RESIZE or short >= size:
        new = (long, size) if width > height else (size, long)
        left, top = (start, 0) if width > height else (0, start)
        return np.asarray(image.resize(new, _BICUBIC).crop((left, top, left + size, top + size)))
    if width > height:  # across first, as Pillow does when it enlarges
        across = resize_window(np.asarray(image), 1, long, start, size)
        return np.asarray(Image.fromarray(across).resize((size, size), _BICUBIC))
    across = np.asarray(image.resize((size, height), _BICUBIC))
    return resize_window(across, 0, long, start, size)
