"""What simplejpeg decodes is what Pillow decodes, to the bit; what it does not is Pillow's."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.errors import ImageError
from llava_jax.images import jpeg
from llava_jax.images.decode import open_image, open_pixels
from llava_jax.images.pixels import to_pixels

simplejpeg = pytest.importorskip("simplejpeg")


def encoded(width: int, height: int, mode: str = "RGB", **options) -> bytes:
    rng = np.random.RandomState(width)
    small = Image.fromarray(rng.randint(0, 256, (60, 80, 3)).astype(np.uint8))
    file = BytesIO()
    small.resize((width, height), Image.Resampling.BICUBIC).convert(mode).save(
        file, "JPEG", **options
    )
    return file.getvalue()


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("size", [(256, 256), (333, 251), (2048, 33), (257, 1021)])
@pytest.mark.parametrize("quality", [5, 75, 100])
def test_pixels_are_pillows(subsampling, size, quality):
    data = encoded(*size, subsampling=subsampling, quality=quality, restart_marker_rows=2)
    found = open_pixels(data)
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found[..., :3], np.asarray(Image.open(BytesIO(data))))


def test_a_picture_is_prepared_alike_whoever_decoded_it(monkeypatch):
    data = encoded(640, 480)
    for config in (LlavaConfig.v15_7b(), LlavaConfig.tiny()):
        want = to_pixels(open_image(data), config)
        assert np.array_equal(to_pixels(open_pixels(data), config), want)
        monkeypatch.setattr("llava_jax.images.resample.is_fast", lambda: False)
        assert np.array_equal(to_pixels(open_pixels(data), config), want)
        monkeypatch.undo()


@pytest.mark.parametrize(
    "data",
    [
        encoded(200, 200),
        encoded(300, 300, "L"),
        encoded(300, 300, "CMYK"),
        encoded(300, 300, progressive=True),
    ],
    ids=["small", "grey", "cmyk", "progressive"],
)
def test_others_are_decoded_by_pillow(data):
    assert isinstance(open_pixels(data), Image.Image)


def test_damaged_ones_are_judged_by_pillow():
    data = encoded(300, 300)
    with pytest.raises(ImageError, match="damaged or cut off"):
        open_pixels(data[: len(data) // 2])
    flipped = bytearray(data)
    for at in range(len(data) // 2, len(data) // 2 + 40):
        flipped[at] ^= 0x55
    ours, theirs = open_pixels(bytes(flipped)), open_image(bytes(flipped))
    assert np.array_equal(np.asarray(ours)[..., :3], np.asarray(theirs))


def test_without_the_library_pillow_decodes(monkeypatch):
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert isinstance(open_pixels(encoded(300, 300)), Image.Image)


def test_a_library_with_other_pixels_is_not_used():
    class Other:
        @staticmethod
        def decode_jpeg(data: bytes, form: str) -> np.ndarray:
            pixels = simplejpeg.decode_jpeg(data, form).copy()
            pixels[3, 4, 1] ^= 1
            return pixels

    assert jpeg._agree(simplejpeg)
    assert not jpeg._agree(Other)
