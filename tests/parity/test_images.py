"""Pixels against transformers' CLIP processor (its Pillow backend, which needs no torchvision)."""

import numpy as np
import pytest
from PIL import Image

from llava_jax.config import LlavaConfig, VisionConfig
from llava_jax.images.pixels import normalize, pad_color, to_pixels

pytest.importorskip("torch")
SIZES = [(640, 480), (337, 336), (336, 336), (100, 300), (50, 60), (900, 20), (7, 5)]


@pytest.fixture(scope="module", params=[336, 224])
def processor(request):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = request.param
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


@pytest.mark.parametrize("wh", SIZES)
@pytest.mark.parametrize("ratio", ["pad", "square"])
def test_equals_clip_processor_bit_for_bit(processor, wh, ratio):
    rng = np.random.default_rng(wh[0])
    image = Image.fromarray(rng.integers(0, 256, (wh[1], wh[0], 3), dtype=np.uint8))
    vision = VisionConfig(image_size=processor.crop_size["height"])
    pixels = to_pixels(image, LlavaConfig(vision=vision, image_aspect_ratio=ratio))
    given = image
    if ratio == "pad":
        given = Image.new("RGB", (max(wh), max(wh)), pad_color(vision))
        given.paste(image, ((max(wh) - wh[0]) // 2, (max(wh) - wh[1]) // 2))
    want = np.asarray(processor(given, return_tensors="np")["pixel_values"][0])
    got = normalize(pixels, vision.image_mean, vision.image_std).transpose(2, 0, 1)
    np.testing.assert_array_equal(got, want)
