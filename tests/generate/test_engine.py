"""Prefill, decode and the cache: equalities that need no reference."""

from functools import cache

import jax
import numpy as np
import pytest

from llava_jax import llava
from llava_jax.batch import collate, prompt_shape
from llava_jax.errors import PromptError, WeightError
from llava_jax.generate import Generator, decoding
from llava_jax.settings import SamplingSettings
from llava_jax.sharding import make_mesh
from llava_jax.text.example import Example
from tests.generate.tiny import CONFIG, MIXED, WINDOWED, generator, params, prompt

LONG = SamplingSettings(max_new_tokens=20)
WARM = [
    SamplingSettings(temperature=1.3, seed=1, max_new_tokens=20),
    SamplingSettings(temperature=0.8, top_k=9, seed=2, max_new_tokens=11),
    SamplingSettings(max_new_tokens=20),
    SamplingSettings(temperature=1.0, top_p=0.8, top_k=30, seed=3, max_new_tokens=20),
]


@cache
def forward(config):
    model = llava.build(config, jax.tree.map(jax.numpy.asarray, params(config)))
    return jax.jit(lambda batch: model.logits(model(batch)))


def full_logits(config, one: Example, ids) -> np.ndarray:
    """float32[len(ids), V] that chose each of `ids`, from one forward pass over everything."""
    whole = Example(np.concatenate([one.ids, np.asarray(ids, np.int32)]), one.images)
    batch = collate([[whole]], prompt_shape([whole], config), config)
    logits = forward(config)(batch)[0]
    end = whole.length(config.image_tokens) - 1
    return np.asarray(logits[end - len(ids) : end])


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_decoding_over_the_cache_equals_a_full_forward(config):
    outputs = generator(config).generate(MIXED, LONG, keep_logits=True)
    for one, out in zip(MIXED, outputs):
        want = full_logits(config, one, out.ids)
        np.testing.assert_allclose(out.logits, want, atol=1e-4)
        assert out.ids == tuple(want.argmax(-1))
        logprobs = want[np.arange(20), out.ids] - np.log(np.exp(want).sum(-1))
        np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-4)


@pytest.mark.parametrize("settings", [[LONG] * 4, WARM], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_equals_the_prompt_alone(settings):
    together = generator().generate(MIXED, settings)
    for one, setting, out in list(zip(MIXED, settings, together))[:3]:
        (alone,) = generator().generate([one], setting)
        assert alone.ids == out.ids
        assert len(out.ids) == setting.max_new_tokens
        np.testing.assert_allclose(alone.logprobs, out.logprobs, atol=1e-5)


def test_nothing_is_compiled_twice_within_a_bucket():
    own = Generator(CONFIG, params(), eos_ids=(-1,))
    for i, setting in enumerate(WARM):
        own.generate([prompt(10 + i, seed=i), prompt(13, seed=9)], setting)
    own.start([prompt(12), prompt(5)], LONG).advance(3)
    assert own.compiled == {"prefill": 1, "decode": 1}
    own.generate([prompt(17), prompt(5)], LONG)
    assert own.compiled == {"prefill": 2, "decode": 2}


def test_the_size_of_the_steps_does_not_matter():
    whole = generator().generate(MIXED, WARM)
    begun = generator().start(MIXED, WARM)
    pieces = [list(ids) for ids in begun.ids]
    while begun.running:
        before = [len(ids) for ids in begun.ids]
        begun.advance(7)
        for row, ids, n in zip(pieces, begun.ids, before):
            row += ids[n:]
    assert [tuple(p) for p in pieces] == [o.ids for o in whole]
    assert begun.outputs()[1].finish_reason == "length"


def test_a_row_can_be_ended_and_the_others_go_on():
    whole = generator().generate(MIXED, LONG)
    begun = generator().start(MIXED, LONG)
    begun.advance(5)
    begun.end(2, keep=3)
    while begun.running:
        begun.advance()
    outputs = begun.outputs()
    assert outputs[2].ids == whole[2].ids[:3]
    assert outputs[2].finish_reason == "stop"
    assert [outputs[i].ids for i in (0, 1, 3)] == [whole[i].ids for i in (0, 1, 3)]


def test_end_tokens_end_a_row():
    (free,) = generator().generate([MIXED[0]], LONG)
    own = Generator(CONFIG, params(), eos_ids=(free.ids[4], free.ids[9]))
    first = min(free.ids.index(free.ids[4]), free.ids.index(free.ids[9]))
    (out,) = own.generate([MIXED[0]], LONG)
    assert out.ids == free.ids[: first + 1]
    assert out.finish_reason == "stop"
    assert len(out.logprobs) == len(out.ids)


def test_a_cache_that_grows_gives_the_same_tokens(monkeypatch):
    settings = SamplingSettings(max_new_tokens=70)
    whole = generator().generate(MIXED, settings)
    before = generator().compiled["grow"]
    monkeypatch.setattr(decoding, "_FIRST_ENTRIES", 32)
    assert [o.ids for o in generator().generate(MIXED, settings)] == [o.ids for o in whole]
    assert generator().compiled["grow"] > before


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_a_conversation_that_keeps_its_cache_equals_one_read_anew(config):
    own = generator(config)
    first = prompt(20, 1)
    begun = own.start([first], LONG)
    while begun.running:
        begun.advance()
    answer = begun.outputs()[0].ids
    more = prompt(6, 1)
    second = Example(
        np.concatenate([first.ids, answer[:15], more.ids]), (*first.images, *more.images)
    )
    (want,) = own.generate([second], LONG)
    before = own.compiled["extend"]
    again = own.start([second], LONG, after=begun)
    assert own.compiled["extend"] == before + 1
    while again.running:
        again.advance()
    (got,) = again.outputs()
    assert got.ids == want.ids
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_another_picture_is_not_taken_from_the_cache():
    own = generator()
    first = Example([3, -200, *range(4, 24)], prompt(2, 1).images)
    other = Example(first.ids, prompt(2, 1, seed=1).images)
    (want,) = own.generate([other], LONG)
    before = own.compiled["extend"]
    begun = own.start([other], LONG, after=own.start([first], LONG))
    while begun.running:
        begun.advance()
    assert own.compiled["extend"] == before
    assert begun.outputs()[0].ids == want.ids


def test_scanned_layers_give_the_tokens_of_unrolled_ones():
    scanned = Generator(CONFIG, params(), unroll=False, eos_ids=(-1,))
    want = generator().generate(MIXED, WARM)
    assert [o.ids for o in scanned.generate(MIXED, WARM)] == [o.ids for o in want]


@pytest.mark.parametrize(
    ("axes", "unroll"), [({"data": 2, "fsdp": 2, "tensor": 2}, True), ({"fsdp": 8}, False)]
)
def test_eight_devices_give_the_tokens_of_one(axes, unroll):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    spread = Generator(CONFIG, params(), mesh=make_mesh(**axes), unroll=unroll, eos_ids=(-1,))
    want = generator().generate(MIXED, WARM)
    got = spread.generate(MIXED, WARM)
    assert [o.ids for o in got] == [o.ids for o in want]
    for a, b in zip(got, want):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_parameters_are_consumed_on_request_and_given_back_whole():
    given = dict(params())
    own = Generator(CONFIG, given, unroll=True, consume=True)
    assert given == {}
    back = dict(own.params())
    assert back.keys() == params().keys()
    for name, value in back.items():
        np.testing.assert_array_equal(value, params()[name], err_msg=name)


def test_the_context_ends_an_answer():
    (out,) = generator().generate([prompt(250)], LONG)
    assert len(out.ids) == 6
    assert out.finish_reason == "length"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (prompt(256), "takes 256 positions; the model has 256"),
        (prompt(250, 2), "takes 256 positions, 8 of them for 2 images"),
        (Example([3, 61]), "token id 61 is outside the vocabulary of 61"),
        (Example([3, -7]), "token id -7"),
        (Example([-200], [np.zeros((16, 32, 3), np.uint8)]), "an image is (16, 32, 3)"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named(bad, message):
    with pytest.raises(PromptError) as caught:
        generator().start([prompt(3), bad])
    assert "prompt 1 of the batch" in str(caught.value)
    assert message in str(caught.value)


def test_settings_must_match_the_prompts():
    with pytest.raises(PromptError, match="2 sampling settings for 1 prompts"):
        generator().start([prompt(3)], [LONG, LONG])
    with pytest.raises(PromptError, match="no prompts"):
        generator().start([])


def test_float_images_are_taken_as_normalised():
    one = prompt(5, 1)
    v = CONFIG.vision
    mean, std = np.array(v.image_mean, np.float32), np.array(v.image_std, np.float32)
    pixels = tuple(((i / np.float32(255) - mean) / std).astype(np.float32) for i in one.images)
    (want,) = generator().generate([one], LONG)
    (got,) = generator().generate([Example(one.ids, pixels)], LONG)
    assert got.ids == want.ids


def test_half_precision_parameters_run_in_half_precision():
    half = {n: v.astype(jax.numpy.bfloat16) for n, v in params().items()}
    own = Generator(CONFIG, half)
    assert own.compute.dtype == jax.numpy.bfloat16
    (out,) = own.generate([prompt(5, 1)], SamplingSettings(max_new_tokens=3))
    assert len(out.ids) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["language.head.kernel", "language.layers.mlp.up.kernel"])
def test_logits_that_are_no_numbers_are_an_error_and_no_empty_answer(name, value):
    broken = {n: np.array(v) for n, v in params(CONFIG).items()}
    broken[name][..., 3] = value
    with pytest.raises(WeightError, match="logits are not finite") as info:
        Generator(CONFIG, broken).generate([prompt(6)], SamplingSettings(max_new_tokens=4))
    assert "inspect MODEL --values" in str(info.value)
