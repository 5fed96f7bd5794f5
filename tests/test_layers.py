"""Norms, RoPE and layer stacks against formulas written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.config import LoraConfig, RopeScaling
from llava_jax.layers import (
    Compute,
    LayerNorm,
    Linear,
    RMSNorm,
    apply_rope,
    dropout,
    rope_frequencies,
    rope_table,
    run_layers,
    stack_layers,
    unstack_layers,
)

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _no_mesh():
    with nnx.use_eager_sharding(False):
        yield


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def test_linear_with_bias_and_adapter():
    layer = Linear(6, 4, (None, None), bias=True, lora=LoraConfig(2, 6.0, 0.5), rngs=nnx.Rngs(0))
    layer.lora_b[...] = normal(2, 4)
    layer.bias[...] = normal(4)
    x = normal(3, 5, 6)
    wanted = x @ layer.kernel[...] + layer.bias[...]
    wanted += 3.0 * (x @ layer.lora_a[...]) @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), wanted, atol=1e-5)
    assert not np.allclose(layer(x, jax.random.key(0)), wanted, atol=1e-3)


def test_torch_init_stays_within_its_bound():
    layer = Linear(16, 400, (None, None), bias=True, init="torch", rngs=nnx.Rngs(0))
    for values in (layer.kernel[...], layer.bias[...]):
        assert 0.24 < float(jnp.abs(values).max()) <= 0.25


def test_dropout_keeps_the_mean():
    y = dropout(jnp.ones((400, 400)), 0.25, jax.random.key(1))
    assert set(np.unique(y)) == {0.0, np.float32(1 / 0.75)}
    assert float(y.mean()) == pytest.approx(1, abs=0.01)


def test_norms_are_float32_inside():
    x = normal(2, 3, 64) * 3 + 1
    rms = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(RMSNorm(64, 1e-5)(x), rms, atol=1e-5)
    centred = x - x.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(LayerNorm(64, 1e-5)(x), wanted, atol=1e-5)
    assert RMSNorm(64, 1e-5)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_rope_turns_pairs_half_a_head_apart():
    x = normal(1, 3, 1, 8)
    table = rope_table(jnp.array([[0, 1, 257]]), rope_frequencies(8, 100.0, None))
    y = np.asarray(apply_rope(x, table))
    np.testing.assert_allclose(y[:, 0], x[:, 0], atol=1e-6)
    angle = 257 * 100.0 ** (-np.arange(4) / 4)
    pairs = x[0, 2, 0, :4] + 1j * x[0, 2, 0, 4:]
    turned = pairs * np.exp(1j * angle)
    np.testing.assert_allclose(y[0, 2, 0], np.r_[turned.real, turned.imag], atol=1e-4)


def test_rope_scaling_rules():
    plain = rope_frequencies(16, 1e4, None)
    np.testing.assert_allclose(rope_frequencies(16, 1e4, RopeScaling("linear", 4.0)), plain / 4)
    scaled = rope_frequencies(16, 1e4, RopeScaling("llama3", 8.0, 1.0, 4.0, 256))
    wavelength = 2 * np.pi / plain
    np.testing.assert_allclose(scaled[wavelength < 64], plain[wavelength < 64])
    np.testing.assert_allclose(scaled[wavelength > 256], plain[wavelength > 256] / 8)
    between = (wavelength > 64) & (wavelength < 256)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_stacked_scanned_and_listed_layers_agree():
    make = lambda rngs: Linear(8, 8, ("embed", "mlp"), bias=True, rngs=rngs)  # noqa: E731
    stacked = stack_layers(make, 3, nnx.Rngs(0))
    assert stacked.kernel.shape == (3, 8, 8)
    assert stacked.kernel.out_sharding == ("layers", "embed", "mlp")
    assert not np.allclose(stacked.kernel[0], stacked.kernel[1])
    x = normal(2, 8)

    def apply(layer, x, shift):
        return jnp.tanh(layer(x)) + shift, x.sum()

    shifts = jnp.arange(3.0)
    wanted, sums = x, []
    for i in range(3):
        sums.append(wanted.sum())
        wanted = np.tanh(wanted @ stacked.kernel[i] + stacked.bias[i]) + shifts[i]
    for compute in (Compute(), Compute(remat="full"), Compute(unroll=True)):
        y, ys = run_layers(stacked, apply, x, shifts, compute)
        np.testing.assert_allclose(y, wanted, atol=1e-5)
        np.testing.assert_allclose(ys, sums, atol=1e-4)
    listed = unstack_layers(stacked)
    assert listed[0].kernel.out_sharding == ("embed", "mlp")
    y, ys = run_layers(listed, apply, x, list(shifts), Compute())
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    assert isinstance(ys, list)
