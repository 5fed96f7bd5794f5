"""Where parameters lie. tests/golden/params_7b.txt is the list to review when a rule changes."""

import dataclasses
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llava_jax import sharding
from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError
from llava_jax.llava import abstract_params, param_shardings
from llava_jax.sharding import (
    counted_row_parts,
    make_mesh,
    own_row_parts,
    put_batch,
    spec,
    undivided,
)
from llava_jax.train.select import GROUPS, has_decay
from tests.tiny import CONFIG, random_batch

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


def test_what_does_not_divide_stays_whole_and_is_said_once(caplog):
    sharding._say_once.cache_clear()  # another test may have heard it
    mesh = make_mesh(fsdp=2, tensor=4)
    assert spec((6, 8), ("embed", "mlp"), make_mesh(fsdp=4, tensor=2), {}) == P(None, "tensor")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            shardings = param_shardings(CONFIG, mesh)
    said = [r.message for r in caplog.records]
    assert len(said) == 2, said
    assert "mesh.tensor=4 does not divide the 2 KV heads of the language model" in said[0]
    assert "mesh.tensor=2 would divide them" in said[0]
    assert "2 heads of the vision tower" in said[1]
    # 32 entries, which 4 divides; but a head of 16 is never cut.
    assert shardings["language.layers.attn.k.kernel"].spec == P(None, "fsdp", None)
    assert shardings["language.layers.attn.q.kernel"].spec == P(None, "fsdp", "tensor")
    assert not undivided(LlavaConfig.v15_7b(), make_mesh(fsdp=4, tensor=2))
    assert "fsdp x mesh.context = 5" in undivided(CONFIG, five())[0]


def test_advice_on_the_mesh_is_a_number_that_divides():
    odd = dataclasses.replace(CONFIG.language, vocab_size=333)
    three = make_mesh(tensor=3, fsdp=2, devices=jax.devices()[:6])
    lines = undivided(dataclasses.replace(CONFIG, language=odd), three)
    assert not [line for line in lines if "=1 would" in line or " 1 would" in line]
    heads = next(line for line in lines if "heads of the language model" in line)
    assert heads.endswith("mesh.tensor=2 would divide them")  # 3 and 4 have no divisor in common
    assert undivided(CONFIG, five())[0].endswith("no part of 5 devices would")


def five():
    return make_mesh(devices=jax.devices()[:5])


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
    assert spec((64, 8), ("embed", "mlp"), mesh, {}) == P(("fsdp", "context"), "tensor")


def test_lengths_that_the_context_axis_does_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"rows of 24 positions .* mesh.context=5") as refused:
        put_batch(random_batch(8), make_mesh(context=5, devices=jax.devices()[:5]), micro=1)
    assert "data.length_buckets" in str(refused.value)


class Device:
    """Of a TPU that is not there."""

    platform, device_kind, core_on_chip = "tpu", "stand-in", 0

    def __init__(self, number: int, slice_index: int):
        self.id, self.slice_index, self.process_index = number, slice_index, number // 4
        self.coords = (number % 4, number % 8 // 4, 0)


def test_slices_take_rows_apart_and_hold_the_other_axes_whole():
    devices = [Device(i, i // 8) for i in range(16)]
    for slices in (0, 2):  # 0: as many as the devices are of
        found = make_mesh(fsdp=-1, tensor=2, slices=slices, devices=devices)
        assert tuple(found.shape.values()) == (2, 4, 1, 2)
        for part, of_one in enumerate(found.devices):
            assert {d.slice_index for d in of_one.flat} == {part}
    for slices in (1, 4):
        wrong = f"(mesh.slices is {slices}, but the number of slices is 2|does not fit)"
        with pytest.raises(ConfigError, match=wrong):
            make_mesh(slices=slices, devices=devices)
    with pytest.raises(ConfigError, match=r"the number of processes is 1"):
        make_mesh(slices=2)


def test_rows_that_two_processes_hold_are_counted_by_one(monkeypatch):
    """A context axis over two processes, and one that each process holds for itself."""

    def parts(process, order):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        devices = np.array([SimpleNamespace(process_index=p) for p in order]).reshape(2, 1, 2, 1)
        sizes = {"data": 2, "fsdp": 1, "context": 2, "tensor": 1}
        mesh: Any = SimpleNamespace(devices=devices, shape=sizes)
        return own_row_parts(mesh, 2), counted_row_parts(mesh, 2)

    shared = [parts(process, (0, 1, 0, 1)) for process in (0, 1)]
    assert shared == [((0, 1, 2, 3), (0, 1, 2, 3)), ((0, 1, 2, 3), ())]
    apart = [parts(process, (0, 0, 1, 1)) for process in (0, 1)]
    assert apart == [((0, 2), (0, 2)), ((1, 3), (1, 3))]
