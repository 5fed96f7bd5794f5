"""Names of machines."""

import pytest

from llava_jax.chips import CHIPS, target_config
from llava_jax.errors import ConfigError
from llava_jax.plan.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "chip", "devices", "slices", "grid"),
    [
        ("v5e-1", "v5e", 1, 1, (1, 1)),
        ("v5e-8", "v5e", 8, 1, (2, 4)),
        ("v5e-16", "v5e", 16, 1, (4, 4)),
        ("v6e-256", "v6e", 256, 1, (16, 16)),
        ("2xv5e-16", "v5e", 32, 2, (4, 4)),
        ("v5p-8", "v5p", 4, 1, (2, 2, 1)),
        ("v5p-16", "v5p", 8, 1, (2, 2, 2)),
        ("v5p-64", "v5p", 32, 1, (2, 4, 4)),
        ("v5p-128", "v5p", 64, 1, (4, 4, 4)),
        ("8xA100-40", "A100-40", 8, 1, ()),
        ("8xa100-80", "A100-80", 8, 1, ()),
        ("16xH100", "H100", 16, 2, ()),
        ("1xH200", "H200", 1, 1, ()),
    ],
)
def test_a_name_means_chips(name, chip, devices, slices, grid):
    found = parse_topology(name)
    assert found.chip is CHIPS[chip]
    assert (found.devices, found.slices, found.grid) == (devices, slices, grid)


@pytest.mark.parametrize(
    "name",
    ["v5p-7", "v5p-2", "v5e-2", "v5e-12", "0xH100", "12xH100", "8xA100", "v7-8", "", "0xv5e-8"],
)
def test_what_does_not_exist_is_refused_by_name(name):
    with pytest.raises(ConfigError, match="no topology"):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("0xH100", "no topology '0xH100': it has no GPU (for example 8xH100)"),
        ("12xH100", "several hosts are whole ones (name 8xH100 or 16xH100)"),
        ("0xv5e-8", "no topology '0xv5e-8': it has no slice"),
        ("v5e-0", "v5e slices have 1, 4, 8, 16, ... chips"),
    ],
)
def test_a_size_that_does_not_exist_is_explained(name, said):
    with pytest.raises(ConfigError) as error:
        parse_topology(name)
    assert said in str(error.value)


def test_chips_of_a_target_are_described_alike():
    targets = {chip.target for chip in CHIPS.values() if chip.platform == "cuda"}
    for target in targets:
        text = target_config(target)
        assert text.count("{") == text.count("}")
        smallest = min(c.memory for c in CHIPS.values() if c.target == target)
        assert f"device_memory_size: {round(smallest / 0.95)}" in text
