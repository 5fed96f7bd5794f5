"""A folder of pictures in, JSON lines out; broken off and gone on with."""

import json

import numpy as np
import pytest
from PIL import Image

from llava_jax import cli
from llava_jax.chat.folder import answered
from llava_jax.model import Request, load
from tests.generate.tiny import model

LATIN = "\udce9"
"""How Python has a byte of a name or an argument that is not UTF-8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("folder")
    model().save(path / "model")
    (path / "in" / "deep").mkdir(parents=True)
    for i, name in enumerate(("b.png", "a.JPG", f"deep/c{LATIN}.png")):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / "in" / name)
    (path / "in" / "notes.txt").write_text("no picture")
    return path


def test_a_folder_is_answered_and_a_second_run_goes_on(folder, capsys, monkeypatch):
    talker = load(folder / "model")
    monkeypatch.setattr("llava_jax.model.load", lambda *_, **__: talker)  # compiled once
    out = folder / "answers.jsonl"
    words = [
        "chat",
        "--model",
        str(folder / "model"),
        "--folder",
        str(folder / "in"),
        "--out",
        str(out),
    ]
    asked = f"what{LATIN}?"
    words += ["--prompt", asked, "--max-new-tokens", "5"]
    assert cli.main(words) == 0
    lines = out.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["image"] for row in rows] == ["a.JPG", "b.png", f"deep/c{LATIN}.png"]
    (want,) = talker.generate_batch([Request(asked, folder / "in" / "b.png", max_new_tokens=5)])
    assert rows[1]["answer"] == want.text
    assert "3 of 3" in capsys.readouterr().err
    out.write_text(lines[0] + "\n" + lines[1][:9])  # a run that was killed while it wrote
    (folder / "in" / "bad.png").write_bytes(b"no picture")
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert "bad.png" in said
    assert "1 image could not be answered" in said
    assert sorted(out.read_text().splitlines()) == sorted(lines)
    for more, says in (
        (["--temperature", "1"], "line 1 was made with other settings"),
        (["--json", "{}"], "line 1 was made with other settings"),
        (["--model", "tiny"], f"line 1 is by the model '{folder / 'model'}'"),
    ):
        assert cli.main([*words, *more]) == 2
        assert says in capsys.readouterr().err


def test_an_answer_may_hold_what_unicode_calls_the_end_of_a_line(tmp_path):
    out = tmp_path / "answers.jsonl"
    row = {"image": "a\u0085.png", "prompt": "what?", "answer": "one\u2028two"}
    out.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    head = {"prompt": "what?", "model": "tiny", "settings": "0"}  # which earlier rows do not say
    assert answered(out, head) == {"a\u0085.png"}


def test_what_does_not_go_together(folder, capsys):
    words = ["chat", "--model", str(folder), "--folder", str(folder / "in")]
    other = folder / "other.jsonl"
    other.write_text('{"image": "b.png", "prompt": "why?"}\n')
    for more, says in (
        ([], "--folder and --out go together"),
        (["--out", "a"], "asks --prompt"),
        (["--out", str(other), "--prompt", "what?"], "no answer to this question"),
        (["--out", str(folder / "no/a"), "--prompt", "what?"], "there is no folder"),
    ):
        assert cli.main([*words, *more]) == 2
        assert says in capsys.readouterr().err
