"""Peak rates by what jax calls a device."""

import pytest

from llava_jax.chips import CHIPS, memory_of, peak_of


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
    ],
)
def test_a_device_has_the_rate_of_its_chip(kind, chip):
    assert peak_of(kind) == CHIPS[chip].flops
    assert memory_of(kind) == CHIPS[chip].memory


def test_a_device_that_is_not_listed_has_no_rate():
    assert peak_of("cpu") is memory_of("cpu") is None
