"""The splice, the projector, and parameters as a flat dict."""

import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import PRESETS, LlavaConfig
from llava_jax.errors import WeightError
from llava_jax.images.pixels import normalize
from llava_jax.llava import abstract_params, build, init_params, merge_images
from tests.tiny import CONFIG, random_batch, random_params


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_features_stand_where_the_slots_are():
    text = jnp.array([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    rows = jnp.array([[[10.0], [20.0], [30.0]]])
    slots = jnp.array([[-1, 0, 2, -1, 1]])
    assert merge_images(text, rows, slots)[0, :, 0].tolist() == [1, 10, 30, 4, 20]


def test_images_of_other_rows_and_unused_slots_have_no_say(params):
    model = build(CONFIG, params)
    batch = random_batch(2, images=2, length=28)
    batch["slots"][1] = -1  # the second sample is text alone
    other = {**batch, "images": batch["images"].copy()}
    other["images"][1] = 255 - other["images"][1]
    np.testing.assert_allclose(model(batch), model(other), atol=1e-6)
    other["images"][0, 1] = 255 - other["images"][0, 1]
    assert not np.allclose(model(batch)[0], model(other)[0], atol=1e-3)


def test_a_batch_without_images_does_not_need_the_tower(params):
    model = build(CONFIG, params)
    batch = random_batch(2, images=1)
    batch["slots"][:] = -1
    without = {**batch, "images": batch["images"][:, :0]}
    np.testing.assert_allclose(model(batch), model(without), atol=1e-6)


def test_uint8_is_normalised_as_on_the_host(params):
    images = random_batch(2)["images"][:, 0]
    v = CONFIG.vision
    host = normalize(images, v.image_mean, v.image_std)
    np.testing.assert_allclose(build(CONFIG, params).normalize(images), host, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "names"), [("linear", 2), ("mlp2x_gelu", 4), ("mlp3x_gelu", 6), ("identity", 0)]
)
def test_projectors(kind, names):
    width = 32 if kind == "identity" else 48
    config = replace(CONFIG, projector=kind, language=replace(CONFIG.language, width=width))
    params = random_params(config)
    assert sum(n.startswith("projector.") for n in params) == names
    x = np.random.default_rng(0).normal(size=(2, 3, 32)).astype(np.float32)
    y = build(config, params).projector(x)
    assert y.shape == (2, 3, config.language.width)
    if kind == "linear":
        wanted = x @ params["projector.linear_0.kernel"] + params["projector.linear_0.bias"]
        np.testing.assert_allclose(y, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "language", "vision", "projector"),
    [
        ("llava-v1.5-7b", 6_738_415_616, 303_507_456, 20_979_712),
        ("llava-v1.5-13b", 13_015_864_320, 303_507_456, 31_467_520),
        ("llava-v1-7b", 6_738_415_616, 303_179_776, 4_198_400),
    ],
)
def test_parameter_counts_are_the_published_ones(preset, language, vision, projector):
    sizes = abstract_params(PRESETS[preset]())
    for part, count in (("language", language), ("vision", vision), ("projector", projector)):
        assert sum(v.size for n, v in sizes.items() if n.startswith(part)) == count


def test_shapes_of_7b_come_in_under_a_second():
    abstract_params(LlavaConfig.tiny())  # the first trace of all pays for jax's own start
    start = time.process_time()
    abstract_params(LlavaConfig.v15_7b())
    assert time.process_time() - start < 1


def test_lora_of_13b_has_the_published_size():
    from llava_jax.config import LoraConfig

    config = replace(LlavaConfig.v15_13b(), lora=LoraConfig())
    assert sum(v.size for n, v in abstract_params(config).items() if "lora" in n) == 500_695_040


def test_what_does_not_fit_is_named(params):
    name = "language.layers.mlp.up.kernel"
    with pytest.raises(WeightError, match=f"missing parameter {name}"):
        build(CONFIG, {k: v for k, v in params.items() if k != name})
    with pytest.raises(WeightError, match="unknown parameter extra"):
        build(CONFIG, {**params, "extra": params[name]})
    with pytest.raises(
        WeightError, match=rf"{name} has shape \[2, 64, 48\], expected \[2, 48, 64\]"
    ):
        build(CONFIG, {**params, name: params[name].swapaxes(1, 2)})


def test_same_seed_same_parameters():
    vision, language = (replace(part, layers=1) for part in (CONFIG.vision, CONFIG.language))
    config = replace(CONFIG, vision=vision, language=language)
    one, again, other = init_params(config), init_params(config), init_params(config, 1)
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert not np.array_equal(one["language.head.kernel"], other["language.head.kernel"])
