"""Any supported image input to pixels, as the vision tower takes them.

Bit for bit as the original does it. `pixels_of` gives uint8, a quarter of the memory and traffic of
floats; `normalize` (or the model, on the device) makes floats of it. Sources: llava/mm_utils.py and
train.py of the original (expand2square), and transformers' CLIPImageProcessor: bicubic resize by
Pillow, centre crop, 1/255, mean and std.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_jax.config import LlavaConfig, PixelConfig, VisionConfig
from llava_jax.errors import ImageError
from llava_jax.images import resample
from llava_jax.images.decode import (
    DEFAULT_LIMITS,
    Limits,
    is_data_uri,
    open_image,
    open_pixels,
    refusal,
)

_BICUBIC = Image.Resampling.BICUBIC
_STRIP_PIXELS = 4 * 2**20  # how much of a padded picture exists at a time
_LARGEST_RESIZE = 16 * 2**20  # pixels of a resized picture before only its centre is made


def pixels_of(
    image: Any,
    config: LlavaConfig,
    *,
    name: str = "the image",
    exif: bool = False,
    limits: Limits = DEFAULT_LIMITS,
) -> np.ndarray:
    """uint8[S, S, 3], S the tower's size; float32[S, S, 3] is taken as normalised and left as it is.

    image: a path, encoded bytes or a binary file of them, a `data:` URI, a PIL image or
    uint8[H, W, 3] RGB. name: what errors call it, where it has no file name.
    exif: turn an encoded photograph upright. limits: of what is encoded. Raises ImageError.
    """
    size = config.vision.image_size
    if isinstance(image, np.ndarray):
        if image.dtype == np.float32 and image.shape == (size, size, 3):
            if not np.isfinite(image).all():
                raise ImageError(f"{name}: holds NaN or infinity", code="unknown_format")
            return image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype}{list(image.shape)}"
            raise ImageError(
                f"{name}: {what} is not uint8[H, W, 3]",
                code="unknown_format",
                fix="give RGB values from 0 to 255",
            )
        if 0 in image.shape:
            raise refusal("no_size", name)
        return to_pixels(Image.fromarray(image), config)
    if isinstance(image, str | Path | bytes | bytearray | memoryview) or hasattr(image, "read"):
        named = isinstance(image, Path) or (isinstance(image, str) and not is_data_uri(image))
        called = None if named else name
        if exif:
            return to_pixels(open_image(image, limits, called, exif=True), config)
        return to_pixels(open_pixels(image, limits, called), config)
    if not isinstance(image, Image.Image):
        what = f"an object of type {type(image).__name__} is not an image"
        raise ImageError(f"{name}: {what}", code="unknown_format")
    if 0 in image.size:
        raise refusal("no_size", name)
    try:
        rgb = image.convert("RGB")  # may have to read it from its file
    except Exception:  # Pillow's decoders raise errors of every kind
        raise refusal("damaged", name) from None
    return to_pixels(rgb, config)


def to_pixels(image: Image.Image | np.ndarray, config: LlavaConfig) -> np.ndarray:
    """uint8[H, W, 3] for the tower: an RGB picture padded to a square, or resized without padding and cropped.

    image: of `open_image` or `open_pixels`.
    `config.image_aspect_ratio` "pad" puts the picture in the middle of a square of the tower's mean
    colour; "square" is CLIP's own: shortest edge to the tower's size, centre crop. Where
    `config.vision.pixels` differs from CLIP's settings, it is done as CLIPImageProcessor does it.
    Memory is bounded by the picture's own, whatever its aspect ratio. Raises ImageError for a
    picture so long and thin that settings other than CLIP's would need far more.
    """
    vision, size = config.vision, config.vision.image_size
    rules = vision.pixels
    padded, usual = config.image_aspect_ratio == "pad", _like_clip(rules)
    if padded and usual and resample.is_worth(image):
        return resample.pad_resize(image, size, pad_color(vision))
    if isinstance(image, np.ndarray):
        image = Image.frombuffer("RGB", resample.size_of(image), image, "raw", "RGBX", 0, 1)
    if padded and usual:
        return np.asarray(_pad_resize(image, size, pad_color(vision)))
    if padded:
        image = _padded(image, pad_color(vision))
    if rules.resize:
        new = _resized(image.size, rules.resize_to or (size,))
        if new[0] * new[1] > _LARGEST_RESIZE:
            if not _like_clip(rules):
                what = f"the image would be resized to {new[0]}x{new[1]} pixels"
                raise ImageError(what, code="too_costly")
            if min(image.size) < size:
                return _resized_center(image, size, max(new))
        image = image.resize(new, Image.Resampling[rules.resample.upper()])
    pixels = np.asarray(image)  # [H, W, 3]
    return _center(_center(pixels, 0, size), 1, size) if rules.crop else pixels


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


def _like_clip(rules: PixelConfig) -> bool:
    """Whether the geometry is CLIP's; `rescale` and `normalize` concern only `normalize`."""
    usual = PixelConfig()
    names = ("resize", "resize_to", "crop", "resample")
    return all(getattr(rules, n) == getattr(usual, n) for n in names)


# Padding to a square -----------------------------------------------------------------------------


def _padded(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of `color`."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def _pad_resize(image: Image.Image, size: int, color: tuple[int, int, int]) -> Image.Image:
    """`_padded`, resized to size x size; a large square is never made.

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


# Resizing and cropping ---------------------------------------------------------------------------


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


def _resized_center(image: Image.Image, size: int, long: int) -> np.ndarray:
    """uint8[size, size, 3]: the centre of the picture resized to size x long, no more of it made."""
    start = (long - size) // 2
    if image.width > image.height:  # across first, as Pillow does when it enlarges
        across = resize_window(np.asarray(image), 1, long, start, size)
        return np.asarray(Image.fromarray(across).resize((size, size), _BICUBIC))
    across = np.asarray(image.resize((size, image.height), _BICUBIC))
    return resize_window(across, 0, long, start, size)


def resize_window(pixels: np.ndarray, axis: int, size: int, start: int, count: int) -> np.ndarray:
    """Rows `start` .. `start + count` of `pixels` resized bicubically to `size` along `axis`.

    pixels: uint8[H, W, C]. Returns uint8 with `count` in place of that axis's length, equal to the
    bit to Pillow's resize and then crop. Pillow can only make the whole resized image, of which a
    1x8192 picture would need 3.7 GB; and resize(box=...) rounds the box to float32.
    """
    moved = np.moveaxis(pixels, axis, 0)
    out = np.empty((count, *moved.shape[1:]), np.uint8)
    for i in range(count):
        first, weights = _weights(len(moved), size, start + i)
        taps = moved[first : first + len(weights)].astype(np.int64)
        total = np.tensordot(weights, taps, axes=1) + (1 << (resample.BITS - 1))
        out[i] = np.clip(total >> resample.BITS, 0, 255)
    return np.moveaxis(out, 0, axis)


def _weights(length: int, size: int, index: int) -> tuple[int, np.ndarray]:
    """(first input pixel, int64[taps] fixed-point weights) of output pixel `index`."""
    scale = length / size
    stretch = max(scale, 1.0)
    center = (index + 0.5) * scale
    first = max(int(center - resample.SUPPORT * stretch + 0.5), 0)
    last = min(int(center + resample.SUPPORT * stretch + 0.5), length)
    kernel = [_bicubic((x - center + 0.5) * (1.0 / stretch)) for x in range(first, last)]
    total = 0.0
    for w in kernel:  # in Pillow's order: the sum must round as it does there
        total += w
    fixed = [math.copysign(0.5, w) + w / total * (1 << resample.BITS) for w in kernel]
    return first, np.array([int(w) for w in fixed], np.int64)


def _bicubic(x: float, a: float = -0.5) -> float:
    x = abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    if x < 2.0:
        return (((x - 5) * x + 8) * x - 4) * a
    return 0.0
