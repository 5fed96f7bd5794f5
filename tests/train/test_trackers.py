"""Trackers: what TensorBoard, W&B (offline) and MLflow (files) are given, and what of theirs fails."""

import json
import threading
import time
from typing import Any

import pytest
from PIL import Image

from llava_jax.errors import ConfigError
from llava_jax.train import trackers
from llava_jax.train.trackers import Trackers, check_trackers, open_trackers


def use(name, workdir, start=0):
    found: Any = open_trackers([name], workdir, "a run", start, {"lr": 0.1})
    picture = workdir / "picture.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    found.scalars(start + 1, {"loss": 2.0, "lr/language lr=1e-05": 1e-5})
    found.picture(start + 1, "vqa/s1", "What is it?", picture)
    found.picture(start + 1, "vqa/s2", "What?", None)
    assert list(found._trackers) == [name]
    found.close()
    assert list(found._trackers) == [name]


def test_tensorboard_has_numbers_and_pictures(tmp_path):
    use("tensorboard", tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert b"loss" in data
    assert b"PNG" in data


def test_a_full_disk_ends_tensorboard_s_thread_and_stops_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "REOPEN_SECONDS", 0.2)
    board: Any = open_trackers(["tensorboard"], tmp_path, "run", 0, {})
    worker = board._trackers["tensorboard"]._board.file_writer.event_writer._worker
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def full(_):
        raise OSError(28, "No space left on device")

    worker._record_writer.write_event = full
    for step in range(200):  # its queue holds ten
        board.scalars(step, {"loss": 1.0})
    worker.join(10)
    time.sleep(0.3)
    board.scalars(500, {"after": 2.0})
    board.close()
    assert any(b"after" in p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())


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


def test_a_tracker_that_fails_is_left_and_the_others_go_on(caplog):
    class Fails:
        def scalars(self, step, values):
            raise OSError("the server is away")

    class Works:
        seen = ()

        def scalars(self, step, values):
            self.seen = (*self.seen, step)

    works, fails = Works(), Fails()
    both: dict[str, Any] = {"wandb": fails, "tensorboard": works}
    found = Trackers(both)
    found.scalars(1, {})
    found.scalars(2, {})
    assert works.seen == (1, 2)
    assert caplog.text.count("wandb is given up") == 1


def test_a_tracker_without_its_package_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"llava_jax\[wandb\]"):
        check_trackers(["tensorboard", "wandb"])
