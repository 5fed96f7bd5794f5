"""NaN and infinity in weights are found, and named as the file names them."""

import json

import numpy as np
import pytest

from llava_jax.cli import main
from llava_jax.convert import open_source, save_checkpoint
from llava_jax.convert.io.lazy import float_dtype
from llava_jax.convert.values import all_finite, not_finite
from tests.convert import tiny


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_is_found_in_every_type_and_place(dtype, value):
    for shape in ((), (7,), (3, 5), (2, 2, 3, 4)):
        array = np.ones(shape, np.float32)
        array[(-1,) * len(shape)] = value
        for view in (array, array.T):
            assert not all_finite(view.astype(float_dtype(dtype)))
    largest = np.float32(65504 if dtype == "fp16" else 3e38)
    assert all_finite(np.array([largest, -largest, 0, 1e-40], float_dtype(dtype)))
    assert all_finite(np.array([[1, 2]]))


def test_jax_arrays_are_looked_at_where_they_are():
    import jax.numpy as jnp

    values = {"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan]), "c": np.array([np.inf])}
    assert not_finite(values) == ["b", "c"]
    assert not_finite(values, limit=1) == ["b"]


def spoiled(folder, to):
    made = tiny.checkpoint(tiny.ORIGINAL)
    made.params["language.layers.mlp.up.kernel"][1, 2, 3] = np.nan
    made.params["projector.linear_0.bias"][0] = np.inf
    return save_checkpoint(made, folder, to=to)


@pytest.mark.parametrize(
    ("to", "want"),
    [
        ("jax", ["projector.linear_0.bias", "language.layers.mlp.up.kernel[1]"]),
        (
            "hf",
            [
                "multi_modal_projector.linear_1.bias",
                "language_model.model.layers.1.mlp.up_proj.weight",
            ],
        ),
        ("original", ["model.mm_projector.0.bias", "model.layers.1.mlp.up_proj.weight"]),
    ],
)
def test_inspect_names_the_tensors_of_the_file(to, want, tmp_path, capsys):
    folder = spoiled(tmp_path / "nan", to)
    assert main(["inspect", str(folder), "--values"]) == 1
    out = capsys.readouterr().out
    for name in want:
        assert f"model.safetensors: {name}" in out
    assert main(["inspect", str(folder), "--values", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["not_finite"]
    assert sorted(found) == sorted(f"model.safetensors: {n}" for n in want)
    assert not_finite(open_source(folder)) == found
    good = tiny.save(tmp_path / "good", to, tiny.ORIGINAL)
    assert main(["inspect", str(good), "--values"]) == 0
    assert "all finite" in capsys.readouterr().out


def test_without_the_option_no_weight_is_read(tmp_path, capsys):
    assert main(["inspect", str(spoiled(tmp_path / "nan", "hf"))]) == 0
    assert "finite" not in capsys.readouterr().out
