"""Trackers: what TensorBoard, W&B (offline) and MLflow (files) are given, and what of theirs fails."""

import json
import threading
from typing import Any

import pytest
from PIL import Image

from llava_jax.errors import ConfigError
from llava_jax.train import trackers
from llava_jax.train.trackers import TensorBoard, Trackers, check_trackers, open_trackers


def use(name, workdir, start=0):
    found = open_trackers([name], workdir, "a run", start, {"lr": 0.1})
    picture = workdir / "picture.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    found.scalars(start + 1, {"loss": 2.0, "lr/language lr=1e-05": 1e-5})
    found.picture(start + 1, "vqa/s1", "What is it?", picture)
    found.picture(start + 1, "vqa/s2", "What?", None)
    found.close()


def test_tensorboard_has_numbers_and_pictures(tmp_path, caplog):
    use("tensorboard", tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b"loss" in data
    assert b"PNG" in data
    assert not caplog.text


def test_a_full_disk_costs_tensorboard_some_events_and_a_new_file_follows(
    tmp_path, monkeypatch, caplog
):
    board: Any = TensorBoard(tmp_path, "run", 0, {})

    def full(_):
        raise OSError(28, "No space left on device")

    board._file.write_event = full
    for step in range(50):
        board.scalars(step, {"loss": 1.0})
    assert caplog.text.count("TensorBoard misses") == 1
    monkeypatch.setattr(board, "_again", 1.0)  # a minute later
    board.scalars(500, {"after": 2.0})
    board.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert any(b"after" in p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_waits_for_ever_holds_nothing_up(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "WAITING", 3)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.05)
    away = threading.Event()
    found = Trackers({"mlflow": lambda: away.wait() and None})  # type: ignore[dict-item]
    for step in range(10):
        found.scalars(step, {})
    found.close()
    away.set()
    assert "mlflow does not keep up" in caplog.text
    assert "mlflow misses 10 calls" in caplog.text


def test_wandb_offline_keeps_one_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed: not tested with it")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    use("wandb", tmp_path)
    run = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{run}"))


def test_mlflow_goes_on_with_its_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed: not tested with it")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "llava")
    use("mlflow", tmp_path)
    use("mlflow", tmp_path, start=1)
    client = mlflow.MlflowClient()
    run = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert [m.step for m in client.get_metric_history(run, "loss")] == [1, 2]
    assert client.get_run(run).data.params == {"lr": "0.1"}
    assert client.get_run(run).info.status == "FINISHED"


@pytest.mark.parametrize("late", [False, True])
def test_a_tracker_that_fails_is_left_and_the_others_go_on(caplog, late):
    class Fails:
        def __init__(self):
            if not late:
                raise ConnectionError("the server is away")

        def scalars(self, step, values):
            raise OSError("the server is away")

    class Works:
        seen = ()

        def scalars(self, step, values):
            self.seen = (*self.seen, step)

        def close(self):
            pass

    works = Works()
    both: dict[str, Any] = {"wandb": Fails, "tensorboard": lambda: works}
    found = Trackers(both)
    found.scalars(1, {})
    found.scalars(2, {})
    found.close()
    assert works.seen == (1, 2)
    assert caplog.text.count("wandb is given up") == 1


def test_a_tracker_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llava_jax\[wandb\]"):
        check_trackers(["tensorboard", "wandb"])
