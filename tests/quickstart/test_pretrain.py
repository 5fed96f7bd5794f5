"""Making the tiny model: what stands in an image's place, and that both halves learn."""

import json

import jax
import numpy as np
import pytest

from llava_jax.convert import load_checkpoint
from llava_jax.errors import ConfigError
from llava_jax.quickstart import pretrain
from llava_jax.quickstart.dataset import make_dataset
from llava_jax.quickstart.fit import epochs
from llava_jax.quickstart.language import StandIn, TextSample, text_batches
from llava_jax.text.sample import ExampleMaker
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.config import load_config


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = make_dataset(
        tmp_path_factory.mktemp("quickstart") / "data", train=64, held_out=1, seed=0
    )
    config = load_config("quickstart", [f"--config.data_folder={folder}"])
    config.tiny.tower_steps = config.tiny.language_steps = 12
    config.tiny.tower_width, config.tiny.tower_layers = 32, 2
    config.tiny.language_width, config.tiny.language_mlp = 32, 48
    config.tiny.tower_batch = config.tiny.language_batch = 16
    config.tiny.language_records = 32
    return config


@pytest.fixture(scope="module")
def tokenizer(config, tmp_path_factory):
    records = pretrain.training_records(config.data)
    return pretrain.make_tokenizer(config.tiny, records, tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    return pretrain.make(config, tmp_path_factory.mktemp("made") / "initial")


def test_the_made_model_is_a_checkpoint_like_any_other(made, config):
    checkpoint = load_checkpoint(made)
    assert checkpoint.config == pretrain.make_config(
        config.tiny, len(Tokenizer.load(checkpoint.tokenizer))
    )
    assert (
        checkpoint.config.language.vocab_size == checkpoint.params["language.head.kernel"].shape[1]
    )
    assert all(np.isfinite(value).all() for value in checkpoint.params.values())


def test_both_halves_learn_and_the_projector_does_not(made, config):
    for name in ("tower", "language"):
        rows = [json.loads(x) for x in (made.parent / name / "metrics.jsonl").open()]
        assert [row["step"] for row in rows] == list(range(1, 13))
        assert rows[-1]["loss"] < rows[0]["loss"]
    from llava_jax.llava import init_params

    checkpoint = load_checkpoint(made)
    start = init_params(checkpoint.config, config.seed)
    for name, value in checkpoint.params.items():
        untouched = np.array_equal(value, start[name])
        assert untouched == name.startswith(("projector.", "vision.tail.")), name


def test_batches_of_text(config, tokenizer):
    model_config = pretrain.make_config(config.tiny, len(tokenizer))
    records = [r for r in pretrain.training_records(config.data) if "turns" not in r][:8]
    maker = ExampleMaker(tokenizer, max_length=None, image_tokens=1, turns="independent")
    caption = "a red circle at the bottom left"
    samples = [TextSample(maker(record), caption) for record in records]
    batches = text_batches(model_config, tokenizer, [samples], (5,), 3, seed=0)
    batch = next(batches)
    assert batch["tokens"].shape == batch["words"].shape[:2] == next(batches)["tokens"].shape
    assert "images" not in batch
    for row in range(5):
        slots = np.flatnonzero(batch["slots"][row] >= 0)
        assert len(slots) == model_config.image_tokens
        words = batch["words"][row, slots].reshape(4, 4, -1)
        assert (words[:2] < 0).all()
        assert (words[:, 2:] < 0).all()
        said = {tokenizer.decode([i]) for i in words.ravel() if i >= 0}
        assert said == {"red", "circle", "bottom left"}
        assert (np.delete(batch["words"][row], slots, axis=0) < 0).all()
        assert set(batch["turns"][row]) == {0, 1, 2, 3}


def test_a_caption_without_places_stands_somewhere(config, tokenizer):
    model_config = pretrain.make_config(config.tiny, len(tokenizer))
    stand_in = StandIn(model_config, tokenizer, ["a red circle"])
    rng = np.random.RandomState(0)
    used = [np.flatnonzero((stand_in.words("a red circle", rng) >= 0).any(1)) for _ in range(50)]
    assert all(1 <= len(slots) <= 4 for slots in used)
    assert set(np.concatenate(used)) == set(range(16))


def test_frequent_lines_become_phrases():
    texts = ["a?\nUse one word.", "b?\nUse one word.", "c?\nBe brief.\nUse one word.", "d"] * 5
    assert pretrain.common_lines(texts, share=0.3) == ["\nUse one word."]


def test_epochs_show_everything_once_before_anything_twice():
    batches = epochs(10, 4, seed=0)
    seen = np.concatenate([next(batches) for _ in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_a_run_without_captions_is_refused(config):
    stages = config.copy_and_resolve_references()
    stages.stages.stage1.data.version = "v1"
    with pytest.raises(ConfigError, match="captions"):
        pretrain.make(stages, "unused")


def test_kept_aside_images_are_not_seen(config):
    data = config.data.copy_and_resolve_references()
    data.holdout = 0.5
    kept = {record["image"] for record in pretrain.training_records(data)}
    data.path = data.path.replace("instruct", "captions")
    assert kept == {record["image"] for record in pretrain.training_records(data)}
    assert 10 < len(kept) < 54


def teardown_module():
    jax.clear_caches()
