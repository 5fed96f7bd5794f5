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

from llava_jax.config import LlavaConfig, PixelConfig, VisionConfig
from llava_jax.errors import ImageError
from llava_jax.images.resample import resize_window

_BICUBIC = Image.Resampling.BICUBIC
_STRIP_PIXELS = 4 * 2**20  # how much of a padded picture exists at a time
_LARGEST_RESIZE = 16 * 2**20  # pixels of a resized picture before only its centre is made


def to_pixels(image: Image.Image, config: LlavaConfig) -> np.ndarray:
    """uint8[H, W, 3] for the tower: an RGB picture padded to a square, or plainly resized and cropped.

    `config.image_aspect_ratio` "pad" puts the picture in the middle of a square of the tower's mean
    colour; "square" is CLIP's own: shortest edge to the tower's size, centre crop. What
    `config.vision.pixels` has otherwise than CLIP is done as CLIPImageProcessor does it.
    Memory is bounded by the picture's own, whatever its aspect ratio. Raises ImageError for a
    picture so long and thin that other settings than CLIP's would need far more.
    """
    vision, size = config.vision, config.vision.image_size
    pads = config.image_aspect_ratio == "pad"
    if _like_clip(vision.pixels):
        if pads:
            return np.asarray(_pad_resize(image, size, pad_color(vision)))
        return _resize_crop(image, size)
    if pads:
        image = _padded(image, pad_color(vision))
    return _by_settings(image, vision.pixels, size)


def _like_clip(pixels: PixelConfig) -> bool:
    """Whether the geometry is CLIP's; `rescale` and `normalize` concern only `normalize`."""
    usual = PixelConfig()
    names = ("resize", "resize_to", "crop", "resample")
    return all(getattr(pixels, n) == getattr(usual, n) for n in names)


def _padded(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of `color`."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _by_settings(image: Image.Image, pixels: PixelConfig, size: int) -> np.ndarray:
    """uint8[size, size, 3]: resized and cropped by `pixels`."""
    if pixels.resize:
        new = _resized(image.size, pixels.resize_to or (size,))
        if new[0] * new[1] > _LARGEST_RESIZE:
            raise ImageError(
                f"the image would be resized to {new[0]}x{new[1]} pixels", code="too_costly"
            )
        image = image.resize(new, Image.Resampling[pixels.resample.upper()])
    array = np.asarray(image)
    if pixels.crop:
        array = _center(_center(array, 0, size), 1, size)
    return array


def _resized(size: tuple[int, int], to: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) of a picture of `size` resized to a shortest edge, or to (height, width)."""
    if len(to) == 2:
        return to[1], to[0]
    width, height = size
    long = int(to[0] * max(size) / min(size))
    return (to[0], long) if width <= height else (long, to[0])


def _center(array: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The middle `size` of an axis; what is missing is black, the odd row of it in front."""
    length = array.shape[axis]
    if length >= size:
        start = (length - size) // 2
        return array.take(range(start, start + size), axis)
    before = -(-(size - length) // 2)
    around = [(0, 0)] * array.ndim
    around[axis] = (before, size - length - before)
    return np.pad(array, around)


def pad_color(vision: VisionConfig) -> tuple[int, int, int]:
    """The colour around a padded picture: (122, 116, 104) for CLIP's mean."""
    r, g, b = (int(255 * m) for m in vision.image_mean)
    return r, g, b


def normalize(
    pixels: np.ndarray, mean: Sequence[float], std: Sequence[float], rescale: float = 1 / 255
) -> np.ndarray:
    """float32[..., H, W, 3] of uint8[..., H, W, 3]: (x / 255 - mean) / std, exact to CLIPImageProcessor.

    mean, std: three numbers each. Channels stay last; the original's are first.
    """
    table = _normalized(rescale, tuple(mean), tuple(std))
    return np.stack([table[c][pixels[..., c]] for c in range(3)], axis=-1)


def normalize_for(pixels: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """`normalize` with the settings of a tower."""
    return normalize(pixels, *vision.units, vision.pixels.rescale)


@lru_cache(maxsize=8)
def _normalized(rescale: float, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """float32[3, 256]: the value of every uint8 in every channel."""
    # The processor multiplies in double and rounds to single before it subtracts the mean.
    scaled = (np.arange(256, dtype=np.float64) * rescale).astype(np.float32)
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
        return _padded(image, color).resize((size, size), _BICUBIC)
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
