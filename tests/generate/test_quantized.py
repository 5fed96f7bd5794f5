"""Kernels in few bits under the engine: the answers of the same kernels written out."""

from dataclasses import replace

import jax
import numpy as np
import pytest

import llava_jax
from llava_jax.errors import ConfigError
from llava_jax.generate import Engine, Generator, Job, answer
from llava_jax.quant import dequantize, quantize
from llava_jax.settings import SamplingSettings
from llava_jax.sharding import make_mesh
from tests.generate.tiny import CONFIG, params, prompt

LONG = SamplingSettings(max_new_tokens=10)
PROMPTS = [prompt(9, 1), prompt(12)]


def held(kind, **how) -> Generator:
    return Generator(replace(CONFIG, quantize=kind), params(), eos_ids=(-1,), **how)


def written_out(kind) -> Generator:
    made = dict(params())
    for name, value in params().items():
        if name.startswith("language.layers.") and name.endswith(".kernel"):
            codes, scales = quantize(jax.numpy.asarray(value), kind)
            made[name] = np.asarray(dequantize(codes, scales, value.shape[-2]))
    return Generator(CONFIG, made, eos_ids=(-1,))


def check_answers(kind: str, **how) -> None:
    want = answer(written_out(kind), PROMPTS, LONG)
    engine = Engine(held(kind, **how), 2)
    got = [engine.submit(Job(one, LONG)) for one in PROMPTS]
    engine.run(got)
    for a, b in zip(got, want):
        assert a.ids == b.ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    alone = engine.submit(Job(PROMPTS[0], LONG))
    engine.run([alone])
    assert (alone.ids, alone.logprobs) == (got[0].ids, got[0].logprobs)


def test_answers_are_those_of_the_kernels_written_out_and_to_the_bit_alone():
    check_answers("int8")


@pytest.mark.slow
def test_4_bits_layers_in_a_scan_and_a_mesh():
    check_answers("nf4", unroll=False)
    if jax.device_count() == 8:
        check_answers("int8", mesh=make_mesh(fsdp=4, tensor=2))


def test_loading_on_request(tmp_path):
    with pytest.raises(ConfigError, match="'int3' is unknown"):
        llava_jax.load("tiny", quantize="int3")
    model = llava_jax.load("tiny", quantize="int8")
    held = {n: x.dtype for n, x in model.generator.params() if n.endswith("q.codes")}
    assert held == {"language.layers.attn.q.codes": np.int8}
    with pytest.raises(ConfigError, match="int8 cannot be saved"):
        model.save(tmp_path / "out")
