"""JPEGs decoded by simplejpeg (extra `fast`), where its pixels are Pillow's to the bit.

Both call libjpeg-turbo with the same inverse DCT and upsampling; simplejpeg writes RGBX into an array at once,
which spares Pillow's buffers and a copy. Where the two might differ, or anything is odd, Pillow decodes.
"""

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, features

WORTH = 256 * 256
"""Pixels from which a picture is worth loading other decoders and compiled code for."""
_SAMPLINGS = {
    (1, 1),
    (2, 1),
    (2, 2),
}  # 4:4:4, 4:2:2, 4:2:0: of 4:4:0, versions of the library differ


def rgbx(image: Image.Image, data: bytes) -> np.ndarray | None:
    """uint8[H, W, 4], RGB and a byte of no meaning, of a JPEG that is opened and not decoded.

    data: all of its bytes. None where Pillow has to do it: another kind of picture, a small one, a damaged one.
    """
    if image.format != "JPEG" or image.mode != "RGB" or image.width * image.height < WORTH:
        return None
    # An unfinished progressive one is smoothed, not by all versions of the library alike.
    if image.info.get("progressive") or not _same_sampling(image) or not (library := _library()):
        return None
    try:
        pixels = library.decode_jpeg(data, "RGBX")  # strict: what is a warning to Pillow ends it
    except ValueError:
        return None
    if pixels.shape[:2] != (image.height, image.width):
        return None
    pixels.flags.writeable = False  # as a view of Pillow's bytes: compiled code knows one type
    return pixels


def _same_sampling(image: Image.Image) -> bool:
    layers = [(across, down) for _, across, down, _ in getattr(image, "layer", ())]
    return len(layers) == 3 and layers[0] in _SAMPLINGS and layers[1] == layers[2] == (1, 1)


@functools.cache
def _library() -> Any:
    """simplejpeg; None where it is not installed, or decodes otherwise than the Pillow that is."""
    if not features.check_feature("libjpeg_turbo"):
        return None
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg if _agree(simplejpeg) else None


def _agree(library: Any) -> bool:
    """Whether both give the same pixels here, of noise with each sampling: builds of the library differ."""
    noise = np.random.default_rng(0).integers(0, 256, (67, 53, 3), np.uint8)
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "JPEG", quality=90, subsampling=subsampling)
        ours = library.decode_jpeg(file.getvalue(), "RGBX")[..., :3]
        if not np.array_equal(ours, np.asarray(Image.open(file))):
            return False
    return True
