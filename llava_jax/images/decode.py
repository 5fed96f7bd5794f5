"""The one gate that every image passes, whether it comes from a training folder or from a stranger.

The format is determined by content and must be on an allowlist; sizes and decoding costs are checked
from the header before anything is decoded; decoding is strict; every refusal is an `ImageError` with a
fixed code and text, so no address, path or library message can reach a reply.

As in the original (llava/train/train.py, mm_utils.py): the first frame, `convert("RGB")` with alpha
dropped, and no EXIF rotation, which a chat may ask for.
"""

from __future__ import annotations

import base64
import binascii
import re
import stat
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

import numpy as np
from PIL import Image

from llava_jax.errors import ConfigError, ImageError
from llava_jax.images import jpeg
from llava_jax.images.cost import decode_bytes, decode_work, webp_size
from llava_jax.images.png import without_long_texts
from llava_jax.settings import ImageLimits, check_all, rows
from llava_jax.util import expanded

CODES = {
    "address": "addresses are not fetched",
    "not_found": "the file does not exist",
    "not_a_file": "this is not a regular file",
    "unreadable": "the file cannot be read",
    "empty": "there are no bytes",
    "too_many_bytes": "the file is larger than allowed",
    "unknown_format": "the data is not an image of an accepted format",
    "no_size": "width or height is zero",
    "too_many_pixels": "the image has more pixels than allowed",
    "side_too_long": "the image is longer on one side than allowed",
    "too_costly": "decoding the image would take more memory or time than allowed",
    "damaged": "the image data is damaged or cut off",
    "bad_data_uri": "this is not a base64 data URI of an image",
    "bad_base64": "the base64 text is malformed",
}
"""Every way to be refused: code -> the fixed text that a user sees."""


class Readable(Protocol):
    """An open binary file, or whatever else has bytes to read."""

    def read(self, size: int, /) -> bytes: ...


Source = str | Path | bytes | bytearray | memoryview | Readable


@dataclass(frozen=True, kw_only=True)
class Limits(ImageLimits):
    """What is decoded: llava_jax.settings.ImageLimits, and the formats by Pillow's names.

    Raises ConfigError for a limit that is not a positive number, or max_pixels above what Pillow opens.
    """

    formats: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "GIF", "BMP")

    def __post_init__(self):
        check_all(LIMITS, {name: getattr(self, name) for name in LIMITS})
        if not (
            isinstance(self.formats, tuple | list) and all(isinstance(f, str) for f in self.formats)
        ):
            raise ConfigError(f"formats is {self.formats!r}, not a tuple of names such as 'PNG'")
        if self.max_pixels > (Image.MAX_IMAGE_PIXELS or LIMITS["max_pixels"].high):
            # A limit above Pillow's own is deliberate, so its warning says nothing.
            warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

    def refusal(self, code: str, name: str, limit: str) -> ImageError:
        """The refusal of an image that is beyond `limit`; its fix names the limit."""
        return refusal(code, name, fix=f"the limit is {limit} {getattr(self, limit):,.0f}")


LIMITS = rows(ImageLimits)
DEFAULT_LIMITS = Limits()

# Pillow needs only these to tell the formats apart; a file that starts otherwise never reaches a parser.
_MAGIC = {
    "JPEG": re.compile(rb"\xff\xd8\xff"),
    "PNG": re.compile(rb"\x89PNG\r\n\x1a\n"),
    "WEBP": re.compile(rb"RIFF....WEBP", re.DOTALL),
    "GIF": re.compile(rb"GIF8[79]a"),
    "BMP": re.compile(rb"BM"),
}
_DATA_URI = re.compile(r"data:image/[a-z0-9.+-]+((?:;[a-z0-9-]+=[^;,]*)*);base64,", re.IGNORECASE)
# Two letters at least, so that C:// is a drive. A Path has lost one of the slashes.
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|https?:/", re.IGNORECASE)
_LOCAL_URI = re.compile(r"file:(?://(?:localhost)?)?(?=/(?!/))", re.IGNORECASE)
_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    source: Source,
    limits: Limits = DEFAULT_LIMITS,
    name: str | None = None,
    *,
    exif: bool = False,
) -> Image.Image:
    """Decodes one image to RGB, or raises ImageError with a code of CODES.

    source: a file name (see `local_path`), a `data:` URI, the encoded bytes, or a binary file object.
    name: what error messages call the image; by default the last part of the file name.
    exif: turn the picture as its EXIF orientation says (the original does not).
    """
    image, _, name = _opened(source, limits, name, copies=int(exif))
    return _decoded(image, name, exif)


def open_pixels(
    source: Source, limits: Limits = DEFAULT_LIMITS, name: str | None = None
) -> Image.Image | np.ndarray:
    """As `open_image`, but what `llava_jax.images.jpeg` can decode comes as uint8[H, W, 4], RGBX."""
    image, data, name = _opened(source, limits, name)
    found = jpeg.rgbx(image, data)
    return _decoded(image, name) if found is None else found


def _opened(
    source: Source, limits: Limits, name: str | None, copies: int = 0
) -> tuple[Image.Image, bytes, str]:
    """(an image that passed the gate and is not decoded yet, its bytes, what messages call it)."""
    if source == "":
        raise refusal("not_found", name or "''", fix="an empty file name was given")
    if isinstance(source, str) and is_data_uri(source):
        source = decode_data_uri(source, limits, name or "image")
    elif isinstance(source, (str, Path)):
        source = local_path(source, name)
        name = name or source.name
    name = name or "image"
    data = read_image(source, limits, name)
    kind = format_of(data, limits.formats)
    if kind is None:
        raise refusal("unknown_format", name, fix=f"accepted: {', '.join(limits.formats)}")
    if kind == "WEBP":  # its decoder allocates the canvas on opening, before Pillow knows the size
        _check_size(webp_size(data), limits, name)
    if kind == "PNG":
        data = without_long_texts(data)
    try:
        image = Image.open(BytesIO(data), formats=[kind])
    except Image.DecompressionBombError:
        raise limits.refusal("too_many_pixels", name, "max_pixels") from None
    except Exception:
        raise refusal("damaged", name) from None
    _check_size(image.size, limits, name)
    if decode_bytes(image, data, copies) > limits.max_decode_bytes:
        raise limits.refusal("too_costly", name, "max_decode_bytes")
    if decode_work(image, data) > limits.max_decode_work:
        raise limits.refusal("too_costly", name, "max_decode_work")
    return image, data, name


def _decoded(image: Image.Image, name: str, exif: bool = False) -> Image.Image:
    """An opened image as RGB. Raises ImageError where its data are damaged."""
    try:
        image.load()
        turn = _orientation(image) if exif else None
        # convert() of an RGB picture would only copy it, twice the memory of a large one.
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return rgb.transpose(turn) if turn is not None else rgb
    except Exception:
        raise refusal("damaged", name) from None


def format_of(data: bytes, formats: tuple[str, ...] = DEFAULT_LIMITS.formats) -> str | None:
    """Pillow's name of the format that encoded bytes begin as; None if it is none of `formats`."""
    return next((k for k in formats if k in _MAGIC and _MAGIC[k].match(data)), None)


def refuse_address(text: str, name: str | None = None) -> None:
    """Raises ImageError for an address such as https://..., s3://...: nothing is ever fetched.

    name: what the error calls the image; by default the last part of the address.
    """
    if _ADDRESS.match(text):
        name = name or Path(text.partition("?")[0].partition("#")[0]).name
        raise refusal("address", name, fix="download it first")


def local_path(text: str | Path, name: str | None = None) -> Path:
    """The file that `text` names: a path, one that begins with ~, or a file:// URI (RFC 8089).

    Raises ImageError for any other address (see `refuse_address`).
    """
    text = str(text)
    if match := _LOCAL_URI.match(text):
        return Path(unquote(text[match.end() :]))
    refuse_address(text, name)
    return expanded(text)


def is_data_uri(text: str) -> bool:
    """Whether `text` is meant as a `data:` URI, well formed or not."""
    return text[:5].lower() == "data:"


def decode_data_uri(text: str, limits: Limits = DEFAULT_LIMITS, name: str = "image") -> bytes:
    """The bytes of a `data:image/...;base64,` URI. The media type is not trusted: `open_image` looks.

    Raises ImageError: bad_data_uri, bad_base64, empty, or too_many_bytes (by the length of the text).
    """
    match = _DATA_URI.match(text, 0, 256)
    if match is None:
        raise refusal("bad_data_uri", name)
    if len(text) - match.end() > (limits.max_bytes + 2) // 3 * 4:
        raise limits.refusal("too_many_bytes", name, "max_bytes")
    try:
        data = base64.b64decode(text[match.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise refusal("bad_base64", name) from None
    if not data:
        raise refusal("empty", name)
    return data


def refusal(code: str, name: str, fix: str | None = None) -> ImageError:
    """The ImageError of `code` for the image called `name`, at most 120 characters of it."""
    if len(name) > 120:  # base64 that was taken for a file name can have millions of characters
        name = f"{name[:117]}..."
    return ImageError(f"{name}: {CODES[code]}", code=code, fix=fix)


def read_image(
    source: Path | bytes | bytearray | memoryview | Readable, limits: Limits, name: str
) -> bytes:
    """The encoded bytes of an image. Raises ImageError where there are none, too many, or no regular file."""
    try:
        if isinstance(source, Path):
            mode = source.stat().st_mode
            if stat.S_ISDIR(mode):
                raise refusal("not_a_file", name, fix="it is a folder: name a file in it")
            if not stat.S_ISREG(mode):  # a pipe or device would block or never end
                raise refusal("not_a_file", name)
            with open(source, "rb") as file:
                data = file.read(limits.max_bytes + 1)
        elif isinstance(source, (bytes, bytearray, memoryview)):
            data = bytes(source)
        else:
            data = source.read(limits.max_bytes + 1)
    except ImageError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise refusal("not_found", name) from None
    except Exception:  # OSError, a null byte in the name, or whatever a caller's file object raises
        raise refusal("unreadable", name) from None
    if not isinstance(data, bytes):
        raise refusal("unreadable", name, fix="open the file in binary mode")
    if not data:
        raise refusal("empty", name)
    if len(data) > limits.max_bytes:
        raise limits.refusal("too_many_bytes", name, "max_bytes")
    return data


def _check_size(size: tuple[int, int] | None, limits: Limits, name: str) -> None:
    if size is None:
        raise refusal("damaged", name)
    width, height = size
    if width <= 0 or height <= 0:
        raise refusal("no_size", name)
    if width * height > limits.max_pixels:
        raise limits.refusal("too_many_pixels", name, "max_pixels")
    if max(width, height) > limits.max_side:
        raise limits.refusal("side_too_long", name, "max_side")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    # Not ImageOps.exif_transpose: it rewrites the whole EXIF block, and thousands of entries of a
    # hostile block may all point at the same megabytes.
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block is common and says nothing about the picture
        return None
