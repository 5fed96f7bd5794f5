"""The rules by which a token is chosen, against a plain numpy reading of them."""

import jax
import numpy as np
import pytest

from llava_jax.errors import ConfigError
from llava_jax.generate.sampling import Controls, choose_token, smallest_allowed
from llava_jax.settings import SamplingSettings


def kept_by_hand(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The tokens that top-k and then top-p leave."""
    order = np.argsort(-logits)
    order = order[: top_k or len(order)]
    likely = np.exp(logits[order] - logits.max())
    likely /= likely.sum()
    kept, total = set(), 0.0
    for token, p in zip(order, likely):
        kept.add(int(token))
        total += p
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (5, 0.5), (99, 0.9), (0, 1e-9)]
)
def test_what_top_k_and_top_p_keep(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (6, 40)).astype(np.float32)
    cut = smallest_allowed(logits, np.full(6, top_k), np.full(6, top_p, np.float32))
    for row, smallest in zip(logits, np.asarray(cut)):
        assert set(np.flatnonzero(row >= smallest)) == kept_by_hand(row, top_k, top_p)


def draws(logits, setting: SamplingSettings, n: int) -> np.ndarray:
    rows = [setting.__class__(**{**vars(setting), "seed": seed}) for seed in range(n)]
    return np.asarray(choose_token(np.tile(logits, (n, 1)), Controls.of(rows, [1] * n), 0)[0])


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    count = np.bincount(draws(logits, SamplingSettings(temperature=1.0), 4000), minlength=4) / 4000
    np.testing.assert_allclose(count, [0.5, 0.3, 0.15, 0.05], atol=0.03)
    count = np.bincount(draws(logits, SamplingSettings(temperature=0.5), 4000), minlength=4) / 4000
    want = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(count, want / want.sum(), atol=0.03)
    assert set(draws(logits, SamplingSettings(temperature=1.0, top_k=2), 200)) == {0, 1}
    assert set(draws(logits, SamplingSettings(temperature=1.0, top_p=0.81), 400)) == {0, 1, 2}


def test_a_seed_and_a_step_settle_the_draw():
    logits = np.zeros((3, 1000), np.float32)
    rows = [SamplingSettings(temperature=1.0, seed=s) for s in (5, 2**32 + 5, 6)]
    controls = Controls.of(rows, [1] * 3)
    first, _ = choose_token(logits, controls, 0)
    assert first[0] == first[1] != first[2]
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(choose_token(logits, controls, 0)[0], first)
    assert choose_token(logits, controls, 1)[0][0] != first[0]


def test_a_low_temperature_is_greedy_and_the_logprob_is_the_model_s():
    logits = np.array([[0.0, 2.0, 1.0]], np.float32)
    for setting in (
        SamplingSettings(),
        SamplingSettings(temperature=1e-3),
        SamplingSettings(temperature=5.0, top_k=1),
    ):
        token, logprob = choose_token(logits, Controls.of([setting], [1]), 0)
        assert token[0] == 1
        np.testing.assert_allclose(logprob[0], 2 - np.log(np.exp(logits).sum()), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("top_k", 2.0),
        ("seed", 1.5),
        ("max_new_tokens", 0),
    ],
)
def test_a_senseless_setting_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        SamplingSettings(**{name: value})
