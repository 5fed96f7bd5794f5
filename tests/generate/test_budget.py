"""Token budgets in prompts, slots and caches; which features they keep is tested in tests/parity."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llava_jax
from llava_jax import llava
from llava_jax.batch import Shape, collate, prompt_shape
from llava_jax.config import LlavaConfig, TokenBudget
from llava_jax.errors import ConfigError, PromptError
from llava_jax.generate import Engine, Generator, Job
from llava_jax.settings import SamplingSettings
from llava_jax.text.example import Example
from tests.generate.tiny import CONFIG, params, prompt

LONG = SamplingSettings(max_new_tokens=20)
WHOLE = replace(CONFIG, vision=replace(CONFIG.vision, image_size=48))  # 9 features of an image
BUDGETS = [TokenBudget(4, "visionzip"), TokenBudget(4, "divprune", "original")]


def shown(length: int, images: int = 0, seed: int = 0) -> Example:
    rng = np.random.default_rng(seed)
    pictures = rng.integers(0, 256, (images, 48, 48, 3), dtype=np.uint8)
    return Example(prompt(length, images, seed).ids, tuple(pictures))


# Of lengths whose last chunks have one shape.
PROMPTS = [shown(13, 1, 1), shown(16), shown(20, 3, 2), shown(26, 2, 3)]


@cache
def forward(config):
    model = llava.build(config, {k: jnp.asarray(v) for k, v in params(config).items()})
    return jax.jit(lambda batch: model.logits(model(batch)))


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_answers_equal_a_full_forward_alone_and_packed(budget):
    config = replace(WHOLE, budget=budget)
    own = Generator(config, params(config), eos_ids=(-1,), chunk=16)
    engine = Engine(own, 4, keep_logits=True)
    assert engine.state.features.shape[1] == 4
    jobs = [engine.submit(Job(one, LONG)) for one in (*PROMPTS, PROMPTS[2])]
    engine.run(jobs)
    assert jobs[4].ids == jobs[2].ids
    assert engine.counts["pictures_seen"] == 6  # the fifth prompt's were there
    said = [Example([*one.ids, *job.ids], one.images) for one, job in zip(PROMPTS, jobs)]
    for rows in ([[one] for one in said], [said]):
        shape = Shape(4, 256 if len(rows) == 1 else 64, 6, None, 4)
        logits = np.asarray(forward(config)(collate(rows, shape, config)))
        starts = np.cumsum([0, *(one.length(4) for one in said)])
        for i, (one, job) in enumerate(zip(said, jobs)):
            end = one.length(4) - 1
            row = logits[i] if len(rows) > 1 else logits[0, starts[i] :]
            np.testing.assert_allclose(job.logits, row[end - 20 : end], atol=1e-4)
    for one, job in zip(PROMPTS, jobs):
        assert job.length == len(one.ids) + 3 * len(one.images)
        assert job.ids == [int(x.argmax()) for x in job.logits]


def test_original_positions_are_those_among_all_features():
    whole, kept = (replace(WHOLE, budget=b) for b in (None, BUDGETS[1]))
    flat = {k: jnp.asarray(v) for k, v in params(whole).items()}
    one = shown(6, 1)
    batch = collate([[one]], prompt_shape([one], kept), kept)
    model = llava.build(kept, flat)
    given = batch["tokens"], batch["slots"], batch["images"], None, batch["positions"]
    _, positions = jax.jit(model.embed)(*given)
    full = collate([[one]], prompt_shape([one], whole), whole)
    text = batch["slots"][0] < 0
    many = one.length(kept.image_tokens), one.length(whole.image_tokens)
    before = full["positions"][0, : many[1]][full["slots"][0, : many[1]] < 0]
    assert np.asarray(positions)[0, : many[0]][text[: many[0]]].tolist() == before.tolist()
    places = np.asarray(positions)[0][~text] - full["positions"][0][full["slots"][0] == 0]
    assert sorted({*places.tolist()}) == places.tolist()
    assert places.max() > 3  # not one after the other, and of 9
    assert places.max() < 9


def test_the_context_holds_more_pictures_unless_positions_are_kept():
    pictures = shown(40, 30)  # 10 words, 30 images: 280 of 256 positions
    less = replace(WHOLE, budget=TokenBudget(4, "pool"))
    kept = replace(WHOLE, budget=TokenBudget(4, "pool", "original"))
    few = SamplingSettings(max_new_tokens=200)
    for config in (WHOLE, kept):
        own = Generator(config, params(config), eos_ids=(-1,))
        with pytest.raises(PromptError, match="280 positions, 270 of them for 30 images"):
            Engine(own).submit(Job(pictures, few))
    engine = Engine(Generator(less, params(less), eos_ids=(-1,)))
    assert engine.submit(Job(pictures, few)).budget == 256 - 130
    own = Generator(kept, params(kept), eos_ids=(-1,))
    assert Engine(own).submit(Job(shown(20, 10), few)).budget == 256 - (10 + 90)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"image_tokens": 17}, "visionzip takes from 2 to 15 of the 16 features"),
        ({"image_tokens": 1}, "image_tokens is 1, but visionzip takes from 2"),
        ({"image_tokens": -1}, "image_tokens is -1, but must be at least 0"),
        ({"image_tokens": 7, "image_tokens_by": "pool"}, "rows times columns of 4 x 4 patches, not 7"),
        ({"image_tokens": 4, "image_tokens_by": "fastv"}, "image_tokens_by 'fastv' is unknown"),
        ({"image_positions": "original"}, "image_positions has no effect without image_tokens"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_tower_cannot_give_is_refused_by_name(given, what):
    with pytest.raises(ConfigError, match=what):
        llava_jax.load("tiny", **given)


def test_shapes_without_what_a_rule_needs_are_refused_by_name():
    zip_, pool = TokenBudget(4, "visionzip"), TokenBudget(4, "pool")
    windowed = replace(WHOLE.language, sliding_window=6)
    for changes, what in (
        ({"budget": zip_, "feature_layer": 0}, "feature_layer 0 has no attention"),
        ({"budget": pool, "feature_select": "cls_patch"}, "pool has no place for the class token"),
        ({"budget": BUDGETS[1], "language": windowed}, "does not go with a sliding window"),
    ):
        with pytest.raises(ConfigError, match=what):
            replace(WHOLE, **changes)
    replace(WHOLE, budget=zip_, feature_select="cls_patch")


def test_a_budget_is_in_no_file(tmp_path):
    model = llava_jax.load("tiny", image_tokens=8)
    with pytest.raises(ConfigError, match="8 features of an image is not saved"):
        model.save(tmp_path / "out")
    assert "budget" not in WHOLE.to_dict()
    with pytest.raises(ConfigError, match="unknown setting 'budget'"):
        LlavaConfig.from_dict({"budget": {"tokens": 4}})
    assert llava_jax.load("tiny", image_tokens=16).config.budget is None  # all that there are
