"""An image processor's settings: obeyed to the bit, written as they were read, or refused by key."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import llava_jax
from llava_jax.config import LlavaConfig, PixelConfig, VisionConfig
from llava_jax.convert import Target, convert, open_source
from llava_jax.convert.table import configs
from llava_jax.convert.table.pixels import pads, pixel_config, preprocessor_json
from llava_jax.errors import ImageError, WeightError
from llava_jax.images.pixels import normalize_for, to_pixels
from tests.convert import tiny

SIZE = 28
CROP = {"crop_size": {"height": SIZE, "width": SIZE}}
SETTINGS = {
    "CLIP's": {"size": {"shortest_edge": SIZE}, **CROP},
    "old numbers": {"size": SIZE, "crop_size": SIZE, "feature_extractor_type": "CLIPFeatureExtractor"},
    "squeezed": {"size": {"height": SIZE, "width": SIZE}, "do_center_crop": False},
    "squeezed, with a crop": {"size": {"height": SIZE, "width": SIZE}, **CROP},
    "larger, then the centre": {"size": {"shortest_edge": 37}, **CROP},
    "smaller, black around": {"size": {"shortest_edge": 19}, **CROP},
    "an oblong, then the centre": {"size": {"height": 21, "width": 45}, **CROP},
    "no resize": {"do_resize": False, **CROP},
    "no normalisation": {"size": SIZE, **CROP, "do_normalize": False},
    "no rescale": {"size": SIZE, **CROP, "do_rescale": False},
    "neither": {"size": SIZE, **CROP, "do_rescale": False, "do_normalize": False},
    "-1 to 1": {
        "size": SIZE, **CROP, "rescale_factor": 1 / 127.5,
        "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0],
    },
    "own mean": {"size": SIZE, **CROP, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]},
    "null is off": {"size": {"height": SIZE, "width": SIZE}, "crop_size": None, "do_center_crop": None},
    "nothing is rescaled": {"size": SIZE, **CROP, "do_rescale": None, "do_normalize": None},
    "not converted": {"size": SIZE, **CROP, "do_convert_rgb": False},
    **{f"resample {n}": {"size": SIZE, **CROP, "resample": n} for n in range(6)},
}  # fmt: skip
PICTURES = [(28, 28), (40, 120), (121, 40), (7, 5), (5, 64), (1, 30), (200, 199)]


def config_of(settings) -> LlavaConfig:
    vision = configs.vision_config(
        {"image_size": SIZE, "patch_size": 14, "hidden_size": 24, "num_attention_heads": 3},
        "config.json",
        settings,
    )
    return LlavaConfig(vision=vision, image_aspect_ratio="pad" if pads(settings) else "square")


def ours(settings, image: Image.Image) -> np.ndarray:
    config = config_of(settings)
    return normalize_for(to_pixels(image, config), config.vision)


def pictures():
    rng = np.random.default_rng(0)
    for height, width in PICTURES:
        yield Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


def theirs(kind, settings, image):
    transformers = pytest.importorskip("transformers")
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    known = {k: v for k, v in settings.items() if not k.endswith("_type")}
    out = processor(**known)(image, return_tensors="np")["pixel_values"][0]
    return np.asarray(out).transpose(1, 2, 0)


@pytest.mark.parametrize("name", SETTINGS)
def test_pixels_are_those_of_transformers(name):
    settings = {"image_processor_type": "CLIPImageProcessor", **SETTINGS[name]}
    for image in pictures():
        want = theirs("CLIPImageProcessor", settings, image)
        assert np.array_equal(ours(settings, image), want), image.size


PADDED = ("CLIP's", "squeezed", "larger, then the centre", "smaller, black around", "own mean",
          "no normalisation", "no rescale", "resample 0", "resample 1", "an oblong, then the centre")  # fmt: skip


@pytest.mark.parametrize("name", PADDED)
def test_padded_pixels_are_those_of_transformers(name):
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, **SETTINGS[name]}
    for image in pictures():
        want = theirs("LlavaImageProcessor", settings, image)
        assert np.array_equal(ours(settings, image), want), image.size


def test_a_padded_picture_needs_no_crop():
    settings = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": SIZE}
    settings |= {"do_center_crop": False}
    for image in pictures():
        assert np.array_equal(ours(settings, image), theirs("LlavaImageProcessor", settings, image))


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_come_back(name):
    settings = {"image_processor_type": "CLIPImageProcessor", **SETTINGS[name]}
    config = config_of(settings)
    written = json.loads(json.dumps(preprocessor_json(config)))
    assert config_of(written) == config
    assert LlavaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("name", ["squeezed", "larger, then the centre", "-1 to 1", "resample 2"])
@pytest.mark.parametrize("nested", [False, True], ids=["transformers 4", "transformers 5"])
def test_a_folder_keeps_them_through_every_format(tmp_path, name, nested):
    folder = tiny.save(tmp_path / "a", "hf", tiny.TEXT, tokenizer=tiny.tokenizer(tmp_path / "t"))
    shutil.rmtree(folder / "llava_jax")
    settings = {"image_processor_type": "CLIPImageProcessor", **SETTINGS[name]}
    if nested:
        (folder / "preprocessor_config.json").unlink()
        whole = json.loads((folder / "processor_config.json").read_text())
        text = json.dumps({**whole, "image_processor": settings})
        (folder / "processor_config.json").write_text(text)
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 120, 3), np.uint8))
    model = llava_jax.load(folder)
    want = ours(settings, image)
    assert np.array_equal(normalize_for(model.pixels(image), model.config.vision), want)
    assert np.abs(_on_device(model, image) - want).max() < 2e-6
    before = folder
    for to in ("jax", "original", "hf"):
        convert(before, tmp_path / to, Target(to))
        config = open_source(tmp_path / to).config
        assert config.vision == model.config.vision
        assert config.image_aspect_ratio == model.config.image_aspect_ratio
        before = tmp_path / to
    written = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert np.array_equal(theirs("CLIPImageProcessor", _known(written), image), want)


def _known(settings):
    return {k: v for k, v in settings.items() if k != "processor_class"}


def _on_device(model, image):
    import jax.numpy as jnp

    from llava_jax.llava import Llava

    holder = Llava.__new__(Llava)  # no parameters: only the settings are asked
    object.__setattr__(holder, "config", model.config)
    return np.asarray(Llava.normalize(holder, jnp.asarray(model.pixels(image))))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"size": {"longest_edge": 28}}, "size"),
        ({"size": {"shortest_edge": 28, "longest_edge": 99}}, "size"),
        ({"size": {"height": 28}}, "size"),
        ({"size": "28"}, "size"),
        ({"crop_size": {"height": 32, "width": 32}}, "crop_size is 32x32, the tower takes 28x28"),
        ({"size": {"height": 30, "width": 28}, "do_center_crop": False}, "size is 30x28"),
        ({"size": {"shortest_edge": 30}, "do_center_crop": False}, "size is 30"),
        ({"do_resize": False, "do_center_crop": False}, "do_resize and do_center_crop"),
        ({"do_center_crop": False, "size": 28}, "do_center_crop"),
        ({"resample": 6}, "resample"),
        ({"resample": "bicubic"}, "resample"),
        ({"do_resize": "yes"}, "do_resize"),
        ({"rescale_factor": None, "do_rescale": 1}, "do_rescale"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"image_processor_type": "SiglipImageProcessor"}, "image_processor_type"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_file_and_key(change, key):
    settings = {"size": {"shortest_edge": SIZE}, **CROP, "do_pad": False} | change
    with pytest.raises(WeightError) as error:
        configs.from_hf(
            {"vision_config": {"image_size": SIZE, "patch_size": 14}},
            "config.json",
            settings,
        )
    assert "preprocessor_config.json" in str(error.value)
    assert key in str(error.value)


def test_clip_knows_no_padding():
    """`do_pad` in a CLIPImageProcessor's file pads nothing in transformers."""
    assert not pads({"image_processor_type": "CLIPImageProcessor", "do_pad": True})
    assert pads({"image_processor_type": "LlavaImageProcessorFast", "do_pad": True})
    assert not pads({"image_processor_type": "LlavaImageProcessor"})
    assert pads(None)


def test_a_folder_without_settings_is_clips():
    assert pixel_config(None, 336) == PixelConfig() == VisionConfig().pixels


def test_a_thread_of_pixels_is_refused_where_it_would_cost_too_much():
    image = Image.new("RGB", (60000, 1))
    settings = {"image_processor_type": "CLIPImageProcessor", "size": 100, **CROP}
    with pytest.raises(ImageError, match="6000000x100"):
        ours(settings, image)
