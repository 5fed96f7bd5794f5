"""The rules by which a token is chosen, against a plain numpy reading of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.errors import ConfigError
from llava_jax.generate.sampling import Controls, Said, choose_token, smallest_allowed
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
    # From flat to peaked: of flat ones more than the few likeliest are kept.
    logits = np.random.default_rng(0).normal(0, 1, (6, 700)) * [[0.1], [0.5], [1], [2], [3], [4]]
    logits = logits.astype(np.float32)
    cut = smallest_allowed(logits, np.full(6, top_k), np.full(6, top_p, np.float32))
    for row, smallest in zip(logits, np.asarray(cut)):
        assert set(np.flatnonzero(row >= smallest)) == kept_by_hand(row, top_k, top_p)


def draws(logits, setting: SamplingSettings, n: int) -> np.ndarray:
    rows = [setting.__class__(**{**vars(setting), "seed": seed}) for seed in range(n)]
    return np.asarray(chosen(np.tile(logits, (n, 1)), rows)[0])


def chosen(logits, rows, step: int = 0, **more):
    """choose_token of rows of settings; more: fields of Said."""
    n, vocab = logits.shape
    controls = [Controls.of(row, 1, more.get("bias")) for row in rows]
    said = Said(
        np.full(n, step, np.int32),
        *(np.zeros((n, vocab), kind) for kind in (np.int32, bool, np.float32)),
        np.zeros(n, bool),
        np.zeros((n, -(-vocab // 32)), np.uint32),
    )
    said = said._replace(**{k: v for k, v in more.items() if k != "bias"})
    if "bias" in more:
        said.bias[:, list(more["bias"])] = list(more["bias"].values())
    arrays = Controls(*map(np.stack, zip(*controls))), said
    return choose_token(jnp.asarray(logits), *jax.tree.map(jnp.asarray, arrays))


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
    first, _ = chosen(logits, rows)
    assert first[0] == first[1] != first[2]
    with jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(chosen(logits, rows)[0], first)
    assert chosen(logits, rows, 1)[0][0] != first[0]


def test_a_low_temperature_is_greedy_and_the_logprob_is_the_model_s():
    logits = np.array([[0.0, 2.0, 1.0]], np.float32)
    for setting in (
        SamplingSettings(),
        SamplingSettings(temperature=1e-3),
        SamplingSettings(temperature=5.0, top_k=1),
    ):
        token, logprob = chosen(logits, [setting])
        assert token[0] == 1
        np.testing.assert_allclose(logprob[0], 2 - np.log(np.exp(logits).sum()), rtol=1e-6)


def test_penalties_bias_and_constraint_change_the_choice_and_not_the_logprob():
    logits = np.array([[3.0, 2.5, 2.0, -1.0]] * 2, np.float32)
    counts = np.array([[2, 0, 0, 0]] * 2, np.int32)
    plain = SamplingSettings()

    def first(setting, **more):
        token, logprob = chosen(logits, [setting, plain], **more)
        want = logits[0] - np.log(np.exp(logits[0]).sum())
        np.testing.assert_allclose(logprob, want[np.asarray(token)], rtol=1e-6)
        return token.tolist()

    assert first(SamplingSettings(presence_penalty=0.6), counts=counts) == [1, 0]
    assert first(SamplingSettings(presence_penalty=0.4), counts=counts) == [0, 0]
    assert first(SamplingSettings(frequency_penalty=0.3), counts=counts) == [1, 0]
    asked = np.array([[1, 1, 0, 0]] * 2, bool)
    assert first(SamplingSettings(repetition_penalty=2.0), asked=asked) == [2, 0]
    assert first(plain, bias={3: 10.0}) == [3, 3]
    allowed = np.array([[0b1100], [0]], np.uint32)
    constrained = np.array([True, False])
    assert first(plain, allowed=allowed, constrained=constrained) == [2, 0]


def test_min_p_leaves_tokens_nearly_as_likely_as_the_likeliest():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    assert set(draws(logits, SamplingSettings(temperature=1.0, min_p=0.25), 400)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
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
