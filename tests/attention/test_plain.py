"""Who sees whom, and plain attention against a formula written out in numpy."""

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.attention import Causal, attention

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def mask(segments, turns=None, window=None, positions=None):
    rows = jnp.array([segments]), jnp.array([positions or range(len(segments))])
    return (
        Causal(*rows, None if turns is None else jnp.array([turns]), window).mask()[0].astype(int)
    )


def test_mask_of_packed_examples_and_padding():
    assert mask([1, 1, 2, 2, 0]).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0],
    ]


def test_mask_of_independent_turns():
    assert mask([1] * 6, [0, 0, 1, 1, 2, 2]).tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1],
    ]


def test_a_window_is_measured_in_positions():
    """The second question stands right behind the prefix, whatever the first one's length."""
    assert mask([1] * 5, [0, 0, 1, 1, 2], 2, [0, 1, 2, 3, 2]).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 1],
    ]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_with_grouped_heads(kv_heads):
    b, t, s, n, h = 2, 5, 7, 4, 8
    q, k, v = normal(b, t, n, h), normal(b, s, kv_heads, h), normal(b, s, kv_heads, h)
    seen = RNG.random((b, t, s)) < 0.7
    seen[..., 0] = True
    repeated = [np.repeat(x, n // kv_heads, axis=2) for x in (k, v)]
    scores = np.einsum("btnh,bsnh->bnts", q, repeated[0]) * h**-0.5
    weights = np.exp(np.where(seen[:, None], scores, -np.inf))
    weights /= weights.sum(-1, keepdims=True)
    wanted = np.einsum("bnts,bsnh->btnh", weights, repeated[1])
    np.testing.assert_allclose(attention(q, k, v, jnp.asarray(seen)), wanted, atol=1e-5)


def test_a_query_that_sees_nothing_stays_finite():
    q = normal(1, 2, 1, 4)
    assert np.isfinite(attention(q, q, q, jnp.zeros((1, 2, 2), bool))).all()
