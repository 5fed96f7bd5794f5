"""Prompt lookup gives the answers that there are without it."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

from llava_jax.errors import ConfigError
from llava_jax.generate import Engine, Generator, Job
from llava_jax.generate.beam import check
from llava_jax.generate.lookup import guesses
from llava_jax.generate.request import Request
from llava_jax.settings import SamplingSettings
from llava_jax.text.example import Example
from tests.generate.tiny import CONFIG, MIXED, params, prompt


def test_guesses_follow_the_last_place_where_the_most_tokens_stood():
    history = np.full((5, 16), -1, np.int32)
    rows = [
        [5, 6, 7, 8, 9, 5, 6, 7],  # three stood before: what followed them
        [6, 7, 1, 6, 7, 2, 9, 6, 7],  # two, twice: the later place
        [1, 2, 3, 6, 7, 4, 2, 3, 8, 1, 2, 3],  # three rather than a later two
        [4, 3, 4, 3, 4, 3],  # a pattern goes on
        [7, -1, -1, 8, 7],  # nothing
    ]
    for line, row in zip(history, rows):
        line[: len(row)] = row
    at = jnp.array([len(row) - 1 for row in rows])
    found = guesses(jnp.asarray(history), at, 4).tolist()
    assert found == [[8, 9, 5, 6], [2, 9, 6, 7], [6, 7, 4, 2], [4, 3, 4, 3], [-1] * 4]


END = 31  # of the second answer below, whose 22nd token it is; the others go on


@cache
def engine() -> Engine:
    return Engine(Generator(CONFIG, params(), eos_ids=(END,)), 4)


def asked(**settings) -> list[Job]:
    long = prompt(225, 1, seed=1)  # 228 of 256 positions: its answer ends with the context
    again = Example(np.tile(prompt(12).ids, 4))
    of = [SamplingSettings(max_new_tokens=n, **settings) for n in (60, 33, 100, 1)]
    own = engine()
    jobs = [own.submit(Job(p, s)) for p, s in zip((MIXED[2], again, long, MIXED[0]), of)]
    own.counts.clear()
    own.run(jobs)
    return jobs


def same(jobs: list[Job], others: list[Job]) -> None:
    for job, other in zip(jobs, others, strict=True):
        assert (job.ids, job.reason) == (other.ids, other.reason)
        np.testing.assert_allclose(job.logprobs, other.logprobs, atol=1e-5)


def test_answers_are_the_same_in_fewer_passes():
    plain = asked()
    assert [len(job.ids) for job in plain] == [60, 22, 28, 1]
    assert [job.reason for job in plain] == ["length", "stop", "length", "length"]
    assert not engine().counts["lookup_passes"]
    same(asked(prompt_lookup=4), plain)
    assert 0 < engine().counts["lookup_passes"] < 45  # of the 59 that they take one by one
    # Where a row wants more than the likeliest token, none is guessed.
    warm = [asked(prompt_lookup=n, temperature=1.0, seed=3) for n in (0, 4)]
    same(*warm)
    assert not engine().counts["lookup_passes"]
    assert engine().generator.compiled["lookup"] == 1


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.2},
        {"top_logprobs": 2},
        {"logit_bias": {3: 1}},
    ],
    ids=str,
)
def test_what_is_not_greedy_is_refused_by_name(given):
    with pytest.raises(
        ConfigError, match=f"{next(iter(given))} cannot be given with prompt_lookup"
    ):
        Request("a", prompt_lookup=4, **given)
    with pytest.raises(ConfigError, match="prompt_lookup is 17, but must be from 0 to 16"):
        Request("a", prompt_lookup=17)
    with pytest.raises(ConfigError, match="prompt_lookup cannot be given with num_beams"):
        check(Request("a", prompt_lookup=4), 1, 2, 1.0)
