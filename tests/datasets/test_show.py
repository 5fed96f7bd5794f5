"""`llava-jax data show`: prompt, trained tokens and pictures of a sample."""

import json

import pytest
from PIL import Image

from llava_jax.cli import main
from tests.test_inspect import make_model

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
    return make_model(tmp_path_factory.mktemp("show"))


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps(RECORDS))
    return path


@pytest.mark.parametrize("sample", ["0", "first"])
def test_sample(model, data, capsys, sample):
    assert main(["data", "show", str(data), sample, "--model", str(model)]) == 0
    out = capsys.readouterr().out
    assert "sample first" in out
    assert "<image a.png>" in out
    assert out.count("⟦") == 2
    assert "⟦ A red ball.</s>⟧" in out


def test_whose_tokens_they_are_is_said_where_nobody_chose(model, data, capsys):
    assert main(["data", "show", str(data)]) == 0
    said = capsys.readouterr()
    assert "tokens of tiny" in said.err
    assert "sample first" in said.out
    assert main(["data", "show", str(data), "--model", str(model)]) == 0
    assert capsys.readouterr().err == ""


def test_an_id_that_is_there_twice_is_said(model, data, capsys, caplog):
    data.write_text(json.dumps([RECORDS[0], RECORDS[2], {**RECORDS[2], "id": "first"}]))
    assert main(["data", "show", str(data), "first", "--model", str(model)]) == 0
    assert "2 samples have the id 'first'; the first is shown" in caplog.text
    assert "What is it?" in capsys.readouterr().out


def test_sample_in_colour_and_as_tokens(model, data, capsys):
    words = ["data", "show", str(data), "--model", str(model), "--color", "always", "--tokens"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "\x1b[1;32m" in out
    assert "<image> x 4" in out.replace("  ", " ")


def test_text_of_a_sample_cannot_steer_the_terminal(model, data, capsys):
    assert main(["data", "show", str(data), "2", "--model", str(model)]) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["{data}", "broken"], "data.json[1] (id 'broken'): turn 0 is from 'robot'"),
        (["{data}", "9"], "no sample '9' (give an id, or an index from 0 to 2)"),
        (["{data}.json"], "no such data file"),
        (["nowhere/at/all"], "nowhere/at/all: no such data file"),
    ],
)
def test_what_cannot_be_shown(model, data, capsys, words, line):
    words = [w.format(data=data) for w in words]
    assert main(["data", "show", *words, "--model", str(model)]) == 2
    err = capsys.readouterr().err
    assert line in err
    assert err.count("\n") == 1


def test_a_cut_sample_names_the_limit(tmp_path, capsys):
    long = [{"id": "long", "conversations": RECORDS[0]["conversations"][2:] * 40}]
    (tmp_path / "long.json").write_text(json.dumps(long))
    assert main(["data", "show", str(tmp_path / "long.json")]) == 0
    shown = capsys.readouterr().out.splitlines()[-1]
    assert shown == (
        "note: truncated at 208 positions, the max_length of the model's config, which has 1,024; "
        "in training data.max_length is the limit (1)"
    )


def test_a_missing_image_is_said(model, data, tmp_path, capsys):
    words = ["data", "show", str(data), "--model", str(model)]
    assert main(words) == 0
    assert f"note: image a.png is no file below {tmp_path} or" in capsys.readouterr().out
    assert main([*words, "--images", str(tmp_path)]) == 2
    assert f"data.json[0]: {tmp_path / 'a.png'}: the file does not" in capsys.readouterr().err
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for more in ([], ["--images", str(tmp_path)]):
        assert main([*words, *more]) == 0
        assert "note" not in capsys.readouterr().out


def test_an_empty_file_and_an_unknown_version_are_named(tmp_path, capsys):
    empty = tmp_path / "data.json"
    empty.write_text("[]")
    assert main(["data", "show", str(empty)]) == 2
    assert "there are no samples" in capsys.readouterr().err
    assert main(["data", "show", str(empty), "--version", "v9"]) == 2
    assert "no template 'v9'" in capsys.readouterr().err


def test_pictures_are_shown_after_preprocessing(model, data, tmp_path, capsys):
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "a.png")
    words = ["data", "show", str(data), "first", "2", "--model", str(model)]
    assert main([*words, "--color", "always"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[38;2;200;10;10;48;2;200;10;10m▀" in out  # the picture
    assert "\x1b[38;2;122;116;104;48;2;122;116;104m▀" in out  # what it is padded with
    assert "sample 2" in out
    target = tmp_path / "page.html"
    assert main([*words, "--html", str(target)]) == 0
    page = target.read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<b> A red ball.&lt;/s&gt;</b>" in page
    assert "<i>&lt;image a.png&gt;</i>" in page
    assert "\x1b" not in page


def test_max_length_is_the_limit(model, data, capsys):
    words = ["data", "show", str(data), "--model", str(model), "--max-length"]
    assert main([*words, "400"]) == 0
    positions = int(capsys.readouterr().out.split(" positions")[0].split()[-1])
    assert main([*words, str(positions - 1)]) == 0
    note = f"note: truncated at {positions - 1} positions (--max-length) (1)"
    assert note in capsys.readouterr().out
