"""FLOPs of a step, against sums done by hand for the 7B."""

from dataclasses import replace

import pytest

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.flops import Work, count
from llava_jax.llava import abstract_params

MODEL = LlavaConfig.v15_7b()
SAMPLE = Work(tokens=861, targets=138, images=1, keys=861 / 2, last=138)


@pytest.fixture(scope="module")
def params():
    return abstract_params(MODEL)


def parts(params, *starts):
    return [n for n in params if n.startswith(starts)]


def test_the_tower_takes_366_gigaflops_an_image(params):
    found = count(MODEL, params, parts(params, "projector."), SAMPLE)
    assert found.tower == pytest.approx(366e9, rel=0.01)


def test_a_quantised_base_takes_the_work_of_the_plain_one():
    lora = replace(MODEL, lora=LoraConfig(8, 16.0))
    plain = abstract_params(lora)
    trained = parts(plain, "projector.") + [n for n in plain if ".lora_" in n]
    wanted = count(lora, plain, trained, SAMPLE)
    for quantize in ("nf4", "int8"):
        held = abstract_params(replace(lora, quantize=quantize))
        assert count(lora, held, trained, SAMPLE) == wanted


def test_stage_2_is_six_times_weights_times_tokens(params):
    found = count(MODEL, params, parts(params, "projector.", "language."), SAMPLE)
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    late = layer - 2 * 4096**2  # what the last layer computes at trained positions alone
    language = 6 * (861 * (32 * layer - late) + 138 * (late + 4096 * 32000))
    assert found.language == pytest.approx(language)
    assert found.attention == pytest.approx(6 * 861 * 861 * 4096 * 32)
    assert found.projector == pytest.approx(576 * (4 * 1024 * 4096 + 6 * 4096**2))
    assert found.total == pytest.approx(33.9e12, rel=0.02)


def test_stage_1_is_four_times(params):
    work = Work(tokens=592, targets=16, images=1, keys=296, last=16)
    found = count(MODEL, params, parts(params, "projector."), work)
    assert found.total == pytest.approx(15.6e12, rel=0.02)
    frozen = count(MODEL, params, [], work)
    assert frozen.language == pytest.approx(found.language / 2)


def test_recomputation_is_counted_apart(params):
    trained = parts(params, "projector.", "language.")
    full = count(MODEL, params, trained, SAMPLE, remat="full")
    assert full.language == count(MODEL, params, trained, SAMPLE).language
    assert full.recomputed == pytest.approx((full.language + full.attention) / 3, rel=0.03)
    kept = [
        count(MODEL, params, trained, SAMPLE, remat=r).recomputed
        for r in ("none", "dots", "minimal")
    ]
    assert 0 == kept[0] < kept[1] < kept[2] < full.recomputed
