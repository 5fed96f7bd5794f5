"""Reading, decoding and the slots: equalities that need no reference."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax import llava
from llava_jax.attention import Choice
from llava_jax.batch import collate, prompt_shape
from llava_jax.errors import ConfigError, PromptError, WeightError
from llava_jax.generate import Engine, Full, Generator, Job, answer, weights
from llava_jax.layers import Compute
from llava_jax.settings import SamplingSettings
from llava_jax.sharding import make_mesh
from llava_jax.text.example import Example
from tests.generate.tiny import CONFIG, MIXED, WINDOWED, generator, model, params, prompt

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
    outputs = answer(generator(config), MIXED, LONG, keep_logits=True)
    for one, out in zip(MIXED, outputs):
        want = full_logits(config, one, out.ids)
        np.testing.assert_allclose(out.logits, want, atol=1e-4)
        assert out.ids == want.argmax(-1).tolist()
        logprobs = want[np.arange(20), out.ids] - np.log(np.exp(want).sum(-1))
        np.testing.assert_allclose(out.logprobs, logprobs, atol=1e-4)


def small(**how) -> Engine:
    """Slots that are few, and chunks that are small, so that prompts take several."""
    return Engine(chunked(), **how)


@cache
def chunked() -> Generator:
    return Generator(CONFIG, params(), eos_ids=(-1,), chunk=16)


def many(count: int) -> list[Job]:
    """Requests of every kind: lengths, pictures, settings; some share pictures and beginnings."""
    rng, made = np.random.default_rng(3), []
    for i in range(count):
        one = prompt(int(rng.integers(1, 60)), int(rng.integers(0, 3)) if i % 3 else 0, seed=i % 5)
        if i % 4 == 1:
            first = prompt(40, 2, seed=i // 4 % 2)
            one = Example(np.concatenate([first.ids, one.ids]), (*first.images, *one.images))
        setting = SamplingSettings(
            temperature=(0, 0.9, 1.4)[i % 3],
            top_p=(1, 0.8)[i % 2],
            min_p=(0, 0, 0.05)[i % 3],
            repetition_penalty=(1, 1, 1, 1.3)[i % 4],
            presence_penalty=(0, 0.5)[i % 2],
            seed=i,
            max_new_tokens=int(rng.integers(1, 14)),
        )
        bias = {7: 3.0} if i % 5 == 0 else None
        made.append(Job(one, setting, bias=bias, tops_wanted=(0, 0, 4)[i % 3]))
    return made


def result(job: Job):
    return job.ids, job.logprobs, job.tops, job.reason


def test_an_answer_is_to_the_bit_the_one_it_gets_alone():
    crowd = small(slots=8, rows=2, fair=True)
    together = [crowd.submit(job) for job in many(26)]
    for job in together[::7]:  # some leave at once, in line or on the way
        crowd.cancel(job)
    for job in together[3::7]:
        crowd.step()
        crowd.cancel(job)
    crowd.run(together)
    assert crowd.busy == crowd.queued == 0
    assert crowd.counts["prompt_tokens_reused"] > 0
    assert crowd.counts["pictures_reused"] > 0
    kept = [i for i, job in enumerate(together) if job.reason != "cancelled"]
    assert len(kept) > 16
    alone = small(slots=8, rows=2, fair=True)
    for i, job in enumerate(many(26)):
        if i in kept:
            if i % 2:  # with nothing kept, and with what came before
                alone.held = [[] for _ in alone.held]
                alone.pictures.places.clear()
            alone.run([alone.submit(job)])
            assert result(job) == result(together[i]), i


def test_every_slot_and_every_row_of_a_chunk_gives_the_same_bits():
    engine = small(slots=8, rows=2)  # the shapes of the test before
    jobs = [Job(prompt(37, 2), LONG) for _ in range(8)]
    engine.run([engine.submit(job) for job in jobs])
    assert all(result(job) == result(jobs[0]) for job in jobs)


@pytest.mark.parametrize("settings", [[LONG] * 4, WARM], ids=["greedy", "sampled"])
def test_any_number_of_slots_gives_the_same_tokens(settings):
    together = answer(generator(), MIXED, settings)
    for one, setting, out in list(zip(MIXED, settings, together))[:3]:
        (alone,) = answer(generator(), [one], setting)
        assert alone.ids == out.ids
        assert len(out.ids) == setting.max_new_tokens
        np.testing.assert_allclose(alone.logprobs, out.logprobs, atol=1e-5)


@pytest.mark.parametrize("config", [CONFIG, WINDOWED], ids=["plain", "windowed"])
def test_chunks_of_a_prompt_equal_the_whole(config):
    whole, parts = generator(config), Generator(config, params(config), eos_ids=(-1,), chunk=16)
    one = prompt(75, 3)
    (want,) = answer(whole, [one], LONG)
    (got,) = answer(parts, [one], LONG)
    assert got.ids == want.ids
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_nothing_is_compiled_twice_within_a_bucket():
    own = Generator(CONFIG, params(), eos_ids=(-1,))
    engine = Engine(own, 2)
    for i, setting in enumerate(WARM):
        asked = [prompt(10 + i, seed=i), prompt(13, seed=9)]
        engine.run([engine.submit(Job(one, setting)) for one in asked])
    assert own.compiled == {"read": 1, "decode": 1}
    engine.run([engine.submit(Job(prompt(40), LONG))])
    assert own.compiled == {"read": 2, "decode": 1}


def test_a_long_prompt_does_not_stop_the_others():
    engine = small(slots=2, rows=1, fair=True)
    first = engine.submit(Job(prompt(5), SamplingSettings(max_new_tokens=200)))
    engine.step()
    long = engine.submit(Job(prompt(200), LONG))
    said = []
    while not long.ids:
        engine.step()
        said.append(len(first.ids))
    assert len(said) > 10
    assert said == sorted(set(said))


def test_end_tokens_and_stop_ids_end_a_row():
    (free,) = answer(generator(), [MIXED[0]], LONG)
    ends = free.ids[4], free.ids[9]
    first = min(free.ids.index(id_) for id_ in ends)
    own = Generator(CONFIG, params(), eos_ids=ends)
    (out,) = answer(own, [MIXED[0]], LONG)
    engine = Engine(generator())
    stopped = engine.submit(Job(MIXED[0], LONG, stop_ids=ends))
    engine.run([stopped])
    for job in (out, stopped):
        assert job.ids == free.ids[: first + 1]
        assert job.reason == "stop"
        assert len(job.logprobs) == len(job.ids)


def test_a_cancelled_request_frees_its_slot_at_once():
    engine = small(slots=1)
    first = engine.submit(Job(prompt(9), SamplingSettings(max_new_tokens=200)))
    second = engine.submit(Job(prompt(8), LONG))
    engine.step()
    engine.step()
    assert not second.ids
    engine.cancel(first)
    assert engine.busy == 0
    assert first.reason == "cancelled"
    engine.run([second])
    (want,) = answer(chunked(), [prompt(8)], LONG)
    assert second.ids == want.ids


def test_the_line_is_bounded_and_has_priorities():
    engine = small(slots=1, waiting=2)
    late = engine.submit(Job(prompt(4), LONG, priority=1))
    early = engine.submit(Job(prompt(4), LONG))
    with pytest.raises(Full, match="2 requests wait already"):
        engine.submit(Job(prompt(4), LONG))
    while not early.done:
        engine.step()
    assert not late.ids
    engine.run([late])


def test_a_beginning_that_was_read_is_not_read_again():
    engine = small(slots=2)
    first = prompt(40, 1)
    more = prompt(20, seed=4)
    second = Example(np.concatenate([first.ids, more.ids]), (*first.images, *more.images))
    engine.run([engine.submit(Job(first, LONG))])
    again = engine.submit(Job(second, LONG))
    engine.run([again])
    assert again.reused == 32
    fresh = small(slots=2)
    alone = fresh.submit(Job(second, LONG))
    fresh.run([alone])
    assert alone.reused == 0
    assert result(alone) == result(again)


def test_the_way_of_a_gpu_gives_the_same_tokens(monkeypatch):
    """A chunk that attends to all blocks at once, and quarters of chunks reused."""
    monkeypatch.setattr("llava_jax.generate.generator._BLOCK", {"cpu": 16})
    compute = Compute(jnp.float32, attention=Choice("cudnn", 4096, interpret=True))
    gpu = Generator(CONFIG, params(), compute=compute, eos_ids=(-1,), chunk=64)
    gpu.reuse = gpu.step
    first = prompt(90, 1)
    second = Example(np.concatenate([first.ids[:80], prompt(20, seed=4).ids]), first.images)
    engine = Engine(gpu, 2, capacity=128)
    jobs = [Job(first, LONG), Job(second, LONG)]
    for job in jobs:
        engine.run([engine.submit(job)])
    assert jobs[1].reused == 80
    for job, want in zip(jobs, answer(generator(), [first, second], LONG)):
        assert job.ids == want.ids
        np.testing.assert_allclose(job.logprobs, want.logprobs, atol=1e-5)


def test_another_picture_is_not_taken_from_the_cache():
    engine = small(slots=1)
    first = Example([3, -200, *range(4, 24)], prompt(2, 1).images)
    other = Example(first.ids, prompt(2, 1, seed=1).images)
    engine.run([engine.submit(Job(first, LONG))])
    job = engine.submit(Job(other, LONG))
    engine.run([job])
    assert job.reused == 0
    (want,) = answer(chunked(), [other], LONG)
    assert job.ids == want.ids


def test_a_step_that_is_broken_off_ends_its_requests_and_no_others(monkeypatch):
    engine = small(slots=1)
    lost, kept = (engine.submit(Job(prompt(9), LONG)) for _ in "ab")
    engine.step()

    def broken(*args, **how):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(chunked(), "decode", broken)
    with pytest.raises(RuntimeError):
        engine.step()
    monkeypatch.undo()
    assert (lost.reason, kept.reason) == ("error", "")
    engine.run([kept])
    (want,) = answer(chunked(), [prompt(9)], LONG)
    assert kept.ids == want.ids


def test_ctrl_c_between_two_programs_ends_the_request_and_no_other(monkeypatch):
    engine = small(slots=1)
    lost, kept = (engine.submit(Job(prompt(9), LONG)) for _ in "ab")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.pictures, "see", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    monkeypatch.undo()
    for _ in range(20):  # not `run`, which would never end if the slot were lost
        engine.step()
    assert (lost.reason, kept.reason) == ("cancelled", "length")
    (want,) = answer(chunked(), [prompt(9)], LONG)
    assert kept.ids == want.ids


def test_ctrl_c_before_the_first_token_takes_a_stream_out_of_line(monkeypatch):
    engine = model().engine()

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model().stream("what is this?")
    assert engine.busy == engine.queued == 0


def test_chunks_do_not_queue_up_on_the_device(monkeypatch):
    """Else a short prompt that comes while a long one is read waits for all of it."""
    read, waited = chunked().read, []

    class Logits:
        def block_until_ready(self):
            waited.append(True)

    engine = small(slots=1)
    engine.submit(Job(prompt(40), LONG))
    monkeypatch.setattr(chunked(), "read", lambda *args: (read(*args)[0], Logits()))
    engine.step()
    engine.step()
    assert waited == [True, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"logit_bias": {320: 1}}, "logit_bias 320: the vocabulary has 320 tokens"),
        ({"logit_bias": {-1: 1}}, "logit_bias -1: 1 is not a token id"),
        ({"logit_bias": {True: 1}}, "logit_bias True: 1 is not a token id"),
        ({"logit_bias": {3: "1"}}, "logit_bias 3: '1' is not a token id and a number"),
        ({"logit_bias": [3]}, "logit_bias is [3], not {token id: number}"),
        ({"top_logprobs": 2.0}, "top_logprobs is 2.0"),
        ({"top_logprobs": True}, "top_logprobs is True"),
    ],
)
def test_a_senseless_setting_is_named_and_reaches_no_engine(setting, message):
    with pytest.raises(ConfigError) as caught:
        model().generate("what?", **setting)
    assert message in str(caught.value)


def test_scanned_layers_give_the_tokens_of_unrolled_ones():
    scanned = Generator(CONFIG, params(), unroll=False, eos_ids=(-1,))
    want = answer(generator(), MIXED, WARM)
    assert [o.ids for o in answer(scanned, MIXED, WARM)] == [o.ids for o in want]


@pytest.mark.parametrize(
    ("axes", "unroll"), [({"data": 2, "fsdp": 2, "tensor": 2}, True), ({"fsdp": 8}, False)]
)
def test_eight_devices_give_the_tokens_of_one(axes, unroll):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    spread = Generator(CONFIG, params(), mesh=make_mesh(**axes), unroll=unroll, eos_ids=(-1,))
    want = answer(generator(), MIXED, WARM)
    got = answer(spread, MIXED, WARM)
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
    (out,) = answer(generator(), [prompt(250)], LONG)
    assert len(out.ids) == 6
    assert out.reason == "length"


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
        answer(generator(), [prompt(3), bad])
    assert "prompt 1 of the batch" in str(caught.value)
    assert message in str(caught.value)


def test_settings_must_match_the_prompts():
    with pytest.raises(PromptError, match="2 sampling settings for 1 prompts"):
        answer(generator(), [prompt(3)], [LONG, LONG])
    with pytest.raises(PromptError, match="no prompts"):
        answer(generator(), [])


def test_float_images_are_taken_as_normalised():
    one = prompt(5, 1)
    v = CONFIG.vision
    mean, std = np.array(v.image_mean, np.float32), np.array(v.image_std, np.float32)
    pixels = tuple(((i / np.float32(255) - mean) / std).astype(np.float32) for i in one.images)
    (want,) = answer(generator(), [one], LONG)
    (got,) = answer(generator(), [Example(one.ids, pixels)], LONG)
    assert got.ids == want.ids


def test_a_picture_of_no_numbers_spoils_no_later_answer():
    engine = small(slots=1)
    before, after = (Job(prompt(4), LONG) for _ in "ab")
    engine.run([engine.submit(before)])
    # In the second block, where the next answer comes to stand in part of it.
    bad = Job(Example([*[3] * 20, -200], [np.full((32, 32, 3), 3e38, np.float32)]), LONG)
    with pytest.raises(WeightError, match="not finite"):
        engine.run([engine.submit(bad)])
    engine.run([engine.submit(after)])
    assert result(after) == result(before)


def test_half_precision_parameters_run_in_half_precision():
    half = {n: v.astype(jax.numpy.bfloat16) for n, v in params().items()}
    own = Generator(CONFIG, half)
    assert own.compute.dtype == jax.numpy.bfloat16
    (out,) = answer(own, [prompt(5, 1)], SamplingSettings(max_new_tokens=3))
    assert len(out.ids) == 3


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["language.head.kernel", "language.layers.mlp.up.kernel"])
def test_logits_that_are_no_numbers_are_an_error_and_no_empty_answer(name, value):
    broken = {n: np.array(v) for n, v in params(CONFIG).items()}
    broken[name][..., 3] = value
    with pytest.raises(WeightError, match="logits are not finite") as info:
        answer(Generator(CONFIG, broken), [prompt(6)], SamplingSettings(max_new_tokens=4))
    assert "inspect MODEL --values" in str(info.value)


def test_an_accelerator_transposes_what_lies_by_columns(monkeypatch):
    """The host would take a second for each GB of it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(weights, "_transpose", lambda x: seen.append(x.shape) or x.T)
    seen: list = []
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    for given in (matrix.T, matrix):
        np.testing.assert_array_equal(weights._put(given, None), given)
    assert seen == [(3, 4)]
