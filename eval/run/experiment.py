"""What an evaluation is: tasks, model and settings, from the command line, a file, or a result.

A file (YAML or JSON) has the names of the options; the command line has precedence over it. Every
result carries its own under "experiment", so a result file is such a file too.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError, did_you_mean
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import read_yaml
from llava_jax.eval.task import Task, TaskSettings, check_settings, get_task

# Option -> its type. `tasks` may also be a list, or an object task -> {split, set}.
OPTIONS: dict[str, type] = {
    "model": str, "endpoint": str, "tasks": str, "data": Path, "images": Path, "include": Path,
    "dtype": str, "base": str, "vision_tower": str, "allow_pickle": bool, "quantize": str, "name": str,
    "template": str, "mesh": str, "batch_size": int, "limit": int, "shuffle_seed": int,
    "max_new_tokens": int, "key_env": str, "per_minute": float, "image_tokens": int,
    "image_tokens_by": str, "image_positions": str,
}  # fmt: skip
DEFAULTS = {"batch_size": 16, "key_env": "OPENAI_API_KEY", "allow_pickle": False, "quantize": ""}
PLACES = ("data", "images", "include", "model", "base", "vision_tower")


def resolve(args: argparse.Namespace) -> Any:
    """Fills what the command line leaves open from --config and the defaults; returns its tasks, as
    `tasks_of` takes them."""
    given = read_experiment(args.config) if args.config else {}
    tasks = args.tasks if args.tasks is not None else given.pop("tasks", None)
    given.pop("tasks", None)
    for name in OPTIONS:
        on_the_line = getattr(args, name, None)
        if name != "tasks" and _open(on_the_line):
            setattr(args, name, given.get(name, DEFAULTS.get(name)))
    return tasks


def read_experiment(path: Path) -> dict[str, Any]:
    """The options in a file of an experiment or of a result; raises LlavaError naming a wrong one."""
    value = read_yaml(path)
    if isinstance(value.get("experiment"), dict):
        value = value["experiment"]
    elif "per_sample" in value:
        fix = "name the result.json of a run"
        raise DataError(f"{path}: a result of eval score, which asked nothing", fix=fix)
    found: dict[str, Any] = {}
    for name, given in value.items():
        kind = OPTIONS.get(str(name).replace("-", "_"))
        if kind is None:
            fix = did_you_mean(str(name), OPTIONS) or f"known are {', '.join(OPTIONS)}"
            raise DataError(f"{path}: {name} is not an option of an experiment", fix=fix)
        if given is None:
            continue
        special: dict[type, Any] = {float: (int, float), Path: str}
        wanted = (str, list, dict) if name == "tasks" else special.get(kind, kind)
        if not isinstance(given, wanted) or (kind is not bool and isinstance(given, bool)):
            raise DataError(f"{path}: {name} is {given!r}, not of type {kind.__name__}")
        found[str(name).replace("-", "_")] = Path(given) if kind is Path else given
    return found


def tasks_of(
    tasks: Any, split: str | None, options: Mapping[str, str]
) -> list[tuple[Task, TaskSettings]]:
    """Each task with its settings.

    Args:
      tasks: "vqav2:val2014,scienceqa", a list of such names, or name -> {"split": …, "set": {…}}.
      split: of the tasks that have splits and name none.
      options: name, or task.name, -> value; each goes to the tasks that take it.
    Raises:
      LlavaError: an unknown task, one with two splits or sets of options, whose results would be one
        file, or a split or an option that no task takes.
    """
    if isinstance(tasks, str):
        tasks = [name for name in tasks.replace(" ", "").split(",") if name]
    if not isinstance(tasks, dict):
        tasks = dict.fromkeys(map(str, tasks))
    chosen: list[tuple[Task, TaskSettings]] = []
    for text, own in tasks.items():
        name, _, part = str(text).partition(":")
        own = own or {}
        if not isinstance(own, dict) or own.keys() - {"split", "set"}:
            raise LlavaError(f"task {name}: {own!r} is not an object of split and set")
        task, part, given = get_task(name), part or own.get("split"), own.get("set") or {}
        if not isinstance(part, str | None) or not isinstance(given, dict):
            raise LlavaError(f"task {name}: the split is not text, or set is no object of options")
        for k, v in given.items():
            if not (isinstance(k, str) and isinstance(v, str)):
                fix = 'quote it: "no"' if isinstance(v, bool) else None
                raise LlavaError(f"task {name}: set {k}: {v!r} is not text", fix=fix)
        settings = TaskSettings(split=part, options=dict(given))
        check_settings([task], settings)
        chosen.append((task, settings))
    named = [(*name.rpartition(".")[::2], value) for name, value in options.items()]
    plain = {key: value for _, key, value in named}
    check_settings([task for task, _ in chosen], TaskSettings(split=split, options=plain))
    for n, (task, own) in enumerate(chosen):
        mine = {k: v for at, k, v in named if k in task.options and at in ("", task.name)}
        split_here = split if task.has_splits or task.takes_split else None
        how = {"split": own.split or split_here, "options": own.options | mine}
        chosen[n] = (task, replace(own, **how))
    once: dict[str, tuple[Task, TaskSettings]] = {}
    for task, own in chosen:
        if once.setdefault(task.name, (task, own))[1] != own:
            what = f"--tasks names {task.name} twice, with different splits or options"
            raise LlavaError(what, fix="ask each into an --out of its own")
    return [*once.values()]


def experiment_of(args: argparse.Namespace, task: Task, settings: TaskSettings) -> dict[str, Any]:
    """The options that ask one task again, folders by their full paths."""
    own = {"split": settings.split, "set": dict(settings.options)}
    found: dict[str, Any] = {"tasks": {task.name: {k: v for k, v in own.items() if v}}}
    for name in OPTIONS:
        value: Any = getattr(args, name, None)
        if name != "tasks" and not _open(value):
            there = name in PLACES and Path(value).exists()
            found[name] = str(Path(value).resolve()) if there else value
    return {k: str(v) if isinstance(v, Path) else v for k, v in found.items()}


def _open(value: Any) -> bool:
    return value is None or value is False or value == ""  # 0 is a seed
