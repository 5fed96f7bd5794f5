"""The image store, its cache, and augmentation."""

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig
from llava_jax.data.pixels import SHIFT, Cache, ImageStore, augment
from llava_jax.data.settings import DataSettings
from llava_jax.errors import ConfigError, ImageError


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def test_augmentation_moves_by_a_few_pixels_and_repeats_edges(picture):
    shifts = set()
    for seed in range(300):
        moved = augment(picture, "shift4", np.random.RandomState(seed))
        inner = moved[SHIFT:-SHIFT, SHIFT:-SHIFT]
        found = [
            (y, x)
            for y in range(2 * SHIFT + 1)
            for x in range(2 * SHIFT + 1)
            if np.array_equal(inner, picture[y : y + 24, x : x + 24])
        ]
        assert len(found) == 1
        shifts.add(found[0])
        y, x = found[0][0] - SHIFT, found[0][1] - SHIFT
        rows, columns = np.clip(np.arange(32) + y, 0, 31), np.clip(np.arange(32) + x, 0, 31)
        np.testing.assert_array_equal(moved, picture[rows][:, columns])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(2 * SHIFT + 1))


def test_half_are_mirrored(picture):
    mirrored = 0
    for seed in range(200):
        plain = augment(picture, "shift4", np.random.default_rng(seed))
        other = augment(picture, "flip_shift4", np.random.default_rng(seed))
        mirrored += not np.array_equal(plain, other)
    assert 70 < mirrored < 130
    assert augment(picture, "", np.random.RandomState(0)) is picture


def test_the_store_decodes_once_and_remembers_failures(tmp_path):
    Image.new("RGB", (9, 5), "red").save(tmp_path / "a.png")
    store = ImageStore(tmp_path, LlavaConfig.tiny(), Cache(10**6))
    first = store.pixels("a.png")
    assert first.shape == (64, 64, 3)
    (tmp_path / "a.png").unlink()
    assert store.pixels("a.png") is first
    for _ in range(2):
        with pytest.raises(ImageError, match=r"sub/none\.png: the file does not exist"):
            store.pixels("sub/none.png")


def test_limits_of_images_are_settings(tmp_path):
    Image.new("RGB", (9, 5), "red").save(tmp_path / "a.png")
    settings = DataSettings.read({"max_side": 8, "max_pixels": 45})
    small = ImageStore(tmp_path, LlavaConfig.tiny(), Cache(0), settings.image_limits)
    with pytest.raises(ImageError, match=r"longer on one side.*the limit is data\.max_side 8"):
        small.pixels("a.png")
    settings = DataSettings.read({"max_side": 9, "max_pixels": 45})
    large = ImageStore(tmp_path, LlavaConfig.tiny(), Cache(0), settings.image_limits)
    assert large.pixels("a.png").shape == (64, 64, 3)
    with pytest.raises(ConfigError, match=r"data\.max_side is 0, but must be at least 1"):
        DataSettings.read({"max_side": 0})


def test_a_full_cache_takes_no_more():
    cache = Cache(10)
    cache.put("a", 1, 6)
    cache.put("b", 2, 6)
    cache.put("c", 3, 4)
    assert [cache.get(k) for k in "abc"] == [1, None, 3]
