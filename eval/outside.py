"""Tasks that other people write: a Python or YAML file in a folder (--include), or an entry point.

A Python file defines TASK, an instance of Task or SimpleTask. A YAML file says where rows are, how they
are asked and by which rule they are read; docs/evaluation.md has an example of each.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError, did_you_mean
from llava_jax.eval import truths
from llava_jax.eval.answers import join
from llava_jax.eval.benchmarks.mmvet import graded, judges_of, read_grades, unread_note
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import check_folder, read_yaml
from llava_jax.eval.judge.mmvet_prompt import mmvet_message
from llava_jax.eval.rules import RULES
from llava_jax.eval.simple import Item, SimpleTask, asked_of, choices
from llava_jax.eval.task import DEFAULT, TASKS, Result, Task, TaskSettings, register

ENTRY_POINTS = "llava_jax.eval_tasks"
# Key of a YAML file -> its type. image, answer, options, id, group (a table of its values) and together
# (rows that are right only all at once) are names of columns.
KEYS: dict[str, type | tuple[type, ...]] = {
    "name": str, "title": str, "files": (str, list), "hub": str, "prompt": str, "image": (str, list),
    "answer": str, "options": (str, list), "id": str, "group": str,
    "together": str, "rule": str, "max_new_tokens": int,
}  # fmt: skip
NEEDED = ("name", "prompt", "answer", "rule")


def include(folder: Path) -> list[str]:
    """Registers the tasks of a folder's .py, .yaml and .yml files; returns their names.

    Raises LlavaError naming the file that is no task, or whose name is taken.
    """
    check_folder("--include", folder)
    names = []
    for path in sorted(folder.iterdir()):
        if path.suffix in (".yaml", ".yml"):
            task: Any = _from_yaml(path)
        elif path.suffix == ".py" and not path.name.startswith(("_", "test_")):
            task = getattr(_module(path), "TASK", None)
        else:
            continue
        names.append(_add(task, str(path)))
        task.included = str(folder)
    if not names:
        raise LlavaError(f"--include {folder}: no .py or .yaml file in it")
    return names


def installed() -> list[str]:
    """Registers what installed packages offer under the entry point; returns the names."""
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return [_add(p.load(), f"entry point {p.value}") for p in points if p.name not in TASKS]


def _add(task: Any, where: str) -> str:
    if not isinstance(task, Task) or not isinstance(getattr(task, "name", None), str):
        raise LlavaError(f"{where}: defines no TASK with a name")
    by_rule = isinstance(task, SimpleTask) and type(task).judged is SimpleTask.judged
    if by_rule and (rule := getattr(task, "rule", None)) not in RULES:
        fix = did_you_mean(str(rule), RULES) or f"one of {', '.join(RULES)}"
        raise LlavaError(f"{where}: there is no rule {rule!r}", fix=fix)
    register(task, where)
    return task.name


def _module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_llava_jax_task_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise LlavaError(f"{path}: cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except LlavaError:
        raise
    except Exception as e:  # whatever a foreign file raises
        raise LlavaError(f"{path}: {type(e).__name__}: {' '.join(str(e).split())}") from e
    return module


class YamlTask(SimpleTask):
    """A task of a YAML file. keys: what the file says, checked."""

    def __init__(self, keys: dict[str, Any]):
        self.keys = keys
        self.name, self.rule = keys["name"], keys["rule"]  # type: ignore[misc]
        self.judge = self.grades = self.rule == "judge"  # type: ignore[misc]
        self.files = tuple(_listed(keys.get("files", "*.parquet")))  # type: ignore[misc]
        self.data_files = " and ".join(self.files)  # type: ignore[misc]
        self.max_new_tokens = keys.get("max_new_tokens", 128)  # type: ignore[misc]
        self.own_title = keys.get("title", "")

    def item(self, row: dict[str, Any], number: int) -> Item:
        keys = self.keys
        options, truth = _options(row, keys.get("options")), row[keys["answer"]]
        if self.rule in ("letter", "first_letter"):
            truth = truths.option(truth, options)
        else:
            truth = truths.yes_no(truth) if self.rule == "yes_no" else truths.texts(truth)
        lines = choices("", options, "").removeprefix("\n")
        images = [row[name] for name in _listed(keys.get("image")) if row.get(name) is not None]
        if "image" in keys and not images:
            raise ValueError(f"no picture in {', '.join(_listed(keys['image']))}")
        flat = tuple(i for x in images for i in (x if isinstance(x, list) else [x]))
        shown = {name: "" if value is None else value for name, value in row.items()}
        named = {n: str(shown[keys[n]]) for n in ("id", "group", "together") if n in keys}
        if named.get("id") == "":
            raise ValueError(f"its id, {keys['id']}, is empty")
        prompt = keys["prompt"].format_map({**shown, "options": lines})
        groups = {keys["group"]: named["group"]} if named.get("group") else {}
        key, together = named.get("id", str(number)), named.get("together", "")
        return Item(key, prompt, truth, flat, options, groups, together)

    def requests(
        self, answers: Path, data: Path, settings: TaskSettings = DEFAULT
    ) -> list[tuple[str, str]]:
        """(id, judge's message, which is MM-Vet's) per question; all must be answered."""
        items = self.items(data, settings)
        how = {"strict": True, **asked_of(items)}
        joined, _ = join([i.key for i in items], self.read(answers, settings), **how)
        return [(i.key, mmvet_message(i.prompt, str(i.truth), joined[i.key].text)) for i in items]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        if not self.grades:
            return super().score(answers, data, settings)
        items = self.items(data, settings)
        grades = read_grades(answers, self.next_line("judge", answers, data, settings))
        keys, end = [i.key for i in items], self.lacks(data, settings, items)
        joined, coverage = join(keys, graded(answers, grades), strict=settings.strict, open_end=end)
        read = {k: [x for x in a.row["score"] if x is not None] for k, a in joined.items()}
        unread = [k for k, scores in read.items() if not scores]
        if not (kept := [i for i in items if i.key not in unread]):
            raise AnswerError(f"{answers}: not one grade could be read")
        samples = {i.key: self._sample(i, joined) for i in kept}
        for key in samples.keys() & read.keys():
            samples[key].score = sum(read[key]) / len(read[key])
        result = self.result(kept, samples, Result(self, {}, samples, coverage))
        result.notes += unread_note(unread)
        result.totals["judge"] = judges_of(grades)
        return result

    def judged(self, text: str, item: Item) -> tuple[float, Any]:
        return (0.0, None) if self.grades else super().judged(text, item)

    def paths(self, data: Path, settings: TaskSettings) -> list[Path]:
        data = _downloaded(self.keys["hub"]) if "hub" in self.keys else data
        each = [self.matching(data, [pattern], settings) for pattern in self.files]
        return [*dict.fromkeys(path for found in each for path in found)]

    def rows(self, data: Path, settings: TaskSettings):
        columns = {n: k for k in ("image", "options") for n in _listed(self.keys.get(k))}
        for path, number, row in super().rows(data, settings):
            yield path, number, row
            columns = {n: k for n, k in columns.items() if n not in row}
        if columns:
            name, key = next(iter(columns.items()))
            what = f"no row has the column {name!r}, which {key} of {self.name} is"
            raise DataError(f"{data}: {what}")


def _from_yaml(path: Path) -> YamlTask:
    keys = read_yaml(path)
    for name, value in keys.items():
        if name not in KEYS:
            fix = did_you_mean(str(name), KEYS) or f"known are {', '.join(KEYS)}"
            raise DataError(f"{path}: {name} is not a key of a task", fix=fix)
        if not isinstance(value, KEYS[name]) or isinstance(value, bool):
            raise DataError(f"{path}: {name} is {value!r}, which it cannot be")
    if absent := [name for name in NEEDED if name not in keys]:
        raise DataError(f"{path}: {', '.join(absent)} is missing")
    if keys["rule"] not in (*RULES, "judge"):
        fix = f"one of {', '.join(RULES)}, judge"
        raise DataError(f"{path}: there is no rule {keys['rule']!r}", fix=fix)
    if "options" in keys and "{options" not in keys["prompt"]:
        fix = "put {options} in it, or leave options out"
        raise DataError(f"{path}: its prompt shows no options", fix=fix)
    for pattern in _listed(keys.get("files")):
        try:  # pathlib says in its own ways that it knows no such pattern
            next(Path("/nonexistent").glob(pattern), None)
        except (ValueError, NotImplementedError, TypeError, IndexError):
            raise DataError(f"{path}: files is {pattern!r}, which is no pattern") from None
    return YamlTask(keys)


def _listed(value: Any) -> Sequence[str]:
    return value if isinstance(value, list) else [value] if value is not None else []


def _options(row: dict[str, Any], columns: Any) -> tuple[str, ...]:
    """The options' texts: of columns, of which the last may be empty, or of one column's list."""
    if isinstance(columns, str):
        return truths.options(row[columns])
    found = [row.get(c) for c in _listed(columns)]
    while found and truths.hidden(found[-1]):
        found.pop()
    if len(found) == 1 or any(map(truths.hidden, found)):
        what = f"one of the options {', '.join(columns)} is empty"
        raise ValueError(f"{what}, but not those behind it")
    return truths.options(found)


@cache
def _downloaded(name: str) -> Path:
    """The folder of a data set of the hub: its parquet files, kept in the hub's own cache."""
    import huggingface_hub

    wanted = ["*.parquet", "*.jsonl", "*.json"]
    try:
        get = huggingface_hub.snapshot_download
        return Path(get(name, repo_type="dataset", allow_patterns=wanted))
    except Exception as e:  # its own errors, and those of whatever it asks with
        what = " ".join(str(e).split())[:120]
        raise DataError(f"hub data set {name}: {type(e).__name__}: {what}") from None
