"""Kernels in 4 and 8 bits: the paper's code book and rounding, and a layer over them."""

from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llava_jax.config import LoraConfig
from llava_jax.layers import Compute, Linear, run_layers, stack_layers
from llava_jax.llava import build, param_shardings
from llava_jax.params import is_quantized
from llava_jax.quant import BLOCK, NF4, dequantize, quantize
from llava_jax.sharding import make_mesh
from tests.tiny import CONFIG, random_batch, random_params

KINDS = ("nf4", "int8")


def kernel(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_nf4_takes_the_nearest_of_its_values_and_packs_two_a_byte():
    w = kernel(2, 2 * BLOCK, 5)
    w[0, 3], w[1, :BLOCK, 2] = 0, 0  # a block of zeros has no scale
    codes, scales = quantize(jnp.asarray(w), "nf4")
    assert (codes.dtype, codes.shape) == (jnp.uint8, (2, BLOCK, 5))
    blocks = w.reshape(2, 2, BLOCK, 5)
    np.testing.assert_array_equal(scales, np.abs(blocks).max(2))
    units = blocks / np.maximum(np.abs(blocks).max(2, keepdims=True), 1e-30)
    book = np.array(NF4, np.float32)
    nearest = book[np.abs(units[..., None] - book).argmin(-1)]
    wanted = (nearest * np.abs(blocks).max(2, keepdims=True)).reshape(w.shape)
    np.testing.assert_array_equal(dequantize(codes, scales, 2 * BLOCK), wanted)
    first = np.asarray(codes)[0, 0, 0]
    np.testing.assert_array_equal(book[[first >> 4, first & 15]], nearest[0, 0, :2, 0])


@pytest.mark.parametrize(("kind", "off"), [("nf4", 0.1), ("int8", 0.01)])
def test_what_is_dequantised_is_near_and_stays(kind, off):
    w = jnp.asarray(kernel(100, 7))  # no whole number of blocks
    codes, scales = quantize(w, kind)
    once = dequantize(codes, scales, 100)
    assert once.shape == w.shape
    assert float(jnp.abs(once - w).mean() / jnp.abs(w).mean()) < off
    again = dequantize(*quantize(once, kind), 100)
    np.testing.assert_allclose(again, once, rtol=1e-6)


def quantized_model(kind, **lora):
    """(config, parameters, their dequantised plain form) with adapters on the decoder."""
    config = replace(CONFIG, lora=LoraConfig(4, 8.0, 0.0, **lora))
    plain = random_params(config, 1)
    held = {}
    for name, value in list(plain.items()):
        if name.startswith("language.layers.") and name.endswith(".kernel"):
            codes, scales = quantize(value, kind)
            place = name.removesuffix("kernel")
            held |= {f"{place}codes": codes, f"{place}scales": scales}
            plain[name] = dequantize(codes, scales, value.shape[-2])
    rest = {
        n: v for n, v in plain.items() if not (n.startswith("language.layers.") and "kernel" in n)
    }
    return replace(config, quantize=kind), held | rest, plain


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_over_codes_equals_its_dequantised_base(kind):
    """nf4 to the bit; products of int8 are scaled after they are summed."""
    config, params, plain = quantized_model(kind)
    batch = random_batch(4)
    without = {n: v for n, v in plain.items() if ".lora_" not in n}
    wanted = jax.jit(lambda: build(CONFIG, without)(batch))()
    found = jax.jit(lambda: build(config, params)(batch))()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0 if kind == "nf4" else 1e-5)


def test_gradients_of_adapters_over_codes_are_those_over_the_dequantised_base():
    config, params, plain = quantized_model("nf4")
    batch = random_batch(4)

    def gradients(config, params):
        lora = {n: v + 0.01 for n, v in params.items() if ".lora_" in n}
        frozen = {n: v for n, v in params.items() if ".lora_" not in n}

        def loss(lora):
            return jnp.mean(build(config, {**frozen, **lora}, Compute(remat="full"))(batch) ** 2)

        return jax.jit(jax.grad(loss))(lora)

    wanted = gradients(replace(config, quantize=""), plain)
    found = gradients(config, params)
    scale = max(float(jnp.abs(v).max()) for v in wanted.values())
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * scale)


def test_codes_and_scales_lie_as_the_kernel_would():
    wide = replace(CONFIG.language, width=256, heads=4, kv_heads=4, head_width=64, mlp_width=512)
    config = replace(CONFIG, language=wide, quantize="nf4")
    mesh = make_mesh(fsdp=4, tensor=2)
    found = param_shardings(config, mesh)
    plain = param_shardings(replace(config, quantize=""), mesh)
    names = [n for n in found if is_quantized(n)]
    assert len(names) == 14
    for name in names:
        assert found[name].spec == plain[f"{name.rpartition('.')[0]}.kernel"].spec


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_dequantised_copy_outlives_its_layer(remat):
    """Compiled, eight layers more need less than a dequantised kernel more."""
    width = 256

    def temporaries(layers):
        def make(rngs):
            return Linear(width, width, (None, None), quantize="nf4", rngs=rngs)

        with nnx.use_eager_sharding(False):
            graphdef, state = nnx.split(
                nnx.eval_shape(lambda: stack_layers(make, layers, nnx.Rngs(0)))
            )

        def loss(x, state):
            stack = nnx.merge(graphdef, state)
            compute = Compute(remat=remat)
            out, _ = run_layers(stack, lambda layer, x, _: (layer(x), None), x, None, compute)
            return jnp.sum(out**2)

        gradient = jax.jit(jax.grad(loss)).lower(jnp.ones((4, width)), state)
        return cast(Any, gradient.compile().memory_analysis()).temp_size_in_bytes

    assert temporaries(16) - temporaries(8) < width * width * 2
