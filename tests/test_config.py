"""Sizes: presets, derived numbers, plain-data round trip, refusals."""

from dataclasses import replace

import pytest

from llava_jax.config import (
    PRESETS,
    LanguageConfig,
    LlavaConfig,
    LoraConfig,
    RopeScaling,
    VisionConfig,
)
from llava_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("preset", "image_tokens", "layers_run", "projector_depth"),
    [
        ("llava-v1.5-7b", 576, 23, 2),
        ("llava-v1.5-13b", 576, 23, 2),
        ("llava-v1-7b", 256, 23, 1),
        ("tiny", 16, 3, 2),
    ],
)
def test_presets(preset, image_tokens, layers_run, projector_depth):
    c = PRESETS[preset]()
    assert (c.image_tokens, c.vision_layers_run, c.projector_depth) == (
        image_tokens,
        layers_run,
        projector_depth,
    )


def test_13b_differs_from_7b_in_the_decoder_alone():
    small, large = LlavaConfig.v15_7b(), LlavaConfig.v15_13b()
    assert replace(large, language=small.language) == small


@pytest.mark.parametrize("preset", PRESETS)
def test_plain_data_round_trip(preset):
    config = PRESETS[preset]()
    language = replace(config.language, rope_scaling=RopeScaling("llama3", 8.0))
    config = replace(config, lora=LoraConfig(8, 16.0, 0.0), language=language)
    assert LlavaConfig.from_dict(config.to_dict()) == config


def test_class_token_counts_as_an_image_token():
    assert replace(LlavaConfig.v15_7b(), feature_select="cls_patch").image_tokens == 577


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LlavaConfig(projector="mlp0x_gelu"), "mlp0x_gelu"),
        (lambda: LlavaConfig(projector="identity"), "equal widths"),
        (lambda: LlavaConfig(feature_layer=-26), "feature_layer -26"),
        (lambda: LlavaConfig(feature_layer=25), "feature_layer 25"),
        (lambda: LlavaConfig(feature_select="cls"), "'cls'"),
        (lambda: LlavaConfig(image_aspect_ratio="anyres"), "anyres"),
        (lambda: VisionConfig(image_size=100), "100"),
        (lambda: VisionConfig(heads=7), "heads 7"),
        (lambda: VisionConfig(hidden_act="relu"), "relu"),
        (lambda: LanguageConfig(kv_heads=3), "kv_heads 3"),
        (lambda: LanguageConfig(head_width=63), "63"),
        (lambda: RopeScaling("yarn", 2.0), "yarn"),
        (lambda: LlavaConfig.from_dict({"langauge": {}}), "langauge"),
        (lambda: LlavaConfig.from_dict({"vision": {"size": 3}}), "vision"),
    ],
)
def test_nonsense_is_refused_by_name(make, says):
    with pytest.raises(ConfigError, match=says):
        make()
