"""Where parameters lie. tests/golden/params_7b.txt is the list to review when a rule changes."""

import logging
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError
from llava_jax.llava import abstract_params, param_shardings
from llava_jax.sharding import make_mesh, put_batch, spec
from llava_jax.train.select import GROUPS, has_decay
from tests.tiny import random_batch

GOLDEN = Path(__file__).parent / "golden" / "params_7b.txt"


def listing() -> str:
    """Every parameter of the 7B: shape, place on FSDP 4 x tensor 2, group, weight decay."""
    config = LlavaConfig.v15_7b()
    shardings = param_shardings(config, make_mesh(fsdp=4, tensor=2))
    lines = []
    for name, leaf in abstract_params(config).items():
        groups = [g for g in ("projector", "language", "vision") if GROUPS[g](name)]
        decay = "decay" if has_decay(name) else "-"
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"{name}  {shape}  {shardings[name].spec}  {','.join(groups) or '-'}  {decay}")
    return "\n".join(lines) + "\n"


def test_the_7b_lies_as_reviewed():
    assert listing() == GOLDEN.read_text()


def test_nothing_large_is_replicated():
    params = abstract_params(LlavaConfig.v15_13b())
    shardings = param_shardings(LlavaConfig.v15_13b(), make_mesh(fsdp=8))
    on_a_device = sum(
        math.prod(shardings[name].shard_shape(leaf.shape)) for name, leaf in params.items()
    )
    assert on_a_device < sum(leaf.size for leaf in params.values()) / 8 * 1.01


def test_mesh_fills_in_one_axis():
    assert tuple(make_mesh(data=2).shape.values()) == (2, 4, 1, 1)
    assert tuple(make_mesh(context=2, tensor=2).shape.values()) == (1, 2, 2, 2)
    assert tuple(make_mesh(devices=jax.devices()[:1]).shape.values()) == (1, 1, 1, 1)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"data": -1, "fsdp": -1}, {"tensor": 0}])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError):
        make_mesh(**sizes)


def test_an_axis_that_does_not_divide_is_named_and_kept_whole(caplog):
    with caplog.at_level(logging.WARNING):
        placed = spec("a.kernel", (6, 8), ("embed", "mlp"), make_mesh(fsdp=4, tensor=2))
    assert placed == P(None, "tensor")
    assert "a.kernel" in caplog.text
    assert "embed" in caplog.text


def test_batches_are_split_by_rows():
    batch = put_batch(random_batch(16), make_mesh(data=2, fsdp=4), micro=2)
    assert batch["tokens"].sharding.shard_shape(batch["tokens"].shape)[:2] == (2, 1)
    images = random_batch(16)["images"]
    np.testing.assert_array_equal(batch["images"], images.reshape(2, 8, *images.shape[1:]))


def test_a_context_axis_splits_positions_and_parameters():
    mesh = make_mesh(context=2, fsdp=4)
    batch = put_batch(random_batch(8, length=24), mesh, micro=1)
    sizes = {name: x.sharding.shard_shape(x.shape) for name, x in batch.items()}
    assert sizes["tokens"] == (1, 2, 12)
    assert sizes["targets"] == (1, 2, 6)
    np.testing.assert_array_equal(batch["tokens"][0], random_batch(8, length=24)["tokens"])
    assert spec("a.kernel", (64, 8), ("embed", "mlp"), mesh) == P(("fsdp", "context"), "tensor")


def test_lengths_that_the_context_axis_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"rows of 24 positions .* mesh.context=5") as refused:
        put_batch(random_batch(8), make_mesh(context=5, devices=jax.devices()[:5]), micro=1)
    assert "data.length_buckets" in str(refused.value)
