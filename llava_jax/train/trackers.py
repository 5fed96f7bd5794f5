"""Where else a run is shown: TensorBoard, Weights & Biases, MLflow. metrics.jsonl is always written.

Each works in a thread of its own, behind a queue with an end: no tracker holds a step up or ends a run.
One that raises, at its start or later, is given up with a warning.
"""

from __future__ import annotations

import contextlib
import functools
import html
import importlib.util
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from llava_jax.errors import ConfigError, counted
from llava_jax.report.files import TRACKED
from llava_jax.util import need, read_object, write_json

log = logging.getLogger(__name__)

WAITING = 10_000
"""Entries that wait for a tracker that is slow; more are left out, and counted."""
CLOSE_SECONDS, STOP_SECONDS = 60.0, 4.0
"""How long the end of a run waits for its trackers; and that of a run that ends by an error or a stop."""
REOPEN_SECONDS = 60.0
"""How long TensorBoard is left alone after it met a full disk."""
FLUSH_SECONDS = 10.0


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

    Returns before they are open. Raises ConfigError naming the extra of a package that is missing.
    """
    check_trackers(names)
    if "tensorboard" in names:
        _tensorboard()  # hides torch from imports, also from those of other threads
    return Trackers(
        {name: functools.partial(OPEN[name], workdir, title, start, settings) for name in names}
    )


class Trackers:
    """All of a run as one. openers: {a name: what opens it}, called in the tracker's own thread."""

    def __init__(self, openers: Mapping[str, Callable[[], Tracker]]):
        self._served = [_Served(name, opener) for name, opener in openers.items()]

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for served in self._served:
            served.call("scalars", step, dict(values))

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        for served in self._served:
            served.call("picture", step, title, text, image)

    def close(self) -> None:
        """Returns when all is written, or after CLOSE_SECONDS; STOP_SECONDS while an error ends the run."""
        end = time.monotonic() + (STOP_SECONDS if sys.exc_info()[0] else CLOSE_SECONDS)
        for served in self._served:
            served.close(end)


class _Served:
    """A tracker in a daemon thread: whatever it waits for, nobody waits for it."""

    def __init__(self, name: str, opener: Callable[[], Tracker]):
        self._name, self._missed = name, 0
        self._calls: queue.Queue[tuple[Any, ...] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(
            target=self._serve, args=(opener,), name=f"tracker {name}", daemon=True
        )
        self._thread.start()

    def call(self, method: str, *args: Any) -> None:
        """Has `method` called soon; not at all where too many calls wait or the tracker is given up."""
        if not self._thread.is_alive():
            return
        try:
            self._calls.put_nowait((method, *args))
        except queue.Full:
            self._missed += 1
            if self._missed == 1:
                log.warning("%s does not keep up: it misses some of what is logged", self._name)

    def close(self, end: float) -> None:
        """Waits until all is written, at most until `end` by time.monotonic."""
        with contextlib.suppress(queue.Full):
            if self._thread.is_alive():
                self._calls.put(None, timeout=max(0.0, end - time.monotonic()))
            self._thread.join(max(0.0, end - time.monotonic()))
        if missed := self._missed + (self._calls.qsize() if self._thread.is_alive() else 0):
            log.warning("%s misses %s", self._name, counted(missed, "call"))

    def _serve(self, opener: Callable[[], Tracker]) -> None:
        try:
            tracker = opener()
            while call := self._calls.get():
                getattr(tracker, call[0])(*call[1:])
            tracker.close()
        except Exception as error:  # a server that is away, say
            log.warning("%s is given up: %s: %s", self._name, type(error).__name__, error)


def _known(workdir: Path, name: str) -> str | None:
    """What a tracker called this run before, so that a resumed one is shown as one."""
    path = workdir / TRACKED
    return read_object(path).get(name) if path.exists() else None


_REMEMBERS = threading.Lock()


def _remember(workdir: Path, name: str, run: str) -> None:
    path = workdir / TRACKED
    with _REMEMBERS:
        write_json(path, {**(read_object(path) if path.exists() else {}), name: run})


@functools.cache
def _tensorboard() -> tuple[Any, Any, Any]:
    """tensorboardX's summaries, writer of records, and Event. It imports torch if that is installed:
    1.5 s of a start, unused here."""
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from tensorboardX import event_file_writer, summary
        from tensorboardX.proto import event_pb2
    finally:
        if hide:
            del sys.modules["torch"]
    return summary, event_file_writer.EventsWriter, vars(event_pb2)["Event"]


class TensorBoard:
    """Event files in workdir/tensorboard, by tensorboardX.

    Without its SummaryWriter, whose thread ends by a full disk, after which whoever puts something into
    its queue, or closes it, waits for ever.
    """

    def __init__(self, workdir: Path, title: str, start: int, settings: Mapping[str, Any]):
        self._summary, self._writer, self._event = _tensorboard()
        self._folder, self._files = workdir / "tensorboard", 0
        self._file: Any = None
        self._again = self._flushed = 0.0
        # What an earlier process logged after `start` is no longer shown.
        self._add(step=start, file_version="brain.Event:2")
        self._add(step=start, session_log={"status": 1})
        if not start:
            text = f"```\n{json.dumps(settings, indent=1)}\n```"
            self._add(step=0, summary=self._summary.text("settings", text))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(step=step, summary=self._summary.scalar(name, value))

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        if image:
            shown = self._summary.image(title, _pixels(image), dataformats="HWC")
            self._add(step=step, summary=shown)
        self._add(step=step, summary=self._summary.text(title, text))

    def _add(self, **event: Any) -> None:
        """Writes an event. A full disk loses it, and those of the next REOPEN_SECONDS; then follows a
        new file, since nothing is read behind half of a record."""
        now = time.monotonic()
        try:
            if self._file is None:
                if now < self._again:
                    return
                self._folder.mkdir(parents=True, exist_ok=True)
                self._files += 1
                end = f".{os.getpid()}.{self._files}"
                self._file = self._writer(str(self._folder / "events"), end)
            self._file.write_event(self._event(wall_time=time.time(), **event))
            if now - self._flushed >= FLUSH_SECONDS:
                self._flushed = now
                self._file.flush()
        except OSError as error:
            if not self._again:
                log.warning("TensorBoard misses what is logged now: %s", error.strerror)
            self._file, self._again = None, now + REOPEN_SECONDS

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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
        self._client.log_batch(self._id, metrics=metrics)

    def picture(self, step: int, title: str, text: str, image: Path | None) -> None:
        folder = f"samples/{step:07d}"
        self._client.log_text(self._id, text, f"{folder}/{_plain(title)}.txt")
        if image:
            self._client.log_artifact(self._id, str(image), folder)

    def close(self) -> None:
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
