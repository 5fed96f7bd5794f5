"""The tower: patches, the class token, where it stops. Its numbers are tests/parity's affair."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from llava_jax.clip import ACTIVATIONS, quick_gelu
from llava_jax.llava import build
from tests.tiny import CONFIG, random_batch, random_params


def features(config, params, images):
    return np.asarray(build(config, params).image_features(images))


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_patches_are_read_row_by_row(params):
    image = np.zeros((1, 28, 28, 3), np.uint8)
    image[0, :14, 14:] = 255  # the second patch
    model = build(CONFIG, params)
    embedded = model.vision.patch_embed(model.normalize(image))[0]
    same = [np.allclose(embedded[i], embedded[0], atol=1e-5) for i in range(4)]
    assert same == [True, False, True, True]


def test_class_token_comes_first_and_is_dropped_by_patch(params):
    images = random_batch(2)["images"][:, 0]
    whole = features(replace(CONFIG, feature_select="cls_patch"), params, images)
    assert whole.shape == (2, 5, 32)
    np.testing.assert_array_equal(whole[:, 1:], features(CONFIG, params, images))


def test_layers_behind_the_feature_layer_have_no_say(params):
    images = random_batch(2)["images"][:, 0]
    changed = {n: v * 2 + 1 if n.startswith("vision.tail.") else v for n, v in params.items()}
    np.testing.assert_array_equal(
        features(CONFIG, params, images), features(CONFIG, changed, images)
    )


@pytest.mark.parametrize(("layer", "run"), [(0, 0), (1, 1), (-1, 3), (3, 3), (-4, 0)])
def test_any_hidden_state_can_be_the_feature(layer, run):
    config = replace(CONFIG, feature_layer=layer)
    assert config.vision_layers_run == run
    shapes = jax.tree.map(lambda x: x.shape, random_params(config))
    assert shapes.get("vision.layers.norm1.scale", (0,))[0] == run
    assert shapes.get("vision.tail.layers.norm1.scale", (0,))[0] == 3 - run
    images = random_batch(1)["images"][:, 0]
    assert features(config, random_params(config), images).shape == (1, 4, 32)


def test_quick_gelu_is_not_gelu():
    x = np.linspace(-3, 3, 50).astype(np.float32)
    np.testing.assert_allclose(quick_gelu(x), x / (1 + np.exp(-1.702 * x)), atol=1e-6)
    assert np.abs(quick_gelu(x) - ACTIVATIONS["gelu"](x)).max() > 0.01
