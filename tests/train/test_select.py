"""Words of `trainable` and `param_groups`: parts of the model, and patterns over parameter names."""

import dataclasses

import pytest

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError
from llava_jax.llava import abstract_params
from llava_jax.params import parameter_shapes
from llava_jax.train.select import may_reach, rates, trainable_names
from tests.tiny import CONFIG
from tests.train.test_step import settings

NAMES = list(parameter_shapes(LlavaConfig.v15_7b()))


def test_a_pattern_matches_whole_names_and_adds_to_groups():
    found = trainable_names(NAMES, ("projector", r"re:language\.layers\.attn\.[qv]\..*"))
    adapted = {f"language.layers.attn.{n}.kernel" for n in "qv"}
    assert found == {n for n in NAMES if n.startswith("projector.")} | adapted


def test_a_pattern_does_not_reach_layers_that_are_not_run():
    found = trainable_names(NAMES, (r"re:vision\..*",))
    assert found == trainable_names(NAMES, ("vision",))
    assert not any("tail" in n for n in found)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (r"re:language\.layers\.atn\.q\.kernel", "nearest: language.layers.attn.q.kernel"),
        (r"re:language\.layers\.0\..*", "the layers of a stack are one parameter"),
        (r"re:language\.layers\.\d+\.attn\..*", "the layers of a stack are one parameter"),
        (r"re:layers\.attn\.q\.kernel", "layers.attn.q.kernel"),  # not from the start
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(word, says):
    with pytest.raises(ConfigError, match="matches no parameter") as caught:
        trainable_names(NAMES, (word,))
    assert says in str(caught.value)


def test_rates_by_group_the_last_that_covers_counts():
    groups = (
        "language lr=1e-5",
        r"re:.*\.(kernel|bias) weight_decay=0.3",
        "embed lr=0 weight_decay=0",
    )
    config = settings(lr=1e-4, projector_lr=2e-5, weight_decay=0.1, param_groups=groups)
    names = sorted(trainable_names(NAMES, ("projector", "language")))
    found = rates(names, config)
    assert list(found) == names
    assert found["projector.linear_0.kernel"] == (2e-5, 0.3)
    assert found["projector.linear_0.bias"] == (2e-5, 0.0)
    assert found["language.layers.attn.q.kernel"] == (1e-5, 0.3)
    assert found["language.norm.scale"] == (1e-5, 0.0)
    assert found["language.embed.embedding"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "begins with no part of the model"),
        ("towr lr=1", "begins with no part of the model"),
        ("vision", "sets nothing"),
        ("vision lr", "'lr' is not lr=NUMBER"),
        ("vision lr=-1", "'lr=-1' is not lr=NUMBER"),
        ("vision decay=1", "'decay=1' is not lr=NUMBER"),
        ("re:x lr=1", "matches no trained parameter"),
        ("re:( lr=1", "is not a regular expression"),
        (
            "lora lr=1",
            "no parameter of 'lora' is trained (leave it out, or add 'lora' to trainable)",
        ),
        (r"re:.*\.bias weight_decay=0.1", "sets weight_decay for norms and biases alone"),
    ],
)
def test_a_group_that_says_nothing_is_an_error(text, says):
    with pytest.raises(ConfigError, match="param_groups") as caught:
        rates(NAMES, settings(param_groups=(text,)))
    assert says in str(caught.value)


def test_what_words_of_trainable_may_reach():
    assert may_reach(("projector",), "projector")
    assert may_reach((r"re:projector\.linear_0\..*",), "projector")
    assert may_reach((r"re:.*\.lora_[ab]",), "lora")
    assert not may_reach(("language", r"re:language\..*"), "vision")


def test_a_pattern_over_kernels_that_quantize_freezes_is_refused_by_name():
    names = list(abstract_params(dataclasses.replace(CONFIG, quantize="nf4")))
    assert trainable_names(names, (r"re:language\..*norm\.scale",))
    with pytest.raises(ConfigError, match=r"covers language\.layers\.attn\.k\.kernel, which quan"):
        trainable_names(names, ("projector", r"re:language\..*"))
