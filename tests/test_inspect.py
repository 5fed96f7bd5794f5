"""`llava-jax inspect` on a checkpoint and on training samples made here."""

import io
import json
from dataclasses import replace

import pytest
import sentencepiece
from PIL import Image

from llava_jax.cli import main
from llava_jax.convert import Checkpoint, save_checkpoint
from llava_jax.inspect import file_list, in_bytes
from tests.convert.tiny import CONFIG, random_params

VOCABULARY = 300
SIZES = replace(CONFIG, language=replace(CONFIG.language, vocab_size=VOCABULARY))
RECORDS = [
    {
        "id": "first",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A red ball."},
            {"from": "human", "value": "How many?"},
            {"from": "gpt", "value": "one"},
        ],
    },
    {"id": "broken", "conversations": [{"from": "robot", "value": "hi"}]},
    {
        "conversations": [
            {"from": "human", "value": "<image> is \x1b[31m text"},
            {"from": "gpt", "value": "yes"},
        ],
    },
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A JAX-format checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("inspect")
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


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


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


@pytest.mark.parametrize("sample", ["0", "first"])
def test_sample(model, data, capsys, sample):
    assert main(["inspect", str(data), "--sample", sample, "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "sample first" in out
    assert "<image a.png>" in out
    assert out.count("⟦") == 2
    assert "⟦ A red ball.</s>⟧" in out


def test_whose_tokens_they_are_is_said_where_nobody_chose(model, data, capsys):
    assert main(["inspect", str(data)]) == 0
    said = capsys.readouterr()
    assert "tokens of tiny" in said.err
    assert "sample first" in said.out
    assert main(["inspect", str(data), "--model", str(model)]) == 0
    assert capsys.readouterr().err == ""


def test_sample_in_colour_and_as_tokens(model, data, capsys):
    words = ["inspect", str(data), "--model", str(model), "--color", "always", "--tokens"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32m" in out
    assert "<image> x 4" in out.replace("  ", " ")


def test_text_of_a_sample_cannot_steer_the_terminal(model, data, capsys):
    assert main(["inspect", str(data), "--sample", "2", "--model", str(model)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{data}", "--sample", "broken"], "data.json[1] (id 'broken'): turn 0 is from 'robot'"),
        (["{data}", "--sample", "9"], "no sample '9' (give an id, or an index from 0 to 2)"),
        (["{data}.json"], "no such data file"),
        (["nowhere/at/all"], "nowhere/at/all: no such folder or file"),
    ],
)
def test_what_cannot_be_shown(model, data, capsys, words, line):
    words = [w.format(data=data) for w in words]
    assert main(["inspect", *words, "--model", str(model)]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_cut_sample_names_the_limit(tmp_path, capsys):
    long = [{"id": "long", "conversations": RECORDS[0]["conversations"][2:] * 40}]
    (tmp_path / "long.json").write_text(json.dumps(long))
    assert main(["inspect", str(tmp_path / "long.json")]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == (
        "note: truncated at 208 positions, the max_length of the model's config, which has 1,024; "
        "in training data.max_length is the limit (1)"
    )


def test_a_missing_image_is_said(model, data, tmp_path, capsys):
    words = ["inspect", str(data), "--model", str(model)]
    assert main(words) == 0
    assert f"note: image a.png is no file below {tmp_path} or" in capsys.readouterr().out
    assert main([*words, "--image-folder", str(tmp_path)]) == 2
    assert f"{tmp_path / 'a.png'}" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for more in ([], ["--image-folder", str(tmp_path)]):
        assert main([*words, *more]) == 0
        assert "note" not in capsys.readouterr().out


def test_options_without_effect_are_refused(model, data, capsys):
    for words in (["--tensors"], ["--json"], ["--values"]):
        assert main(["inspect", str(data), *words]) == 2
        assert f"{words[0]} is for a checkpoint" in capsys.readouterr().err
    for words in (["--version", "nope"], ["--sample", "3"], ["--image-folder", "x"], ["--tokens"]):
        assert main(["inspect", str(model), *words]) == 2
        assert f"{words[0]} is for training data" in capsys.readouterr().err


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


def test_an_empty_file_and_an_unknown_version_are_named(tmp_path, capsys):
    empty = tmp_path / "data.json"
    empty.write_text("[]")
    assert main(["inspect", str(empty)]) == 2
    assert "there are no samples" in capsys.readouterr().err
    assert main(["inspect", str(empty), "--version", "v9"]) == 2
    assert "no template 'v9'" in capsys.readouterr().err


def test_a_work_directory_leads_to_its_model(tmp_path, capsys):
    (tmp_path / "export").mkdir()
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"the model of this run is {tmp_path / 'export'}" in capsys.readouterr().err


def test_the_shipped_model_is_called_tiny(capsys):
    assert main(["inspect", "tiny"]) == 0
    assert "CLIP, 64 px" in capsys.readouterr().out
