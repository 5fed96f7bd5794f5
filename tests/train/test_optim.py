"""Rules of the update: schedule, groups, moving average; and the z-loss. Off, they change no bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llava_jax.layers import Compute
from llava_jax.llava import build
from llava_jax.train.loss import supervised_nll
from llava_jax.train.optim import exported_params, make_optimizer, warmup_steps
from llava_jax.train.step import make_loss
from tests.tiny import CONFIG, random_batch, random_params
from tests.train.test_step import settings


def updates(steps=3, **changes):
    """(parameters before, after each step, the last state) under a gradient of the parameters."""
    params = {"projector.linear_0.kernel": jnp.arange(6.0).reshape(2, 3) + 1}
    params["language.norm.scale"] = jnp.ones(3)
    optimizer, _ = make_optimizer(settings(**changes), sorted(params), steps)
    seen: list[Any]
    state, seen = optimizer.init(params), [params]
    for _ in range(steps):
        change, state = optimizer.update(seen[-1], state, seen[-1])
        seen.append(optax.apply_updates(seen[-1], change))
    return seen, state


def test_rates_of_a_group_are_used():
    plain, _ = updates(1, lr=1e-2, projector_lr=None, weight_decay=0.0)
    word = r"re:.*\.scale lr=0"
    still, _ = updates(1, lr=1e-2, projector_lr=None, weight_decay=0.0, param_groups=(word,))
    name = "projector.linear_0.kernel"
    np.testing.assert_array_equal(still[1][name], plain[1][name])
    np.testing.assert_array_equal(still[1]["language.norm.scale"], plain[0]["language.norm.scale"])
    assert not np.array_equal(plain[1]["language.norm.scale"], plain[0]["language.norm.scale"])


def test_under_muon_a_groups_rates_are_those_that_were_set():
    """The ratio of Adam's part, and its missing decay, are for what no group sets."""
    names = ["language.layers.mlp.up.kernel", "language.embed.embedding", "language.norm.scale"]
    base = {"optimizer": "muon", "lr": 0.01, "projector_lr": None, "weight_decay": 0.1}

    def peaks(*groups):
        return make_optimizer(settings(**base, param_groups=groups), names, 9)[1]

    assert peaks() == {"muon_lr0.01_wd0.1": 0.01, "adamw_lr0.0015_wd0": 0.0015}
    found = peaks("embed lr=0.003 weight_decay=0.2", r"re:.*\.kernel lr=0.02")
    assert found == {
        "muon_lr0.02_wd0.1": 0.02,
        "adamw_lr0.003_wd0.2": 0.003,
        "adamw_lr0.0015_wd0": 0.0015,
    }
    close = peaks("embed lr=0.00150000001")  # rates that print alike are two groups all the same
    assert sorted(close.values()) == [0.0015, 0.00150000001, 0.01]


def test_the_moving_average_is_one_and_changes_no_update():
    plain, state = updates()
    assert exported_params(plain[-1], state) is plain[-1]
    seen, state = updates(ema_decay=0.9)
    jax.tree.map(np.testing.assert_array_equal, seen, plain)
    wanted = plain[0]
    for after in plain[1:]:
        wanted = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, wanted, after)
    jax.tree.map(np.testing.assert_allclose, exported_params(seen[-1], state), wanted)


def test_z_loss_adds_the_squared_normalizer():
    params, batch = random_params(CONFIG, 1), random_batch(4)
    model = build(CONFIG, params)
    hidden, targets = model(batch, at_GP=batch["target_at"]), batch["targets"]
    plain = supervised_nll(model, hidden, targets)
    log_z = jax.nn.logsumexp(model.logits(hidden), axis=-1)
    wanted = plain + np.where(targets == -100, 0, 1e-2 * log_z**2)
    found = supervised_nll(model, hidden, targets, z_loss=1e-2)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    off = jax.make_jaxpr(make_loss(CONFIG, Compute(), 1, 0.0))(params, {}, batch)
    assert str(off) == str(jax.make_jaxpr(make_loss(CONFIG, Compute()))(params, {}, batch))


@pytest.mark.parametrize(("steps", "warmup"), [(2181, 66), (5198, 156), (0, 0)])
def test_warm_up_of_the_original_s_stages(steps, warmup):
    assert warmup_steps(0.03, steps) == warmup
