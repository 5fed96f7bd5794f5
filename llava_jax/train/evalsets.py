"""The validation sets of a run, read from data.eval: what each holds and what is scored on it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax import storage
from llava_jax.data.check import HELD_SIDE
from llava_jax.data.settings import split_paths
from llava_jax.data.stored import is_packed
from llava_jax.errors import ConfigError, LlavaError, did_you_mean

HELD_OUT = "heldout"
"""The name of the part that data.holdout holds out, as a validation set."""
ONCE: dict[str, Any] = {
    "pack": "",
    "pack_length": 0,
    "group_by_modality": False,
    "shuffle": False,
    "augment": "",
    "turns_per_sample": 0,
    "cache_images": False,
}
"""Data settings that show every sample once an epoch, as it is stored, in the order of the file."""
_FORM = "NAME path=FILE [images=FOLDER] [ask=N], or NAME benchmark=TASK data=FOLDER [ask=N]"


@dataclass(frozen=True)
class EvalSet:
    """One validation set.

    path: LLaVA JSON for a loss and, of its first `ask` questions, exact match; "" for a set that is
    asked alone. images: the folder of its images. benchmark: a task of eval/, of which the first `ask`
    questions are asked (0: all), with its files in the folder `data`. held: the held-out part.
    """

    name: str
    path: str = ""
    images: str = ""
    ask: int = 0
    benchmark: str = ""
    data: str = ""
    held: bool = False

    def settings(self) -> dict[str, Any]:
        """What differs from the run's data settings where this set is read."""
        if self.held:
            return {**ONCE, **HELD_SIDE}
        own = {"path": self.path, "image_folder": self.images, "weights": (), "holdout": 0.0}
        return {**ONCE, **HELD_SIDE, **own, "holdout_side": "train"}

    @property
    def scores(self) -> tuple[str, ...]:
        """The names of its scores, of which more is better."""
        match = ("exact_match",) if self.path and self.ask else ()
        return (*match, self.benchmark) if self.benchmark else match


def eval_sets(config: Any) -> list[EvalSet]:
    """The sets of a run: those of data.eval, and what is held out where `eval_every` asks for more than
    its loss at the end. Raises ConfigError for an entry that cannot be read."""
    sets = [_parsed(text, config) for text in config.data.eval]
    if config.data.holdout and (sets or config.eval_every):
        sets.append(EvalSet(HELD_OUT, held=True))
    names = [s.name for s in sets]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"data.eval has two sets called {name!r}")
    return sets


def _parsed(text: str, config: Any) -> EvalSet:
    try:
        name, *pairs = shlex.split(text) or [""]
    except ValueError as error:  # a quotation that does not end
        raise ConfigError(f"data.eval {text!r} cannot be read: {error}", fix=_FORM) from None
    if not re.fullmatch(r"[\w.-]+", name) or not pairs:
        raise ConfigError(f"data.eval {text!r} is not a named set", fix=_FORM)
    values: dict[str, Any] = {}
    known = ("path", "images", "ask", "benchmark", "data")
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in known or not value or (key == "ask" and not value.isdigit()):
            near = did_you_mean(key, known, "{}=") if key not in known else None
            raise ConfigError(f"data.eval {name}: {pair!r} is not understood", fix=near or _FORM)
        values[key] = int(value) if key == "ask" else value
    if not values.keys() & {"path", "benchmark"} or ("benchmark" in values) > ("data" in values):
        raise ConfigError(f"data.eval {name} names no file", fix=_FORM)
    folders = split_paths(config.data.image_folder)
    values.setdefault("images", folders[0] if len(folders) == 1 and "path" in values else "")
    return EvalSet(name, **values)


def check_eval(config: Any, *, files: bool = True) -> None:
    """Raises ConfigError for validation settings that no run could mean.

    files: whether the questions of benchmarks are read, and their pictures and packages looked for, too.
    """
    sets = eval_sets(config)
    for s in sets:
        if s.path and not (is_packed(s.path) or storage.is_file(s.path)):
            raise ConfigError(f"data.eval {s.name}: {s.path}: no such data file")
        if s.images and not storage.is_folder(s.images):
            raise ConfigError(f"data.eval {s.name}: there is no folder {s.images}")
        if s.benchmark:
            _check_benchmark(s, files)
    if config.early_stop and not (sets and config.eval_every):
        raise ConfigError(
            "early_stop is set, but there is no validation to wait for",
            fix="set eval_every, and data.eval or data.holdout",
        )
    _check_best(config.best_by, sets)


def _check_benchmark(s: EvalSet, files: bool) -> None:
    from llava_jax.eval.run.command import image_folders, task_folder
    from llava_jax.eval.run.predict import choose, image_paths
    from llava_jax.eval.task import DEFAULT, TASKS, get_task

    if s.benchmark not in TASKS:
        fix = did_you_mean(s.benchmark, TASKS) or f"one of {', '.join(TASKS)}"
        raise ConfigError(f"data.eval {s.name}: no benchmark {s.benchmark!r}", fix=fix)
    task = get_task(s.benchmark)
    if task.judge:
        raise ConfigError(
            f"data.eval {s.name}: a judge model grades {s.benchmark}",
            fix="ask it after the run, with llava-jax eval",
        )
    if not Path(s.data).is_dir():
        raise ConfigError(f"data.eval {s.name}: there is no folder {s.data}")
    if not files:
        return
    try:
        settings = benchmark_settings(s, Path(), "")
        data = task_folder(settings.data, task)
        folders = image_folders(settings, data, task)
        task.check_packages(data, DEFAULT)
        for q in choose(task.questions(data), limit=settings.limit, group_of=task.group_of):
            image_paths(q, folders)
    except LlavaError as error:
        fix = (error.fix or "").replace("--images names", "images= names")
        raise ConfigError(f"data.eval {s.name}: {error.message}", fix=fix or None) from error


def benchmark_settings(s: EvalSet, out: Path, name: str, **how: Any) -> Any:
    """How the questions of a benchmark are asked. out: where answers go. name: of the model."""
    from llava_jax.eval.run.command import RunSettings

    images = Path(s.images) if s.images else None
    return RunSettings(Path(s.data), out, name, images=images, limit=s.ask or None, **how)


def _check_best(best_by: str, sets: list[EvalSet]) -> None:
    """Raises ConfigError unless `best_by` is something that the sets are scored by, or empty."""
    if not sets or not best_by:
        return
    allowed = [f"{s.name}.loss" for s in sets if s.path or s.held]
    allowed = [*(["loss"] if allowed else []), *allowed]
    allowed += [f"{s.name}.{score}" for s in sets for score in s.scores]
    if best_by not in allowed:
        raise ConfigError(
            f"best_by is {best_by!r}, which no validation set gives",
            fix=f"one of {', '.join(allowed)}, or empty to keep no best model",
        )
