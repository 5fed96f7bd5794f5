"""Which kernel a device gets, and what it says."""

from types import SimpleNamespace

import jax
import pytest

from llava_jax.attention import Need, choose
from llava_jax.errors import ConfigError

CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


def gpu(kind, capability):
    return SimpleNamespace(platform="gpu", device_kind=kind, compute_capability=capability)


A100, H100 = gpu("NVIDIA A100-SXM4-80GB", "8.0"), gpu("NVIDIA H100 80GB HBM3", "9.0")
V100, MI300 = gpu("Tesla V100-SXM2-16GB", "7.0"), gpu("AMD Instinct MI300X", "gfx942")
PLAIN_NEED = Need("bfloat16")


@pytest.mark.parametrize(
    ("device", "need", "says"),
    [
        (
            TPU,
            Need("float32", packed=True, window=True, context=2),
            "splash (the fastest on TPU v5 lite)",
        ),
        (
            TPU,
            Need("bfloat16", turns=True),
            "chunked, plain up to 1024 positions (splash does not know independent turns)",
        ),
        (H100, PLAIN_NEED, "cudnn (the fastest on NVIDIA H100 80GB HBM3)"),
        (H100, Need("bfloat16", packed=True), "triton (cudnn knows no packed rows)"),
        (A100, PLAIN_NEED, "triton (the fastest on NVIDIA A100-SXM4-80GB)"),
        (A100, Need("bfloat16", window=True), "cudnn (triton knows no sliding window)"),
        (A100, Need("bfloat16", heads=(128, 64)), "triton (the fastest on NVIDIA A100-SXM4-80GB)"),
        (A100, Need("bfloat16", heads=(128, 24)), "cudnn (triton takes no heads that are 24 wide)"),
        (
            H100,
            Need("bfloat16", heads=(12, 160)),
            "chunked, plain up to 1024 positions (cudnn takes no heads that are 12 wide; "
            "triton takes no heads that are 12 wide)",
        ),
        (
            A100,
            Need("bfloat16", packed=True, window=True),
            "chunked, plain up to 1024 positions (triton knows no sliding window; cudnn knows no packed rows)",
        ),
        (
            H100,
            Need("float32"),
            "chunked, plain up to 1024 positions (cudnn does not compute in float32; "
            "triton does not compute in float32)",
        ),
        (
            H100,
            Need("bfloat16", context=2),
            "chunked, plain up to 1024 positions (cudnn does not share a row among devices; "
            "triton does not share a row among devices)",
        ),
        (
            V100,
            PLAIN_NEED,
            "chunked, plain up to 1024 positions (there is no fused kernel for Tesla V100-SXM2-16GB)",
        ),
        (
            MI300,
            PLAIN_NEED,
            "chunked, plain up to 1024 positions (there is no fused kernel for AMD Instinct MI300X)",
        ),
        (CPU, PLAIN_NEED, "chunked, plain up to 256 positions (there is no fused kernel for CPU)"),
    ],
    ids=str,
)
def test_choice_by_device_and_need(device, need, says):
    assert str(choose(device, need)) == f"attention: {says}"


def test_the_setting_has_precedence():
    assert str(choose(TPU, PLAIN_NEED, "plain")) == "attention: plain (as set)"
    assert choose(CPU, PLAIN_NEED, "chunked").at(16) == "chunked"
    assert choose(A100, PLAIN_NEED, "cudnn").kernel == "cudnn"


@pytest.mark.parametrize(
    ("device", "need", "asked", "says"),
    [
        (CPU, PLAIN_NEED, "splash", "attention 'splash' runs on TPU, not on CPU"),
        (
            V100,
            PLAIN_NEED,
            "cudnn",
            "attention 'cudnn' runs on NVIDIA GPUs since Ampere, not on Tesla",
        ),
        (
            TPU,
            PLAIN_NEED,
            "triton",
            "attention 'triton' runs on NVIDIA GPUs since Ampere, not on TPU",
        ),
        (
            TPU,
            Need("bfloat16", turns=True),
            "splash",
            "attention 'splash' does not know independent",
        ),
        (H100, Need("bfloat16", packed=True), "cudnn", "attention 'cudnn' knows no packed rows"),
    ],
)
def test_a_kernel_that_cannot_is_refused(device, need, asked, says):
    with pytest.raises(ConfigError, match=says) as caught:
        choose(device, need, asked)
    assert "leave attention empty" in (caught.value.fix or "")


def test_short_sequences_are_plain():
    choice = choose(jax.devices("cpu")[0], PLAIN_NEED)
    assert (choice.at(256), choice.at(257)) == ("plain", "chunked")
