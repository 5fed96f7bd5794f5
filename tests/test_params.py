"""Names and shapes of parameters, stated without jax, and the one check of them."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.errors import WeightError
from llava_jax.llava import abstract_params
from llava_jax.params import (
    check_params,
    component,
    is_lora,
    is_run,
    is_stacked,
    parameter_shapes,
    unique,
    weights_in,
)

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


def test_what_names_mean():
    config = replace(TINY, lora=LoraConfig(4, 8.0))
    shapes = parameter_shapes(config)
    assert {component(n) for n in shapes} == {"vision", "projector", "language", "lora"}
    assert sum(map(is_lora, shapes)) == 14
    assert {len(shapes[n]) for n in shapes if is_stacked(n)} == {2, 3}
    layers = {config.language.layers, config.vision_layers_run, 1}
    assert {s[0] for n, s in shapes.items() if is_stacked(n)} == layers
    assert [n for n in shapes if is_stacked(n) and not is_run(n)]


# The check ----------------------------------------------------------------------------------------

WANT = {"language.a": (2, 3), "language.b": (3,), "projector.c": (4,)}


def values(**changes):
    made = {name: np.zeros(shape, np.float32) for name, shape in WANT.items()}
    return made | {name.replace("__", "."): value for name, value in changes.items()}


def refused(found, *words, **how):
    with pytest.raises(WeightError) as error:
        check_params(found, WANT, "some/file", **how)
    assert str(error.value).startswith("some/file: ")
    for word in words:
        assert word in str(error.value)


def test_names():
    check_params(values(), WANT)
    without = {n: v for n, v in values().items() if n != "language.b"}
    refused(without, "missing parameter language.b")
    refused(without, "missing tensor language.b", noun="tensor")
    check_params(without, WANT, partial=True)
    refused(values(x=np.zeros(1)), "unknown parameter x", partial=True)
    refused(
        without | {"langauge.b": np.zeros(3)},
        "unknown parameter langauge.b; missing parameter language.b (did you mean language.b?)",
    )
    refused({}, "missing parameters language.a, language.b, projector.c")


def test_shapes():
    refused(values(language__a=np.zeros((3, 2))), "language.a has shape [3, 2], expected [2, 3]")


def test_types():
    half, whole = np.zeros(3, np.float16), np.zeros(3, np.int8)
    check_params(values(language__b=half), WANT)
    said = "language.b is float16, the rest of language (language.a) is float32"
    refused(values(language__b=half), said, "--mixed-types", types=component)
    check_params(values(language__b=half), WANT, types=component, mixed=True)
    check_params(values(projector__c=np.zeros(4, np.float16)), WANT, types=component)
    for mixed in (True, False):
        refused(
            values(language__b=whole),
            "language.b has type int8",
            "use the 16-bit weights",
            types=component,
            mixed=mixed,
        )
    refused(values(language__b=np.zeros(3)), "language.b has type float64", types=component)


def test_nothing_is_read():
    """Shapes alone are checked: of a model that exists nowhere, and inside a compiled program."""
    config = LlavaConfig.v15_13b()
    check_params(abstract_params(config), parameter_shapes(config), types=component)
    traced = jax.jit(lambda x: check_params({"x": x}, {"x": (2,)}) or x)
    assert traced(jnp.ones(2)).sum() == 2
    with pytest.raises(WeightError, match="x has shape"):
        traced(jnp.ones(3))


def test_duplicated_names():
    assert unique([("a", 1), ("b", 2)]) == {"a": 1, "b": 2}
    with pytest.raises(WeightError, match=r"x\.json: a is duplicated"):
        json.loads('{"a": 1, "a": 2}', object_pairs_hook=lambda p: unique(p, "x.json"))


def test_parameters_of_kernels_in_few_bits_are_counted_as_parameters():
    """Not codes as parameters (two of nf4 share a byte), nor scales as more of them."""
    config = LlavaConfig.v15_7b()
    count = sum(math.prod(shape) for shape in parameter_shapes(config).values())
    for quantize in ("", "nf4", "int8"):
        held = abstract_params(replace(config, quantize=quantize))
        assert sum(weights_in(name, leaf) for name, leaf in held.items()) == count
