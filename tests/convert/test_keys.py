"""The key table: every parameter has one place, and nothing is converted without its rule."""

import pytest

from llava_jax.convert import keymap
from llava_jax.params import parameter_shapes
from tests.test_params import VARIANTS


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
