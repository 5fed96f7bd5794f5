"""PNGs with texts too long for Pillow are shown; what Pillow takes keeps every byte."""

import time
import tracemalloc
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from llava_jax.errors import ImageError
from llava_jax.images.decode import open_image
from llava_jax.images.png import without_long_texts
from tests.conftest import shared
from tests.images.test_decode import encoded, picture, png_chunk

HEADER = 8 + 12 + 13  # signature and IHDR
LONG = zlib.compress(bytes(3 * 2**20))
TEXTS = {
    "zTXt": png_chunk(b"zTXt", b"history\0\0" + LONG),
    "iTXt": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
    "iCCP": png_chunk(b"iCCP", b"profile\0\0" + LONG),
    "tEXt": png_chunk(b"tEXt", b"a\0" + b"x" * 11 * 2**20) * 2
    + png_chunk(b"zTXt", b"b\0\0" + zlib.compress(b"y" * 2**20)) * 44,
    "several": png_chunk(b"zTXt", b"b\0\0" + LONG) * 3,
}


def with_chunk(chunk: bytes, data: bytes, *, behind: bool = False) -> bytes:
    at = len(data) - 12 if behind else HEADER
    return data[:at] + chunk + data[at:]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_a_picture_with_a_long_text_is_shown(kind, behind):
    data = with_chunk(TEXTS[kind], encoded(picture()), behind=behind)
    np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(picture()))


def test_the_picture_of_the_field_is_shown():
    for path in shared("field/png_with_long_text").glob("*.png"):
        assert open_image(path).mode == "RGB", path.name


def test_what_pillow_takes_stays_as_it_is():
    info = PngImagePlugin.PngInfo()
    info.add_text("short", "words", zip=True)
    info.add_itxt("title", "ü" * 1000, zip=True)
    info.add_text("plain", "x" * 10_000)
    for data in (encoded(picture(), pnginfo=info, icc_profile=bytes(500)), encoded(picture())):
        assert without_long_texts(data) is data
        both = with_chunk(TEXTS["zTXt"], data)
        assert without_long_texts(both) == data


def test_an_orientation_beside_a_long_text_still_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    xmp = b'<x xmlns:tiff="t" tiff:Orientation="6"/>'
    data = encoded(picture())
    for turned in (
        encoded(picture(), exif=exif),
        with_chunk(png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp), data),
    ):
        assert open_image(with_chunk(TEXTS["zTXt"], turned), exif=True).size == (30, 40)


def test_damage_is_still_refused():
    broken = bytearray(TEXTS["zTXt"])
    broken[-1] ^= 1  # its CRC
    cut = with_chunk(TEXTS["zTXt"], encoded(picture()))[: HEADER + 100]
    for data in (with_chunk(bytes(broken), encoded(picture())), cut):
        with pytest.raises(ImageError, match="damaged"):
            open_image(data)


def test_bombs_cost_little():
    """Ten thousand texts of 3 MB each: 30 GB, were they all read."""
    data = with_chunk(TEXTS["zTXt"] * 10_000, encoded(picture()))
    begin = time.process_time()
    tracemalloc.start()
    shown = open_image(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shown.size == (40, 30)
    assert peak < 3 * len(data) + 10 * PngImagePlugin.MAX_TEXT_CHUNK
    assert time.process_time() - begin < 5
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # no setting of the whole process was touched


def test_flipped_bits_change_no_verdict():
    """Whatever Pillow opens, it opens the same without the long texts' removal."""
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "words", zip=True)
    info.add_itxt("b", "more", zip=True)
    data, rng = encoded(picture(20, 10), pnginfo=info), np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        broken[rng.integers(8, 200)] ^= 1 << rng.integers(8)
        assert without_long_texts(bytes(broken)) == bytes(broken)


def test_chunks_that_lie_about_their_length():
    for size in (0, 5, 2**31 - 1, 2**32 - 1):
        data = encoded(picture())[:HEADER] + size.to_bytes(4, "big") + b"zTXt"
        assert without_long_texts(data) == data
    assert without_long_texts(BytesIO(b"").read()) == b""
