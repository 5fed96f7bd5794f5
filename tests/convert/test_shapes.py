"""The jax-free statement of the parameters, and the key tables over it."""

from dataclasses import replace

import pytest

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.convert import keymap
from llava_jax.convert.shapes import parameter_shapes
from llava_jax.llava import abstract_params

TINY = LlavaConfig.tiny()
VARIANTS = {
    "7b": LlavaConfig.v15_7b(),
    "v1": LlavaConfig.v1_7b(),
    "tiny": TINY,
    "lora": replace(TINY, lora=LoraConfig(4, 8.0)),
    "last layer": replace(TINY, feature_layer=-1),
    "first layer": replace(TINY, feature_layer=0),
    "three": replace(TINY, projector="mlp3x_gelu"),
    "identity": replace(TINY, projector="identity"),
    "bias, tied, grouped": replace(
        TINY, language=replace(TINY.language, attention_bias=True, tied_head=True, kv_heads=2)
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_are_the_models(name):
    config = VARIANTS[name]
    assert parameter_shapes(config) == {n: a.shape for n, a in abstract_params(config).items()}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("layout", [keymap.ORIGINAL, *keymap.HF_LAYOUTS], ids=lambda x: x.name)
def test_every_parameter_has_one_place_in_every_layout(name, layout):
    config = VARIANTS[name]
    if layout.hf and config.projector != "mlp2x_gelu":
        pytest.skip("Hugging Face has only mlp2x_gelu")
    entries = keymap.entries(layout, config)
    assert sorted(e.ours for e in entries) == sorted(parameter_shapes(config))
    theirs = [t for e in entries for t in e.theirs]
    assert len(set(theirs)) == len(theirs)
