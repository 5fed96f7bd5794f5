"""The whole quickstart, very short: everything is written, and a second run changes nothing."""

import argparse
import json

import pytest
from PIL import Image

from llava_jax.cli import main
from llava_jax.errors import ConfigError
from llava_jax.quickstart import cli as quickstart_cli
from llava_jax.quickstart import run
from llava_jax.quickstart.questions import KINDS


@pytest.mark.slow
def test_from_the_first_picture_to_the_last_answer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "PICTURES", 96)
    monkeypatch.setattr(run, "HELD_OUT", 4)
    whole = run._config

    def short(*args):
        config = whole(*args)
        config.stages.stage1.steps = config.stages.stage2.steps = 2
        return config

    monkeypatch.setattr(run, "_config", short)
    out = tmp_path / "out"
    report = run.quickstart(out, quiet=True)
    assert set(report["exact_match"]) == set(KINDS)
    assert report["questions"] == 4 * len(KINDS)
    assert set(report["follow_ups"]["kinds"]) <= set(KINDS)
    assert report["follow_ups"]["n"] == 4 * (len(KINDS) - 1)
    assert " parameters, " in (out / "sheet.html").read_text("utf-8")
    assert json.loads((out / "report.json").read_text("utf-8"))["mean"] == report["mean"]
    assert {p.name for p in out.iterdir()} >= {
        *("sheet.png", "sheet.html", "loss.png", "hf", "data", "examples", "stage1", "stage2"),
    }
    assert (out / "hf" / "config.json").exists()
    assert (out / "export" / "llava_jax.json").exists()
    with Image.open(out / "sheet.png") as sheet:
        assert sheet.width > 1000
    weights = (out / "stage2" / "export" / "llava_jax.json").read_bytes()
    assert run.quickstart(out, quiet=True)["exact_match"] == report["exact_match"]
    assert (out / "stage2" / "export" / "llava_jax.json").read_bytes() == weights
    printed = capsys.readouterr()
    assert "held-out questions" in printed.out
    assert "32 follow-up questions in conversations" in printed.out
    assert "%|" not in printed.err  # a progress bar, in spite of quiet


def test_a_seed_below_0_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="--seed -1 is below 0"):
        run.quickstart(tmp_path / "out", seed=-1)
    assert list(tmp_path.iterdir()) == []


def test_time_adds_up_only_where_work_goes_on(tmp_path, capsys):
    path = tmp_path / "seconds.json"
    path.write_text('{"trained": 600.0, "asked": 40.0}')
    clock = run.Clock(path, steps=5)
    with clock.step("trained", resumes=True):
        pass
    with clock.step("asked"):
        pass
    assert clock.seconds["trained"] >= 600
    assert clock.seconds["asked"] < 5
    assert clock.words().startswith("10 min 0 s (trained: 600 s; asked: 0 s)")
    with pytest.raises(KeyboardInterrupt), run.Clock(path, steps=5).step("trained", resumes=True):
        raise KeyboardInterrupt
    assert json.loads(path.read_text())["trained"] >= 600
    assert "[1/5] trained" in capsys.readouterr().out


def test_quiet_has_a_short_form():
    parser = argparse.ArgumentParser()
    quickstart_cli.add_arguments(parser)
    assert parser.parse_args(["-q"]).quiet
    assert not parser.parse_args([]).quiet


def test_a_directory_with_another_run_is_refused(tmp_path, capsys):
    (tmp_path / "quickstart.json").write_text('{"seed": 5, "fast": false}')
    with pytest.raises(ConfigError, match="other settings"):
        run.quickstart(tmp_path, seed=6)
    assert main(["quickstart", "--out", str(tmp_path), "--seed", "6"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_fast_means_fewer_steps(tmp_path):
    slow, fast = (run._config(tmp_path, 3, fast) for fast in (False, True))
    assert fast.seed == slow.seed == 3
    assert fast.stages.stage1.steps == slow.stages.stage1.steps
    assert fast.stages.stage2.steps == slow.stages.stage2.steps // 3
    assert slow.data.path == str(tmp_path / "data" / "instruct.json")
