"""What decoding an image will cost, estimated from its header.

A pixel limit alone does not bound memory or time: a WebP takes six times the memory of a PNG with as
many pixels, a progressive JPEG can repeat thousands of passes over all of it, and Pillow decodes
run-length coded BMPs in Python, pixel by pixel. The figures were measured with Pillow 13.0.
"""

from __future__ import annotations

from PIL import Image

_RGB = 4  # Pillow keeps RGB as four bytes per pixel
_MODE_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "LA": 4, "PA": 4}  # others: 4
_RLE_WORK = 60  # a pixel decoded in Python costs as much as this many decoded in C


def decode_bytes(image: Image.Image, data: bytes, copies: int = 0) -> int:
    """Estimated peak memory, in bytes, of decoding an opened image and converting it to RGB.

    copies: further RGB-sized pictures that exist while the decoded one does.
    """
    mode = _MODE_BYTES.get(image.mode, _RGB)
    decoder = 0.0  # what the decoder holds beside the picture, bytes per pixel
    if image.format == "WEBP":
        decoder = 12.0  # two RGBA canvases of libwebp's animation decoder and a copy
    elif _is_progressive(image):
        decoder = _coefficient_bytes(image)
    elif _is_rle(image):
        decoder = 2.0
    convert = _RGB * ((image.mode != "RGB") + copies)
    return int(image.width * image.height * (mode + max(decoder, convert))) + len(data)


def decode_work(image: Image.Image, data: bytes) -> float:
    """Estimated time of decoding, counted in pixels of a plain decode."""
    pixels = image.width * image.height
    if _is_rle(image):
        return pixels * _RLE_WORK + len(data) * _RLE_WORK
    if _is_progressive(image):
        # Inside entropy-coded data 0xFF is never followed by 0xDA, so this counts the scans.
        return pixels * max(1, data.count(b"\xff\xda"))
    return pixels


def webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP from its first 30 bytes, None if they are not there.

    Source: the WebP container specification (VP8X), RFC 6386 9.1 (VP8) and the VP8L specification.
    """
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        return None
    if chunk == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if chunk == b"VP8 ":
        width, height = int.from_bytes(body[6:8], "little"), int.from_bytes(body[8:10], "little")
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None


def _is_progressive(image: Image.Image) -> bool:
    return image.format in ("JPEG", "MPO") and bool(image.info.get("progressive"))


def _is_rle(image: Image.Image) -> bool:
    tiles = getattr(image, "tile", ())
    return image.format == "BMP" and any(tile[0] == "bmp_rle" for tile in tiles)


def _coefficient_bytes(image: Image.Image) -> float:
    """Bytes per pixel of the coefficients that a progressive JPEG holds until its last scan."""
    layers = getattr(image, "layer", [])  # (id, horizontal sampling, vertical sampling, table)
    if not layers:
        return 6.0
    widest, tallest = max(c[1] for c in layers), max(c[2] for c in layers)
    return sum(2.0 * c[1] * c[2] / (widest * tallest or 1) for c in layers)
