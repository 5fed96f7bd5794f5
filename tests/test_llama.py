"""The decoder: who sees whom, and that a cache changes nothing."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.attention.cached import Places
from llava_jax.llama import init_cache
from llava_jax.llava import build
from tests.tiny import CONFIG, random_params


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.mark.parametrize("unrolled", [False, True])
def test_prefill_and_steps_equal_one_pass(params, unrolled):
    language = build(CONFIG, params).language
    if unrolled:
        language.unrolled()
    x = np.random.default_rng(0).normal(size=(2, 9, 48)).astype(np.float32)
    positions = jnp.tile(jnp.arange(9), (2, 1))
    whole, _ = language(x, positions, jnp.ones((2, 9), jnp.int32))

    cache = init_cache(CONFIG.language, 2, 12, 4, jnp.float32, unrolled)
    slots, at = jnp.array([0, 1]), jnp.array([0, 0])
    for start, end in ((0, 4), (4, 6)):
        places = Places(slots, at + start, -(-end // 4))
        part, cache = language(x[:, start:end], positions[:, start:end], cache=cache, places=places)
        np.testing.assert_allclose(part, whole[:, start:end], atol=1e-5)
    for t in range(6, 9):
        places = Places(None, at + t, t // 4 + 1)
        y, cache = language(x[:, t : t + 1], positions[:, t : t + 1], cache=cache, places=places)
        np.testing.assert_allclose(y[:, 0], whole[:, t], atol=1e-5)


def test_packed_rows_equal_rows_alone(params):
    language = build(CONFIG, params).language
    x = np.random.default_rng(1).normal(size=(1, 8, 48)).astype(np.float32)
    segments, positions = (
        jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]]),
        jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]]),
    )
    packed, _ = language(x, positions, segments)
    for part in (slice(0, 3), slice(3, 8)):
        ones = jnp.ones((1, part.stop - part.start), jnp.int32)
        alone, _ = language(x[:, part], positions[:, part], ones)
        np.testing.assert_allclose(packed[:, part], alone, atol=1e-5)


def test_tied_head_uses_the_embedding():
    config = replace(CONFIG, language=replace(CONFIG.language, tied_head=True))
    params = random_params(config)
    assert "language.head.kernel" not in params
    hidden = np.random.default_rng(2).normal(size=(1, 2, 48)).astype(np.float32)
    logits = build(config, params).logits(hidden)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, hidden @ params["language.embed.embedding"].T, atol=1e-5)
