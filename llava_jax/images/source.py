"""Whatever a caller may hold of an image, as the tower's pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from llava_jax.config import LlavaConfig
from llava_jax.errors import ImageError
from llava_jax.images.gate import (
    CODES,
    DEFAULT_LIMITS,
    Limits,
    decode_data_uri,
    is_data_uri,
    open_image,
)
from llava_jax.images.preprocess import to_pixels


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
            return image
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            what = f"{image.dtype}{list(image.shape)}"
            raise ImageError(
                f"{name}: {what} is not uint8[H, W, 3]",
                code="unknown_format",
                fix="give RGB values from 0 to 255",
            )
        return to_pixels(_as_picture(image, name), config)
    if isinstance(image, str) and is_data_uri(image):
        image = decode_data_uri(image, limits, name)
    if isinstance(image, str | Path):
        return to_pixels(open_image(image, limits, exif=exif), config)
    if isinstance(image, bytes | bytearray | memoryview) or hasattr(image, "read"):
        data: Any = image
        return to_pixels(open_image(data, limits, name, exif=exif), config)
    if hasattr(image, "convert"):  # PIL's
        return to_pixels(_as_picture(image, name), config)
    raise ImageError(f"{name}: a {type(image).__name__} is not an image", code="unknown_format")


def _as_picture(image: Any, name: str) -> PIL.Image.Image:
    """RGB of a PIL image, which may still be unread in its file, or of uint8[H, W, 3].

    Raises ImageError when it has no pixels or cannot be decoded.
    """
    if 0 in (image.shape if isinstance(image, np.ndarray) else image.size):
        raise ImageError(f"{name}: {CODES['no_size']}", code="no_size")
    if isinstance(image, np.ndarray):
        return PIL.Image.fromarray(image)
    try:
        return image.convert("RGB")
    except Exception:  # Pillow's decoders raise errors of every kind
        raise ImageError(f"{name}: {CODES['damaged']}", code="damaged") from None
