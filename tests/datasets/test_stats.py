"""`llava-jax data stats`: lengths, pictures, answers by prompt, padding."""

import json

import pytest

from llava_jax.cli import main
from tests.test_inspect import make_model

SHORT = "Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("stats"))


def test_numbers(model, tmp_path, capsys):
    def record(turns, image=None):
        told = [{"from": ("human", "gpt")[n % 2], "value": t} for n, t in enumerate(turns)]
        return {"conversations": told} | ({"image": image} if image else {})

    records = [record([f"<image>\nWhat?\n{SHORT}", "Cat", "And?", "Dog"], "a.png")] * 300
    records += [record(["Tell me.", "one two three"])] * 100
    records += [record(["<image><image>\nWhich?", "both of them"], ["a.png", "b.png"])]
    records += [{"conversations": []}, {**record(["What?", "A cat"]), "images": ["a.png"]}]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["data", "stats", str(tmp_path / "data.json"), "--model", str(model), "--workers", "2"]
    words += ["--max-length", "4000", "--report", str(tmp_path / "out")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "401 samples, 2 left out" in shown
    found = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert found["pictures"] == {"0": 100, "1": 300, "2": 1}
    assert found["answers"]["short answer"]["answers"] == 600
    assert found["answers"]["free"]["answers"] == 101
    assert found["answers"]["free"]["words"]["most"] == 3
    for width, row in found["real"].items():
        total = found["positions"]["sum"]
        assert row["padded"] == pytest.approx(total / 401 / int(width), abs=1e-4)
        assert row["padded"] < row["batch"] <= 1
        assert row["packed"] > 0.9
        assert row["cut"] == 0
    assert (tmp_path / "out" / "stats.png").stat().st_size > 10_000
    assert main(words) == 2
    assert "stats.json is there already, and is not replaced" in capsys.readouterr().err


def test_nothing_to_count(model, tmp_path, capsys):
    (tmp_path / "data.json").write_text('[{"conversations": []}]')
    assert main(["data", "stats", str(tmp_path / "data.json"), "--model", str(model)]) == 2
    assert "no samples that training would take" in capsys.readouterr().err
    for option in ("--workers", "--max-length"):
        assert main(["data", "stats", str(tmp_path / "data.json"), option, "0"]) == 2
        assert f"{option} 0 is not a number from 1" in capsys.readouterr().err
