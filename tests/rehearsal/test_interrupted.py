"""Killed, stopped and run again: a run ends as if nothing had happened, and says so by its exit code."""

import json
import math
import signal

import pytest

from tests.rehearsal import own_data
from tests.rehearsal.command import losses, metrics, ok, refused, report, run, start, stop_at
from tests.rehearsal.command import train_words as words_of

STEPS, STOPPED = 12, 75  # exit code 75: EX_TEMPFAIL, run it again


@pytest.fixture(scope="module")
def settings(model, tmp_path_factory) -> dict:
    """finetune_lora_7b on one epoch of 96 records, four of them without their picture.

    Adapters, their dropout, stand-ins and counts must all go on where they were.
    """
    data = own_data.job(tmp_path_factory.mktemp("own"), 8 * STEPS)
    (data.parent / "pictures" / "shots" / "00003.jpg").unlink()
    return {
        "model.init": model("original"),
        "model.vision_tower": model("clip"),
        "batch_size": 8,
        "save_every": 5,
        "data.path": data,
        "data.image_folder": data.parent / "pictures",
    }


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    ok(*words_of("finetune_lora_7b", workdir, settings))
    return workdir


def _curve(workdir) -> list[dict]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in metrics(workdir)]


def _same_end(workdir, whole) -> None:
    assert _curve(workdir) == _curve(whole)
    for name in ("model.safetensors", "llava_jax.json"):
        assert (workdir / "export" / name).read_bytes() == (whole / "export" / name).read_bytes()
    assert report(workdir) == report(whole)


def test_killed_and_run_again(settings, whole, tmp_path):
    words = words_of("finetune_lora_7b", tmp_path, settings)
    done = stop_at(start(*words), tmp_path, 7, signal.SIGKILL)
    assert done.code == -signal.SIGKILL
    assert not (tmp_path / "export").exists()
    ok(*words)
    _same_end(tmp_path, whole)


@pytest.mark.slow  # quick: tests/train/test_loop.py::test_asked_to_stop_it_saves_first
def test_stopped_and_run_again(settings, whole, tmp_path):
    words = words_of("finetune_lora_7b", tmp_path, settings | {"save_every": 1000})
    done = stop_at(start(*words), tmp_path, 3, signal.SIGTERM)
    assert done.code == STOPPED, done
    assert "saved" in done.out + done.err
    assert not (tmp_path / "export").exists()
    assert 3 <= len(losses(tmp_path)) < STEPS, "it was too fast to be stopped"
    ok(*words)
    _same_end(tmp_path, whole)


def test_finished_it_is_not_run_again(settings, whole):
    stamp = (whole / "export" / "model.safetensors").stat().st_mtime_ns
    ok(*words_of("finetune_lora_7b", whole, settings))
    assert (whole / "export" / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("change", [{"lr": 1.0}, {"steps": 10}, {"batch_size": 16}])
def test_finished_with_other_settings_it_is_refused(change, settings, whole):
    done = run(*words_of("finetune_lora_7b", whole, settings | change))
    refused(done, str(whole), *change)


def test_finished_with_an_invalid_setting_it_is_refused(settings, whole):
    done = run(*words_of("finetune_lora_7b", whole, settings | {"dtype": "float8"}))
    refused(done, "dtype", "float8")


def test_the_log_is_whole(whole):
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(math.isfinite(row["loss"]) for row in rows)
    # The clock of a step does not stop while a checkpoint is written: no step takes no time.
    typical = sorted(row["seconds"] for row in rows)[STEPS // 2]
    assert all(row["seconds"] > typical / 20 for row in rows), [row["seconds"] for row in rows]
    assert json.loads((whole / "done.json").read_text())["steps"] == STEPS
