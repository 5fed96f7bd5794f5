"""Products with kernels in few bits: each way equals the kernel written out; Pallas in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.products import FEW_ROWS, choose, quantized
from llava_jax.quant import dequantize, halves, quantize


def sides(kind: str, rows: int, d_in: int, few: str):
    """(the product, the same with the kernel written out) over 512 outputs."""
    rng = np.random.default_rng(rows)
    x, kernel = (rng.normal(size=s).astype(np.float32) for s in ((rows, d_in), (d_in, 512)))
    codes, scales = quantize(jnp.asarray(kernel), kind)
    wanted = x.astype(np.float64) @ np.asarray(dequantize(codes, scales, d_in), np.float64)
    return quantized(jnp.asarray(x), codes, scales, d_in, few), wanted


@pytest.mark.parametrize("few", ["", "triton interpret", "mosaic interpret"])
@pytest.mark.parametrize(("rows", "d_in"), [(1, 768), (3, 100), (17, 192), (FEW_ROWS + 1, 64)])
def test_nf4_equals_the_kernel_written_out(rows, d_in, few):
    got, wanted = sides("nf4", rows, d_in, few)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_int8_scales_the_product():
    got, wanted = sides("int8", 3, 100, "")
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_halves_of_a_byte_are_even_and_odd_inputs():
    kernel = np.random.default_rng(0).normal(size=(2, 128, 5)).astype(np.float32)
    codes, scales = quantize(jnp.asarray(kernel), "nf4")
    whole = dequantize(codes, scales, 128)
    for i, half in enumerate(halves(codes, scales, jnp.float32)):
        np.testing.assert_array_equal(half, whole[:, i::2])


class Device:
    def __init__(self, platform, capability=None):
        self.platform, self.compute_capability = platform, capability


@pytest.mark.parametrize(
    ("device", "dtype", "few"),
    [
        (Device("gpu", "9.0"), "bfloat16", "triton"),
        (Device("gpu", "12.0"), "float16", "triton"),
        (Device("gpu", "7.5"), "float16", ""),
        (Device("gpu", "gfx942"), "bfloat16", ""),
        (Device("gpu", "9.0"), "float32", ""),
        (Device("tpu"), "bfloat16", "mosaic"),
        (jax.devices("cpu")[0], "bfloat16", ""),
    ],
)
def test_the_way_of_a_device(device, dtype, few):
    assert choose(device, dtype) == few
