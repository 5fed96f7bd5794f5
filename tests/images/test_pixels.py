"""Pixels equal to the reference processor's, also where they are made the lazy way."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.errors import ImageError
from llava_jax.images import pixels as module
from llava_jax.images.decode import Limits, open_image
from llava_jax.images.pixels import normalize, pad_color, resize_window, to_pixels
from tests.conftest import shared

SIZES = [(1, 1), (1, 50), (50, 1), (56, 56), (57, 56), (30, 200), (200, 30), (113, 97), (3, 700)]
BICUBIC = Image.Resampling.BICUBIC


def config(size: int, ratio: str) -> LlavaConfig:
    return LlavaConfig(vision=VisionConfig(image_size=size), image_aspect_ratio=ratio)


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def padded(image: Image.Image, size: int) -> np.ndarray:
    """The whole square made and resized, as the original does it."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), BICUBIC))


def cropped(image: Image.Image, size: int) -> np.ndarray:
    """The whole picture resized and then cropped, as CLIP's processor does it."""
    w, h = image.size
    new = (int(size * w / h), size) if w > h else (size, int(size * h / w))
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    return np.asarray(image.resize(new, BICUBIC))[top : top + size, left : left + size]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("wh", SIZES)
def test_lazy_and_whole_ways_are_the_same_bits(wh, lazy, monkeypatch):
    if lazy:
        monkeypatch.setattr(module, "_STRIP_PIXELS", 100)
        monkeypatch.setattr(module, "_LARGEST_RESIZE", 1)
    for size in (28, 56):
        image = picture(*wh)
        np.testing.assert_array_equal(to_pixels(image, config(size, "pad")), padded(image, size))
        np.testing.assert_array_equal(
            to_pixels(image, config(size, "square")), cropped(image, size)
        )


@pytest.mark.parametrize(("length", "size"), [(7, 300), (300, 7), (64, 64), (100, 99), (1, 9)])
def test_a_window_equals_pillow(length, size):
    pixels = np.asarray(picture(length, 5))
    whole = np.asarray(Image.fromarray(pixels).resize((size, 5), BICUBIC))
    for start, count in ((0, 1), (size // 2, 2), (max(size - 4, 0), min(size, 4))):
        window = resize_window(pixels, 1, size, start, count)
        np.testing.assert_array_equal(window, whole[:, start : start + count])


def test_normalize_equals_the_formula_in_single_precision():
    vision = VisionConfig()
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    out = normalize(pixels, vision.image_mean, vision.image_std)
    assert out.dtype == np.float32
    assert out.shape == (16, 16, 3)
    scaled = (pixels * 0.00392156862745098).astype(np.float32)
    expected = (scaled - np.float32(vision.image_mean)) / np.float32(vision.image_std)
    np.testing.assert_array_equal(out, expected)
    batch = normalize(np.stack([pixels, pixels]), vision.image_mean, vision.image_std)
    np.testing.assert_array_equal(batch[1], out)


def test_pad_colour_is_the_mean_rounded_down():
    assert pad_color(VisionConfig()) == (122, 116, 104)


EXTREME = """
import resource, sys
import numpy as np
from PIL import Image
from llava_jax.config import LlavaConfig
from llava_jax.images.pixels import to_pixels
to_pixels(Image.new("RGB", (9, 9)), LlavaConfig())
image = Image.new("RGB", (int(sys.argv[1]), int(sys.argv[2])), (9, 99, 199))
before = resource.getrusage(resource.RUSAGE_SELF)
pixels = to_pixels(image, LlavaConfig(image_aspect_ratio=sys.argv[3]))
after = resource.getrusage(resource.RUSAGE_SELF)
print((after.ru_maxrss - before.ru_maxrss) / 1024, after.ru_utime - before.ru_utime, pixels.mean())
"""


@pytest.mark.parametrize("ratio", ["pad", "square"])
@pytest.mark.parametrize("wh", [(1, 8192), (8192, 1), (8192, 6100), (6100, 8192)])
def test_extreme_pictures_stay_cheap(wh, ratio):
    """Padding 1x8192 as the original does would take 268 MB, resizing it plainly 3.7 GB."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, "-c", EXTREME, str(wh[0]), str(wh[1]), ratio]
    out = subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout
    memory, seconds, _ = map(float, out.split())
    assert memory < 100
    assert seconds < 2.0


def test_golden_pixels():
    """Every reference picture and processor but anyres and the rows marked as quirk or error."""
    folder = shared("golden/images")
    reference = json.loads((folder / "images.json").read_text())
    for row in reference["images"]:
        image = opened(folder / "src" / row["file"])
        assert list(image.size) == row["size_wh"]
        assert hashlib.sha256(image.tobytes()).hexdigest() == row["sha256_rgb"], row["file"]
        for key, want in row["results"].items():
            name, ratio = key.split("|")
            if ratio == "anyres" or "quirk" in want or "error" in want:
                continue
            processor = reference["processors"][name]
            vision = VisionConfig(
                image_size=processor["crop_size"]["height"],
                image_mean=tuple(processor["image_mean"]),
                image_std=tuple(processor["image_std"]),
            )
            ours = LlavaConfig(
                vision=vision, image_aspect_ratio="pad" if ratio == "pad" else "square"
            )
            pixels = to_pixels(image, ours)
            values = normalize(pixels, vision.image_mean, vision.image_std)
            assert sha(pixels) == want["sha256_u8"], (row["file"], key)
            assert sha(values) == want["sha256_f32"], (row["file"], key)


def opened(path: Path) -> Image.Image:
    """Through the gate, but for the formats that it refuses and the original reads."""
    with Image.open(path) as image:
        if image.format in Limits().formats:
            return open_image(path)
        with pytest.raises(ImageError):
            open_image(path)
        return image.convert("RGB")


def sha(hwc: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(hwc.transpose(2, 0, 1)).tobytes()).hexdigest()
