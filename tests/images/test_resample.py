"""The fast resize equals Pillow's to the bit."""

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.images import pixels, resample

pytest.importorskip("numba")

COLOR = (122, 116, 104)


def picture(width: int, height: int, seed: int, hard: bool) -> Image.Image:
    rng = np.random.RandomState(seed)
    values = rng.randint(0, 256, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(np.where(values > 127, 255, 0).astype(np.uint8) if hard else values)


def check(width: int, height: int, size: int, hard: bool):
    image = picture(width, height, width * height, hard)
    square = pixels._padded(image, COLOR)
    expected = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(resample.pad_resize(image, size, COLOR), expected)


@pytest.mark.parametrize("hard", [False, True], ids=["noise", "black and white"])
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (640, 480, 336),
        (427, 640, 336),
        (336, 336, 336),  # Pillow does nothing
        (336, 100, 336),
        (301, 299, 224),
        (200, 131, 336),  # enlarged
        (1, 700, 336),
        (2000, 1, 28),
        (3, 2, 14),
    ],
)
def test_it_equals_pillow(width, height, size, hard):
    check(width, height, size, hard)


def test_strips_of_a_large_picture_make_the_same_pixels(monkeypatch):
    monkeypatch.setattr(resample, "_STRIP", 10_000)
    check(333, 500, 112, True)


@pytest.mark.slow
def test_it_equals_pillow_at_random_sizes():
    rng = np.random.RandomState(0)
    for n in range(200):
        width, height = (int(v) for v in rng.randint(1, (900, 3000)[n % 10 == 0], 2))
        check(width, height, int(rng.choice([336, 224, 112, 28])), n % 3 == 0)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), EOFError("no input")])
def test_a_cache_that_cannot_be_kept_or_read_leaves_pictures_to_pillow(monkeypatch, caplog, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(resample, "pad_resize", fails)
    assert resample.is_fast.__wrapped__() is False
    assert f"resized by Pillow, more slowly: {error!r} (numba's cache: /" in caplog.text


def test_both_ways_to_the_tower_agree(monkeypatch):
    image, config = picture(500, 375, 1, False), LlavaConfig.v15_7b()
    fast = pixels.to_pixels(image, config)
    monkeypatch.setattr(resample, "is_fast", lambda: False)
    np.testing.assert_array_equal(pixels.to_pixels(image, config), fast)
