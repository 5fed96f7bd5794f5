"""`llava-jax inspect` on a checkpoint made here."""

import io
import json
import os
from dataclasses import replace

import pytest
import sentencepiece

from llava_jax.cli import main
from llava_jax.convert import Checkpoint, save_checkpoint
from llava_jax.inspect import file_list, in_bytes
from tests.convert.tiny import CONFIG, random_params

VOCABULARY = 300
SIZES = replace(CONFIG, language=replace(CONFIG.language, vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("inspect"))


def make_model(folder):
    """A JAX-format checkpoint with a tokenizer."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["A chat. USER: What is it? ASSISTANT: A red ball. one yes"] * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=3,
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.model").write_bytes(out.getvalue())
    made = Checkpoint(SIZES, random_params(SIZES), folder / "tokenizer")
    return save_checkpoint(made, folder / "model", to="jax")


def test_checkpoint_in_words(model, capsys):
    assert main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    total = sum(p.size for p in random_params(SIZES).values())
    assert f"weights             {total:,} parameters" in out
    assert "28 px, patch 14 (2x2)" in out
    assert "template vicuna_v1, 4 tokens per image" in out
    assert f"vocabulary {VOCABULARY}" in out


def test_checkpoint_as_json(model, capsys):
    assert main(["inspect", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    params = random_params(SIZES)
    assert {n: tuple(t["shape"]) for n, t in facts["tensors"].items()} == {
        n: p.shape for n, p in params.items()
    }
    assert facts["bytes"] == sum(p.nbytes for p in params.values())
    assert set(facts["parts"]) == {"language", "projector", "vision", "vision (not run)"}
    assert facts["config"]["projector"] == "mlp2x_gelu"


def test_every_parameter(model, capsys):
    assert main(["inspect", str(model), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in random_params(SIZES))


def test_numbers_for_people():
    assert [in_bytes(n) for n in (0, 999, 1000, 14_126_854_144)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "14.1 GB",
    ]
    assert file_list(["x/a", "b", "c"]) == "a, b, c"
    assert file_list(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert file_list([]) == "none"
    assert file_list(["m/w.bin", "m/tower/w.bin", "x"]) == "m/w.bin, tower/w.bin, x"


def test_a_work_directory_leads_to_its_model(tmp_path, capsys):
    for stage, time in (("one", 2), ("early", 1)):
        (tmp_path / stage / "export").mkdir(parents=True)
        os.utime(tmp_path / stage / "export", (time, time))
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"there is a model in {tmp_path / 'one' / 'export'}" in capsys.readouterr().err
    (tmp_path / "export").mkdir()
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"the model of this run is {tmp_path / 'export'}" in capsys.readouterr().err


def test_the_shipped_model_is_called_tiny(capsys):
    assert main(["inspect", "tiny"]) == 0
    assert "CLIP, 64 px" in capsys.readouterr().out


def test_training_data_is_shown_elsewhere(tmp_path, capsys):
    (tmp_path / "data.json").write_text("[]")
    assert main(["inspect", str(tmp_path / "data.json")]) == 2
    assert "is training data (llava-jax data show" in capsys.readouterr().err
