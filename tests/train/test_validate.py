"""Validation in a run: the loss is that of heldout.json, the best is kept, early stop, resuming."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from llava_jax import cli
from llava_jax.convert import load_checkpoint
from llava_jax.errors import ConfigError, Stopped
from llava_jax.report.files import EVAL, METRICS, SAMPLES, SYSTEM, read_rows
from llava_jax.train import loop, validate
from llava_jax.train.config import load_config
from llava_jax.train.stages import run_stages
from llava_jax.train.validate import SetLoss, Validation, validation_line
from tests.train.run import make_data, make_model, overrides

SETS = (
    "('one path={0}/val/data.json images={0}/val ask=4', 'two path={0}/data/data.json images={0}/data', "
    "'p benchmark=pope data={0}/pope ask=3')"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("validate")
    data = make_data(folder / "data", count=30)
    make_data(folder / "val", count=10)
    make_pope(folder / "pope", folder / "data" / "images")
    shutil.copytree(folder / "pope", folder / "lost", ignore=shutil.ignore_patterns("*.png"))
    return make_model(folder, data), data, folder


def make_pope(folder, images):
    """POPE in small: two questions in each of its splits."""
    (folder / "val2014").mkdir(parents=True)
    shutil.copy(images / "0.png", folder / "val2014")
    texts = [("Is it red?", "yes"), ("Is it green?", "no")]
    rows = [
        {"question_id": n, "image": "0.png", "text": text, "label": label}
        for n, (text, label) in enumerate(texts)
    ]
    for split in ("random", "popular", "adversarial"):
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / f"coco_pope_{split}.json").write_text(lines)


def config_of(made, **changes):
    model, data, folder = made
    words = {"data.eval": SETS.format(folder), "data.holdout": 0.3, "eval_every": 2, "steps": 4}
    words |= {
        "data.path": f"{folder}/data/data.json,{folder}/val/data.json",
        "data.image_folder": f"{folder}/data,{folder}/val",
    }
    words |= {"eval_samples": 1, "save_every": 2, **changes}
    return load_config("common", overrides(model, data, **words))


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    run_stages(config_of(made), workdir, quiet=True)
    return workdir


def test_the_last_validation_is_the_loss_on_the_held_out_part_of_the_export(trained):
    rows = read_rows(trained / EVAL)
    assert [row["step"] for row in rows] == [2, 4]
    assert set(rows[-1]["sets"]) == {"one", "two", "p", "heldout"}
    found, wanted = rows[-1]["sets"]["heldout"], json.loads((trained / "heldout.json").read_text())
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["tokens"] == wanted["tokens"]
    assert found["samples"] == wanted["samples"]
    one = rows[-1]["sets"]["one"]
    assert (one["samples"], one["asked"]) == (10, 4)
    assert 0 <= one["exact_match"] <= 1
    assert 0 <= rows[-1]["sets"]["p"]["pope"] <= 100


def test_the_best_model_is_kept(trained):
    rows = read_rows(trained / EVAL)
    values = {row["step"]: row["value"] for row in rows}
    losses = [s["loss"] for s in rows[-1]["sets"].values() if "loss" in s]
    assert rows[-1]["value"] == pytest.approx(sum(losses) / 3)
    best = min(values, key=lambda step: values[step])
    assert rows[-1]["best"] == {"step": best, "value": values[best]}
    kept, last = (load_checkpoint(trained / name).params for name in ("best", "export"))
    same = all((kept[name] == last[name]).all() for name in last)
    assert same == (best == 4)


def test_samples_are_answered_each_time_with_their_pictures(trained):
    rows = read_rows(trained / SAMPLES)
    assert [r["step"] for r in rows] == [2] * 3 + [4] * 3
    assert all(isinstance(r["answer"], str) for r in rows)
    assert {r["set"] for r in rows} == {"one", "two", "heldout"}
    pictures = {r["picture"] for r in rows if "picture" in r}
    assert pictures
    assert all((trained / p).read_bytes().startswith(b"\xff\xd8") for p in pictures)


def test_norms_and_rates_are_logged_by_group(trained):
    row = read_rows(trained / METRICS)[-1]
    assert set(row["lrs"]) == set(row["grad_norms"]) == set(row["update_norms"])
    assert set(row["lrs"]) == {"language", "projector"}
    squares = sum(norm**2 for norm in row["grad_norms"].values())
    assert squares == pytest.approx(row["grad_norm"] ** 2, rel=1e-5)
    assert row["targets"] > 0 < row["flops"]
    last = read_rows(trained / SYSTEM)[-1]
    assert 0 < last["goodput"] < 1 > last["padding"] >= 0
    assert last["host_memory"] > 10**7 < last["tokens_per_second"] * 10**7


def test_the_loss_is_told_apart_by_data_file(trained):
    rows = read_rows(trained / METRICS)
    assert {name for row in rows for name in row["losses"]} == {"data/data", "val/data"}
    for row in rows:
        low, high = min(row["losses"].values()), max(row["losses"].values())
        assert low - 1e-5 <= row["loss"] <= high + 1e-5


def test_the_report_shows_files_sets_and_a_benchmark(trained, tmp_path):
    words = ["report", str(trained), "--out", str(tmp_path / "r.html")]
    assert cli.main(words) == 0
    page = (tmp_path / "r.html").read_text()
    for key in ("losses/data/data", "losses/val/data", "eval/p/pope", "eval/one/loss"):
        assert f'"{key}"' in page, key


def test_a_run_that_was_cut_off_validates_and_decides_as_the_whole_one(made, trained, tmp_path):
    """Killed between the checkpoint of step 2 and its validation: that is made up for."""
    workdir = shutil.copytree(trained, tmp_path / "cut")
    for name in ("export", "checkpoints/4", "best"):
        shutil.rmtree(workdir / name)
    for name in ("done.json", "heldout.json"):
        (workdir / name).unlink()
    for name, keep in ((EVAL, 0), (SAMPLES, 2), (METRICS, 2)):
        lines = (workdir / name).read_text().splitlines(keepends=True)
        (workdir / name).write_text("".join(lines[:keep]) + lines[-1][:20])
    run_stages(config_of(made), workdir, quiet=True)
    for name in (EVAL, SAMPLES):
        assert read_rows(workdir / name) == read_rows(trained / name)


@pytest.mark.slow  # quick: the others are on a mesh of eight devices
def test_several_devices_validate_alike(made, trained, tmp_path):
    run_stages(config_of(made, **{"mesh.data": 4, "mesh.fsdp": 2, "eval_samples": 0}), tmp_path)
    for ours, theirs in zip(read_rows(tmp_path / EVAL), read_rows(trained / EVAL), strict=True):
        assert ours["best"]["step"] == theirs["best"]["step"]
        for name, numbers in theirs["sets"].items():
            assert ours["sets"][name] == pytest.approx(numbers, abs=2e-5)


def small(made, **changes):
    """A run with one set, whose loss alone is computed."""
    one = "('two path={2}/data/data.json images={2}/data',)".format(*made)
    return config_of(made, **{"eval_samples": 0, "data.holdout": 0.0, "data.eval": one, **changes})


def test_no_better_validation_ends_a_run_early(made, tmp_path, caplog):
    """At a rate of nothing the second validation is not better, and the third ends the run."""
    changes = {"lr": 0.0, "early_stop": 2, "eval_every": 1, "steps": 5}
    config = small(made, **changes)
    caplog.set_level("INFO", "llava_jax")
    export = run_stages(config, tmp_path, quiet=True)
    assert [row["waited"] for row in read_rows(tmp_path / EVAL)] == [0, 1, 2]
    assert json.loads((tmp_path / "done.json").read_text())["steps"] == 3
    assert "the last 2 validations were not better than at step 1" in caplog.text
    shutil.rmtree(export)  # made again from the checkpoint, without a further step
    run_stages(config, tmp_path, quiet=True)
    assert len(read_rows(tmp_path / METRICS)) == 3
    caplog.clear()
    run_stages(config, tmp_path, quiet=True)
    assert "early_stop=2 ended this run at step 3 of 5; --config.early_stop=0" in caplog.text
    run_stages(small(made, **changes | {"early_stop": 0}), tmp_path, quiet=True)
    assert [row["waited"] for row in read_rows(tmp_path / EVAL)] == [0, 1, 2, 3, 4]
    assert len(read_rows(tmp_path / METRICS)) == 5
    assert json.loads((tmp_path / "config.json").read_text())["early_stop"] == 0
    assert "early" not in json.loads((tmp_path / "done.json").read_text())


@pytest.mark.slow  # quick, killed: test_a_run_that_was_cut_off_validates_and_decides_as_the_whole_one
def test_a_stop_in_a_validation_or_the_export_loses_nothing(made, tmp_path, monkeypatch):
    """Each attempt is stopped at the next of these places, and goes on as if it never was."""

    def stopping(place, name, says, number=1):
        original, calls = getattr(place, name), []

        def ask(*args, **more):
            calls.append(args)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **more)

        with monkeypatch.context() as patched:
            patched.setattr(place, name, ask)
            with pytest.raises(Stopped, match=says):
                run_stages(config, tmp_path / "run", quiet=True)

    config = small(made)
    run_stages(config, tmp_path / "whole", quiet=True)
    stopping(SetLoss, "of", "at step 2 of 4, before its validation, state saved")
    assert not (tmp_path / "run" / EVAL).exists()
    assert read_rows(tmp_path / "run" / METRICS)[-1]["step"] == 2
    stopping(SetLoss, "of", "at step 4 of 4, before its validation", number=2)
    assert not (tmp_path / "run" / "done.json").exists()
    stopping(loop, "save_model", "after the last step, 4; the model is in")
    run_stages(config, tmp_path / "run", quiet=True)
    assert read_rows(tmp_path / "run" / EVAL) == read_rows(tmp_path / "whole" / EVAL)
    losses = [[r["loss"] for r in read_rows(tmp_path / n / METRICS)] for n in ("run", "whole")]
    assert losses[0] == losses[1]


def test_losses_choose_the_smallest_and_scores_the_largest():
    def judged(by, before, **numbers):
        return bare(before, best_by=by)._judged(9, {"a": numbers})

    before = [{"best": {"step": 1, "value": 0.5}, "waited": 3}]
    assert judged("loss", before, loss=0.4)["waited"] == 0
    assert judged("a.loss", before, loss=0.5)["waited"] == 4
    assert judged("a.exact_match", before, exact_match=0.6)["best"]["step"] == 9
    assert judged("a.exact_match", before, exact_match=0.4)["waited"] == 4
    assert judged("loss", before, loss=float("nan"))["best"]["step"] == 1
    assert judged("", [], loss=0.4) == {"value": None, "best": None, "waited": 1}


def bare(rows=(), folder=Path(), **settings):
    """A Validation without a model or sets."""
    found: Any = object.__new__(Validation)
    found._config = SimpleNamespace(**{"best_by": "loss", "early_stop": 2, **settings})
    found._rows, found._steps, found._workdir = list(rows), 20, folder
    found._measure = {"by": found._config.best_by, "on": "data"}
    found.sets, found._asker, found._losses = [SimpleNamespace(name="a")], None, {}
    found._compiled, found._opened = True, None
    found._log = MagicMock()
    return found


def test_another_measure_or_other_data_begin_the_best_anew(tmp_path, caplog):
    row = {"step": 4, "best": {"step": 2, "value": 0.5}, "waited": 2, "by": "loss", "on": "data"}
    (tmp_path / EVAL).write_text(json.dumps(row) + "\n")
    (tmp_path / "best").mkdir()
    caplog.set_level("INFO", "llava_jax")
    same = bare(folder=tmp_path)
    same.resume(4, 20, None)
    assert same.best == row["best"]
    assert same.over
    other = bare(folder=tmp_path, best_by="a.exact_match")
    other.resume(4, 20, None)
    assert (other.best, other.waited, other.over) == (None, 0, False)
    assert other._judged(6, {"a": {"exact_match": 0.1}})["best"]["step"] == 6
    assert "best/ and early_stop begin anew; the best until now is in" in caplog.text
    assert [p.name for p in tmp_path.glob("best*")] == ["best.2"]
    other = bare([row | {"on": "others"}])
    assert (other.best, other.waited) == (None, 0)


def test_a_best_model_that_is_not_saved_is_not_called_the_best(monkeypatch, caplog):
    """Judged are losses of 0.5, 0.4 (which the disk does not take), 0.45 and 0.44."""
    disk = iter([None, OSError(28, "No space left on device"), None, None])

    def save(*_):
        if error := next(disk):
            raise error

    monkeypatch.setattr(validate, "save_model", save)
    monkeypatch.setattr(validate, "exported_params", lambda *_: {})
    found = bare()
    for step, loss in enumerate((0.5, 0.4, 0.45, 0.44), 1):
        found._losses = {"a": SimpleNamespace(of=lambda *_, x=loss: {"loss": x})}
        assert found.run(step, MagicMock(), {}, threading.Event())
    assert [row["best"]["step"] for row in found._rows] == [1, 1, 3, 4]
    assert found._rows[1]["unsaved"] == {"step": 2, "value": 0.4}
    assert "(better than before, but not saved)" in validation_line(found._rows[1])
    found.finish()
    assert "step 2 was better (0.4000), but its model could not be saved" in caplog.text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data.eval": "('one',)"}, "is not a named set"),
        ({"data.eval": "('one pth=x',)"}, "'pth=x' is not understood"),
        ({"data.eval": "('one path=nowhere.json',)"}, "one: nowhere.json: no such data file"),
        ({"data.eval": '("it\'s path=x",)'}, "cannot be read: No closing quotation"),
        ({"data.eval": "('p benchmark=popes data=x',)"}, "no benchmark 'popes'"),
        ({"data.eval": "('p benchmark=pope data={0}/val',)"}, r"data\.eval p: .*/val: no "),
        ({"data.eval": "('p benchmark=pope data={0}/lost',)"}, "p: question .* no image '0.png'"),
        ({"data.eval": "('p benchmark=mmvet data=x',)"}, "a judge model grades mmvet"),
        ({"best_by": "three.loss"}, "best_by is 'three.loss'"),
        ({"early_stop": 1, "eval_every": 0}, "no validation to wait for"),
    ],
)
def test_sets_that_nobody_could_mean_are_refused(made, tmp_path, changes, says):
    changes = {name: f"{value}".format(made[2]) for name, value in changes.items()}
    with pytest.raises(ConfigError, match=says):
        run_stages(config_of(made, **changes), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
