"""The optimizer step: chunked equals whole, frozen stays frozen."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.config import LoraConfig
from llava_jax.layers import Compute
from llava_jax.llava import build, param_shardings
from llava_jax.sharding import make_mesh, put_batch
from llava_jax.train.loss import mean_loss, supervised_nll
from llava_jax.train.optim import make_optimizer
from llava_jax.train.select import trainable_names
from llava_jax.train.step import RECENT, TrainState, is_spike, make_loss, make_step, no_recent
from tests.tiny import CONFIG, grouped, random_batch, random_params


def settings(**changes):
    base = {
        "optimizer": "adamw",
        "lr": 1e-2,
        "projector_lr": 5e-3,
        "vision_lr": None,
        "param_groups": (),
        "ema_decay": 0.0,
        "warmup_ratio": 0.0,
        "lr_end_ratio": 0.0,
        "weight_decay": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "clip_norm": 1.0,
        "muon_adam_lr_ratio": 0.15,
    }
    return SimpleNamespace(**{**base, **changes})


def run(config, groups, steps=4, compute=None, micro=1, average="global", **changes):
    """(losses, final state, parameters at the start) of a few steps."""
    mesh = make_mesh(devices=jax.devices()[:1])
    start = random_params(config, 1)
    params = jax.device_put(start, param_shardings(config, mesh))
    names = trainable_names(params, groups)
    trained = {n: v for n, v in params.items() if n in names}
    frozen = {n: v for n, v in params.items() if n not in names}
    optimizer, _ = make_optimizer(settings(**changes), sorted(names), steps)
    state = TrainState(jnp.int32(0), trained, jax.jit(optimizer.init)(trained))
    step = jax.jit(
        make_step(make_loss(config, compute or Compute()), optimizer, average=average, seed=0)
    )
    losses = []
    with jax.set_mesh(mesh):
        for number in range(steps):
            batch = put_batch(random_batch(8, seed=number % 2, config=config), mesh, micro)
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return losses, state, start


@pytest.fixture(scope="module")
def single():
    return run(CONFIG, ("projector", "language"))


def test_rows_that_share_images_and_targets_lose_nothing():
    """Loss and every gradient, where the images and targets of two rows are one list."""
    params, batch = random_params(CONFIG, 1), random_batch(8)
    value_and_grad = jax.jit(jax.value_and_grad(make_loss(CONFIG, Compute())))
    # Not the tower's: the gradient of a key's bias is 0 but for rounding.
    tower = {name: params.pop(name) for name in list(params) if name.startswith("vision")}
    loss, grads = value_and_grad(params, tower, batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    where = param_shardings(CONFIG, mesh)
    params, tower = (
        {name: jax.device_put(value, where[name]) for name, value in part.items()}
        for part in (params, tower)
    )
    with jax.set_mesh(mesh):
        pieces = put_batch(grouped(batch, 4), mesh, 1)
        other, others = value_and_grad(params, tower, {n: v[0] for n, v in pieces.items()})
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for name, grad in grads.items():
        scale = float(jnp.abs(grad).max())
        np.testing.assert_allclose(others[name], grad, atol=1e-5 * scale, err_msg=name)


def test_micro_average_weighs_batches_alike():
    params = random_params(CONFIG, 1)
    batch = random_batch(8)
    loss = make_loss(CONFIG, Compute())
    halves = [loss(params, {}, {k: v[i : i + 4] for k, v in batch.items()}) for i in (0, 4)]
    losses, _, _ = run(CONFIG, ("projector",), steps=1, micro=2, average="micro")
    assert losses[0] == pytest.approx(float(sum(halves)) / 2, abs=1e-5)
    grouped = make_loss(CONFIG, Compute(), groups=2)(params, {}, batch)
    assert float(grouped) == pytest.approx(losses[0], abs=1e-5)


@pytest.mark.parametrize(
    ("groups", "optimizer"),
    [
        (("projector", "language"), "muon"),
        # The tower alone; quick: tests/train/test_select.py, by name.
        pytest.param(("vision",), "adamw", marks=pytest.mark.slow),
    ],
)
def test_only_the_chosen_groups_move(groups, optimizer):
    losses, state, start = run(CONFIG, groups, optimizer=optimizer, steps=3)
    chosen = trainable_names(start, groups)
    assert set(state.params) == chosen
    moved = {n for n in chosen if not np.array_equal(state.params[n], start[n])}
    # The key bias shifts all scores of a query alike: its gradient is zero up to rounding.
    assert {n for n in chosen - moved if not n.endswith("k.bias")} == set()
    assert losses[2] < losses[0]


def test_lora_starts_equal_and_trains_adapters_only():
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.1))
    params = random_params(config, 1)
    plain = {n: v for n, v in params.items() if "lora" not in n}
    batch = random_batch(4)
    with_lora = build(config, params)
    without = build(CONFIG, plain)
    np.testing.assert_array_equal(with_lora(batch), without(batch))
    # 40 steps' worth of learning rate in a few: the first update only moves lora_b off zero.
    losses, state, _ = run(config, ("projector", "lora"), lr=5e-2)
    assert losses[-1] < losses[0]
    assert all("lora" in n or n.startswith("projector") for n in state.params)


def test_chunked_loss_is_exact():
    params = random_params(CONFIG, 1)
    model, batch = build(CONFIG, params), random_batch(4)
    hidden = model(batch, at_GP=batch["target_at"])
    whole = supervised_nll(model, hidden, batch["targets"])
    pieces = supervised_nll(model, hidden, batch["targets"], chunk=4)
    np.testing.assert_allclose(whole, pieces, atol=1e-6)
    logits = jax.nn.log_softmax(model.logits(model(batch)))
    row, column = 3, 2
    at, target = batch["target_at"][row, column], batch["targets"][row, column]
    assert float(whole[row, column]) == pytest.approx(-float(logits[row, at, target]), abs=1e-5)


def test_mean_loss_of_nothing_is_zero():
    assert float(mean_loss(jnp.zeros((2, 3)), jnp.full((2, 3), -100))) == 0.0


@pytest.mark.slow  # quick: the recipes of tests/rehearsal run in bfloat16
def test_bf16_runs_and_keeps_fp32_masters():
    losses, state, _ = run(
        CONFIG, ("projector", "language"), compute=Compute(jnp.bfloat16, remat="full")
    )
    assert all(v.dtype == jnp.float32 for v in state.params.values())
    assert np.isfinite(losses).all()


def test_spikes_and_what_is_not_finite_are_skipped_and_what_is_usual_is_not():
    """x1000, infinity and NaN at one step each: everything but their count stays as it was, to the bit."""

    def loss(trained, frozen, batch, key=None):
        return jnp.sum((trained["a"] - batch["x"].mean()) ** 2)

    optimizer = optax.adam(1e-3)
    step = jax.jit(make_step(loss, optimizer, average="global", seed=None, spikes=6.0))
    params = {"a": jnp.ones(3)}
    state = TrainState(jnp.int32(0), params, optimizer.init(params), no_recent())
    rng = np.random.default_rng(0)
    bad = {3: np.nan, RECENT - 5: 1000, RECENT - 4: np.inf, RECENT - 3: np.nan}
    for number in range(RECENT):
        x = rng.normal(size=(1, 2, 3)).astype(np.float32) * bad.get(number, 1)
        before = jax.tree.map(np.asarray, state)
        state, metrics = step(state, {}, {"x": x, "targets": np.zeros((1, 2, 3), np.int32)})
        assert metrics["ok"] == (number not in bad), number
        pair = before._replace(step=0), state._replace(step=0)
        same = jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), *pair)
        assert all(jax.tree.leaves(same)) == (not metrics["ok"])
    assert state.step == RECENT


def test_rounding_is_no_spike_and_neither_is_a_fall():
    recent = jnp.tile(jnp.float32([[2.3], [0.7]]), (1, RECENT))
    assert not is_spike(jnp.float32([2.3000002, 0.7]), recent, 6.0)
    assert is_spike(jnp.float32([2.31, 0.7]), recent, 6.0)
    assert is_spike(jnp.float32([2.3, 0.71]), recent, 6.0)
    assert not is_spike(jnp.float32([0.1, 0.1]), recent, 6.0)  # downwards is none


def test_losses_of_data_files_are_those_of_their_targets_alone():
    params, batch = random_params(CONFIG, 1), random_batch(4)
    batch["files"] = np.random.default_rng(0).integers(0, 2, batch["targets"].shape)
    loss = jax.jit(make_loss(CONFIG, Compute(), files=3))
    value, sums = loss(params, {}, batch)
    assert float(sums[0].sum() / sums[1].sum()) == pytest.approx(float(value), rel=1e-6)
    held = batch["targets"] != -100
    assert sums[1].tolist() == [(held & (batch["files"] == n)).sum() for n in range(3)]
    for n in (0, 1):
        own = {**batch, "targets": np.where(batch["files"] == n, batch["targets"], -100)}
        alone = float(loss(params, {}, own)[0])
        assert float(sums[0][n] / sums[1][n]) == pytest.approx(alone, rel=1e-5)
