"""Where else a run is shown: TensorBoard, Weights & Biases, MLflow. metrics.jsonl is always written.

A tracker that was opened never ends a run: what it raises later is logged, and it is left alone from
then on.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_jax.errors import ConfigError
from llava_jax.report.files import TRACKED
from llava_jax.util import need, read_object, write_json

log = logging.getLogger(__name__)

REOPEN_SECONDS = 60.0
"""How long TensorBoard is left alone after it met a full disk."""


class Tracker(Protocol):
    """One of them."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers after a step, by name; a slash puts names into groups."""
        ...

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        """What was said about a picture (a PNG file, or none)."""
        ...

    def close(self) -> None:
        """Returns when all is written."""
        ...


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        if name != "tensorboard" and not importlib.util.find_spec(name):
            fix = f"pip install 'llava_jax[{name}]'"
            raise ConfigError(f"trackers has {name!r}, and the package is not here", fix=fix)


def open_trackers(
    names: Sequence[str], workdir: Path, title: str, start: int, settings: Mapping[str, Any]
) -> Trackers:
    """The trackers of a run called `title` that goes on after step `start`; `settings` are shown there.

    Raises ConfigError naming the extra of a package that is missing.
    """
    return Trackers({name: OPEN[name](workdir, title, start, settings) for name in names})


class Trackers:
    """All of a run as one."""

    def __init__(self, trackers: dict[str, Tracker]):
        self._trackers = trackers

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._all(lambda tracker: tracker.scalars(step, values))

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        self._all(lambda tracker: tracker.picture(step, title, text, image))

    def close(self) -> None:
        self._all(lambda tracker: tracker.close())

    def _all(self, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                call(tracker)
            except Exception as error:  # a server that is away, a disk that is full
                log.warning("%s is given up: %s: %s", name, type(error).__name__, error)
                del self._trackers[name]


def _known(workdir: Path, name: str) -> str | None:
    """What a tracker called this run before, so that a resumed one is shown as one."""
    path = workdir / TRACKED
    return read_object(path).get(name) if path.exists() else None


def _remember(workdir: Path, name: str, run: str) -> None:
    path = workdir / TRACKED
    write_json(path, {**(read_object(path) if path.exists() else {}), name: run})


def _summary_writer() -> type:
    """tensorboardX's SummaryWriter. It imports torch if that is installed: 1.5 s of a start, unused here."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    return SummaryWriter


class TensorBoard:
    """Event files in workdir/tensorboard, by tensorboardX."""

    def __init__(self, workdir: Path, title: str, start: int, settings: Mapping[str, Any]):
        self._open = functools.partial(_summary_writer(), str(workdir / "tensorboard"))
        self._board: Any = self._open(purge_step=start)
        self._again = 0.0
        if not start:
            self._board.add_text("settings", f"```\n{json.dumps(settings, indent=1)}\n```")

    def _ready(self) -> bool:
        """Whether its thread lives. A full disk ends that, and its full queue would then stop training;
        a new one is tried every minute."""
        if self._board.file_writer.event_writer._worker.is_alive():
            return True
        if time.monotonic() < self._again:
            return False
        self._again = time.monotonic() + REOPEN_SECONDS
        with contextlib.suppress(OSError):
            self._board = self._open()
        return self._board.file_writer.event_writer._worker.is_alive()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if self._ready():
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        if not self._ready():
            return
        if image:
            self._board.add_image(title, _pixels(image), step, dataformats="HWC")
        self._board.add_text(title, text, step)

    def close(self) -> None:
        if self._ready():
            self._board.close()


class Wandb:
    """A run of Weights & Biases; WANDB_PROJECT, WANDB_MODE and so on say where and how."""

    def __init__(self, workdir: Path, title: str, start: int, settings: Mapping[str, Any]):
        wandb = need("wandb", "to track a run with W&B", "llava_jax[wandb]")
        self._wandb = wandb
        self._run = wandb.init(
            dir=str(workdir),
            name=title,
            id=_known(workdir, "wandb"),
            resume="allow",
            config=dict(settings),
        )
        _remember(workdir, "wandb", self._run.id)
        # A resumed run repeats steps, which its own counter would refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        words = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        shown = self._wandb.Image(str(image), caption=text) if image else words
        self._run.log({"step": step, title: shown})

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow; MLFLOW_TRACKING_URI says where, MLFLOW_EXPERIMENT_NAME in which experiment."""

    def __init__(self, workdir: Path, title: str, start: int, settings: Mapping[str, Any]):
        self._mlflow = need("mlflow", "to track a run with MLflow", "llava_jax[mlflow]")
        self._client = self._mlflow.MlflowClient()
        run = _known(workdir, "mlflow")
        if run is None:
            run = self._client.create_run(self._experiment(), run_name=title).info.run_id
            _remember(workdir, "mlflow", run)
            for name, value in settings.items():
                self._client.log_param(run, name, str(value)[:500])
        self._id: str = run
        self._client.update_run(run, status="RUNNING")

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now, metric = int(time.time() * 1000), self._mlflow.entities.Metric
        metrics = [metric(_plain(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics, synchronous=False)

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        folder = f"samples/{step:07d}"
        self._client.log_text(self._id, text, f"{folder}/{_plain(title)}.txt")
        if image:
            self._client.log_artifact(self._id, str(image), folder)

    def close(self) -> None:
        self._mlflow.flush_async_logging()
        self._client.set_terminated(self._id)


OPEN: dict[str, Callable[[Path, str, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": Mlflow,
}
"""{a word of the setting `trackers`: what opens it}"""


def _pixels(image: Path) -> Any:
    import numpy as np
    from PIL import Image

    with Image.open(image) as picture:
        return np.asarray(picture.convert("RGB"))


def _plain(name: str) -> str:
    """A name with the characters that MLflow allows."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
