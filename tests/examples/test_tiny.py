"""The starting models: how they are made, and that those which ship are what they say."""

import hashlib
import json
import tomllib

import numpy as np
import pytest

from examples.tiny import __main__ as making
from examples.tiny.language import StandIn, with_words
from examples.tiny.vocabulary import SPACE
from llava_jax.convert import load_checkpoint
from llava_jax.convert.io.hub import SHIPPED
from llava_jax.quickstart.dataset import make_dataset
from llava_jax.quickstart.scenes import COLORS, PLACES, SHAPES
from llava_jax.text.tokenizer import Tokenizer
from tests.test_structure import ROOT

SHIPPED_PARTS = [SHIPPED[making.CLIP], SHIPPED[making.VICUNA]]


# What ships -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined():
    return load_checkpoint("tiny-vicuna", vision_tower="tiny-clip")


def test_the_shipped_models_join_into_a_llava(joined):
    """By the ordinary way into stage 1, with the original's defaults."""
    config = joined.config
    assert (config.template, config.feature_layer, config.projector) == (
        *("vicuna_v1", -2, "mlp2x_gelu"),
    )
    assert (config.image_tokens, config.vision_layers_run, config.vision.layers) == (16, 2, 3)
    tokenizer = Tokenizer.load(joined.tokenizer)
    assert len(tokenizer) == config.language.vocab_size
    assert making.make_config(len(tokenizer)).language == config.language
    assert all(np.isfinite(value).all() for value in joined.params.values())
    assert {str(value.dtype) for value in joined.params.values()} == {"float16"}


@pytest.mark.parametrize("folder", SHIPPED_PARTS, ids=lambda p: p.name)
def test_they_are_what_the_documented_command_made(folder):
    """With the sizes that the code has now, and bytes that were not touched since."""
    record = json.loads((folder / making.RECORD).read_text())
    readme = (ROOT / "examples" / "tiny" / "README.md").read_text()
    assert f"{record['command']} --out llava_jax/assets" in readme
    assert record["settings"] == making.SETTINGS
    weights = (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == record["sha256"]


def test_all_that_ships_is_small():
    size = sum(
        p.stat().st_size for folder in SHIPPED.values() for p in folder.rglob("*") if p.is_file()
    )
    assert size < 4e6


def test_the_examples_stay_out_of_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "examples" in settings["tool"]["pyright"]["include"]
    assert "examples" not in (ROOT / "setup.py").read_text()


def test_the_vocabulary_is_that_of_the_quickstart_s_words(joined):
    tokenizer = Tokenizer.load(joined.tokenizer)
    pieces = {tokenizer.token_text(i) for i in range(len(tokenizer))}
    for phrase in making.PHRASES:
        assert phrase.replace(" ", SPACE) in pieces


# How they are made ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("tiny") / "data", train=48, held_out=1, seed=0)


@pytest.fixture(scope="module")
def tokenizer(data, tmp_path_factory):
    texts = making.training_texts(data)
    return making.make_tokenizer(texts, tmp_path_factory.mktemp("vocabulary"))


@pytest.mark.slow
def test_both_halves_learn(tmp_path, capsys):
    clip, vicuna = making.make(
        tmp_path, settings=dict(pictures=64, tower_steps=12, language_steps=12, seed=5), quiet=True
    )
    made = load_checkpoint(vicuna, vision_tower=clip)
    assert made.config.vision_layers_run == 2
    assert all(np.isfinite(value).all() for value in made.params.values())
    assert {p.name for p in vicuna.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", making.RECORD),
        *("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    }
    assert json.loads((clip / making.RECORD).read_text())["settings"]["tower_steps"] == 12
    said = capsys.readouterr().out
    for name in ("vision tower", "language model"):
        [line] = [line for line in said.splitlines() if line.startswith(name)]
        first, last = (float(word) for word in line.split() if word[0].isdigit() and "." in word)
        assert last < first


def test_batches_of_text_have_words_for_images(data, tokenizer):
    config = making.make_config(len(tokenizer))
    objects = [[("red", "circle", "bottom left"), ("blue", "square", "top right")]] * 48
    batches = making.text_batches(config, tokenizer, data, objects, seed=0)
    for batch in (next(batches) for _ in range(6)):
        assert "images" not in batch
        groups, slots, _ = batch["words"].shape
        assert slots % 16 == 0
        said = set()
        for group in range(groups):
            rows = slice(*(n * len(batch["slots"]) // groups for n in (group, group + 1)))
            samples = batch["segments"][rows].max(axis=1).sum()
            words = batch["words"][group].reshape(-1, 4, 4, batch["words"].shape[-1])
            assert (words[samples:] < 0).all()
            for picture in words[:samples]:
                assert (picture[:2, :2] < 0).all()
                assert (picture[2:, 2:] < 0).all()
                said |= {tokenizer.decode([i]) for i in picture[2:, :2].ravel() if i >= 0}
            assert np.count_nonzero(batch["slots"][rows] >= 0) == 16 * samples
        assert said == {"red", "circle", "bottom left"}


def test_what_stands_for_an_image(tokenizer):
    stand_in = StandIn(making.make_config(len(tokenizer)), tokenizer)
    rng = np.random.default_rng(0)
    for number, place in enumerate(PLACES):
        top, left = 2 * (number // 2), 2 * (number % 2)
        corner = {4 * (top + y) + left + x for y in (0, 1) for x in (0, 1)}
        used = set()
        for _ in range(20):
            words = stand_in.words([(COLORS[0], SHAPES[0], place)], rng)
            # Some slot has all of it, so that the words of one thing can be told to belong together.
            assert (words >= 0).sum(axis=1).max() == 3
            used |= set(np.flatnonzero((words >= 0).any(axis=1)).tolist())
        assert used == corner


def test_words_belong_to_the_sample_of_their_id(tokenizer):
    """Two samples in the first row, one in the second, none in the third."""
    config = making.make_config(len(tokenizer))
    segments = np.array([[1, 1, 2, 2], [1, 1, 1, 0], [0, 0, 0, 0]])
    batch = {"images": np.zeros((3, 2, 64, 64, 3)), "segments": segments}
    seen = {color: [(color, "circle", "top left")] for color in ("red", "green", "blue")}
    loader = iter([(batch, {"ids": ["red", "green", "blue"]})])
    [made] = with_words(loader, seen, StandIn(config, tokenizer), seed=0)
    words = made["words"].reshape(3, 2, 16, -1)
    for (row, image), color in {(0, 0): "red", (0, 1): "green", (1, 0): "blue"}.items():
        said = {tokenizer.decode([i]) for i in words[row, image].ravel() if i >= 0}
        assert said == {color, "circle", "top left"}
    assert (words[1, 1] < 0).all()
    assert (words[2] < 0).all()


def test_frequent_lines_become_phrases():
    texts = ["a?\nUse one word.", "b?\nUse one word.", "c?\nBe brief.\nUse one word.", "d"] * 5
    assert making.common_lines(texts, share=0.3) == ["\nUse one word."]


def test_the_tower_sees_every_picture_once_before_any_twice():
    from examples.tiny.tower import batches

    images = np.arange(10)
    seen = np.concatenate([b["images"] for b, _ in zip(batches(images, images, 4, 0), range(5))])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
