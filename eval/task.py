"""What a benchmark is, and the list of them. A benchmark is one file under eval/benchmarks.

Adding one: write `eval/benchmarks/<name>.py` with a `Task` subclass of that name, add its line to
`TASKS`, and its paper numbers to eval/report/paper.py. Nothing here or there imports jax.
"""

import importlib
import json
import logging
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from llava_jax.errors import LlavaError, did_you_mean
from llava_jax.eval.answers import AnswerFile, Coverage, Joined, join, read_answers
from llava_jax.eval.questions import Question, llava_questions
from llava_jax.eval.rules import LETTERS, read_letter
from llava_jax.util import write_text

if TYPE_CHECKING:
    from llava_jax.eval.simple import Item

logger = logging.getLogger(__name__)

TASKS = {
    "vqav2": "VQAv2", "gqa": "GQA", "vizwiz": "VizWiz", "scienceqa": "ScienceQA", "textvqa": "TextVQA",
    "pope": "POPE", "mme": "MME", "mmbench": "MMBench", "mmbench_cn": "MMBench-CN", "seed": "SEED-Bench",
    "llava_wild": "LLaVA-Bench (in the wild)", "mmvet": "MM-Vet", "coco30": "LLaVA-Bench (COCO)",
    "refcoco": "RefCOCO", "chair": "CHAIR", "mmstar": "MMStar", "mmmu": "MMMU", "mmvp": "MMVP",
    "cvbench": "CV-Bench", "realworldqa": "RealWorldQA", "hallusion": "HallusionBench",
    "naturalbench": "NaturalBench", "ocrbench": "OCRBench", "chartqa": "ChartQA", "docvqa": "DocVQA",
    "infovqa": "InfographicVQA", "ai2d": "AI2D", "blink": "BLINK", "mathvista": "MathVista",
}  # fmt: skip
Table = dict[str, dict[str, float]]  # row -> column -> number
ALIASES = {"sqa": "scienceqa", "seedbench": "seed", "llava_bench": "llava_wild", "vqa": "vqav2"}
_BESIDE = {
    "mmbench_cn": "mmbench",
    "infovqa": "docvqa",
    "coco30": "llava_wild",
}  # whose file has it


@dataclass(slots=True)
class Sample:
    """One scored answer. `score` is in 0..1 (reviews: 0..10) and is what a comparison flips on.

    parsed: what the owner's rule read out of the answer. groups: kind of group -> the sample's.
    details: what else the result file says of it.
    """

    score: float
    answer: str
    truth: Any
    parsed: Any = None
    prompt: str = ""
    image: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        out: dict[str, Any] = {"score": self.score, "answer": self.answer, "truth": self.truth}
        optional = {n: getattr(self, n) for n in ("parsed", "prompt", "image", "groups")}
        return out | {n: value for n, value in optional.items() if value} | self.details


@dataclass
class Result:
    """The scores of one answer file on one benchmark.

    totals: name -> number. Where LLaVA's script and the owner's scorer differ, both are here.
    tables: name -> {row: number or dict of numbers}.
    samples: key -> Sample, in the order of the questions.
    headline: the total that stands for the result, where it is not the task's.
    """

    task: "Task"
    totals: dict[str, Any]
    samples: dict[str, Sample]
    coverage: Coverage
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    headline: str = ""

    def to_json(self) -> dict[str, Any]:
        """A JSON object: task, headline, totals, tables, coverage, notes, per_sample."""
        return {
            "task": self.task.name,
            "title": self.task.title,
            "headline": self.headline or self.task.headline,
            "unit": self.task.unit,
            "totals": self.totals,
            "tables": self.tables,
            "coverage": self.coverage.to_json(),
            "notes": self.notes,
            "per_sample": {k: s.to_json() for k, s in self.samples.items()},
        }


@dataclass(frozen=True)
class TaskSettings:
    """How to read and score a benchmark. split: part of a file name where several fit. strict:
    incomplete coverage raises. skip_bad_lines: unreadable lines are counted instead of raising.
    options: what one task alone takes (see its file), such as gpt4 and requery answers for
    ScienceQA's ensemble."""

    split: str | None = None
    strict: bool = False
    skip_bad_lines: bool = False
    options: dict[str, str] = field(default_factory=dict)


DEFAULT = TaskSettings()


class Task:
    """Base class of the benchmarks: what they share, and what each must define."""

    name: ClassVar[str]
    headline: ClassVar[str]  # the key of `totals` that stands beside the paper's number
    unit: ClassVar[float] = 100.0  # full scale of the headline
    unit_note: ClassVar[str] = "rates are in percent"
    max_new_tokens: ClassVar[int] = 128
    judge: ClassVar[bool] = False  # a judge model grades the answers before they are scored
    # A line for `eval list`: which files of the owner or of LLaVA the data folder holds.
    data_files: ClassVar[str]
    llava_files: ClassVar[tuple[str, ...]] = ()  # globs of LLaVA's own question file
    has_splits: ClassVar[bool] = False  # --split chooses among several of those
    takes_split: ClassVar[bool] = False  # --split is a split of the owner's files
    options: ClassVar[tuple[str, ...]] = ()  # what it takes of TaskSettings.options
    upload_lines: ClassVar[bool] = False  # its server takes jsonl
    upload_name: ClassVar[str] = "upload.json"  # what a run calls the file
    # Fields of an answer row, in the order in which they are looked for.
    id_keys: ClassVar[tuple[str, ...]] = ("question_id",)
    text_keys: ClassVar[tuple[str, ...]] = ("text", "answer")
    answers_in: ClassVar[str] = ""  # key of a results file under which the answers are
    free_answers: ClassVar[bool] = False  # a model may extract answers without options
    grades: ClassVar[bool] = False  # its judge gives grades from 0 to 1, and no reviews
    own_title: str = ""  # of a task from outside
    included: str = ""  # the folder of --include that it is from

    @property
    def title(self) -> str:
        return TASKS.get(self.name) or self.own_title or self.name

    def questions(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Question]:
        """The questions in the owner's order, prompts as in the paper: those of LLaVA's question
        file if `data` holds one, else made from the owner's files."""
        split = settings.split if self.has_splits else None
        llavas = llava_questions(data, self.llava_files, split)
        return self.owner_questions(data, settings) if llavas is None else llavas

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        """The questions made from the owner's files."""
        raise NotImplementedError

    def check_packages(self, data: Path, settings: TaskSettings) -> None:
        """Raises LlavaError for a package that is not installed and that the end of a run asks for."""

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list["Item"]:
        """The questions with their options, of which a model may read an answer; none by default."""
        return []

    def letters(self, item: "Item") -> str:
        """The letters of an item's options."""
        return LETTERS[: len(item.options)]

    def inferred(self, text: str, item: "Item") -> str | None:
        """What needs no model to be read out of an answer; None where a model is to read it."""
        read = read_letter(text, item.options)
        return read if read != "Z" or not text.strip() else None

    def group_of(self, question: Question) -> str:
        """What a question is scored together with (a pair, a rotation); by default it stands alone."""
        return question.key

    def weigh(self, samples: Sequence[Sample]) -> None:
        """Gives samples the weights of which the headline is the mean; none by default."""

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        """Scores an answer file by the owner's rule."""
        raise NotImplementedError

    def submission(
        self, answers: Path, data: Path, out: Path, settings: TaskSettings = DEFAULT
    ) -> Path:
        """Writes the file that the benchmark's server takes and returns its path."""
        upload = self.upload(answers, data, settings)
        rows = [json.dumps(row) + "\n" for row in upload] if self.upload_lines else []
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, "".join(rows) if self.upload_lines else json.dumps(upload))
        return out

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> Any:
        """What `submission` writes, where that is JSON or jsonl."""
        raise LlavaError(f"{self.name}: no server takes a submission, it is scored here")

    def next_line(
        self, action: str, answers: Path, data: Path, settings: TaskSettings, out: Any = None
    ) -> str:
        """The command line that goes on with an answer file, to be typed as it is but for a judge's NAME.

        action: score, judge or extract. out: what it writes, or for score what extract wrote.
        """
        words: list[Any] = ["llava-jax", "eval", action, self.name, "--answers", answers]
        words += ["--data", data] + (["--include", self.included] if self.included else [])
        words += ["--split", settings.split] if settings.split else []
        words += [w for k, v in settings.options.items() for w in ("--set", f"{k}={v}")]
        words += ["--skip-bad-lines"] if settings.skip_bad_lines else []
        if action != "score":
            made = "grades.json" if self.grades else "reviews.jsonl"
            words += ["--out", out or answers.with_name(made), "--judge-model", "NAME"]
        elif out is not None:
            words += ["--extracted", out]
        return shlex.join(map(str, words))

    def warn_of(self, coverage: Coverage, missing: str = "empty") -> None:
        """Warns of what is wrong with the answers of an upload. missing: what becomes of those that are."""
        if n := len(coverage.missing):
            words = "%s: %d of %d answers in the upload are %s"
            logger.warning(words, self.title, n, coverage.expected, missing)
        for line in replace(coverage, missing=[]).lines():
            logger.warning("%s: %s", self.title, line)

    def join(
        self, ids: Iterable[str], answers: Path, settings: TaskSettings, **how: Any
    ) -> tuple[Joined, Coverage]:
        """The answers in a file by question, and how they cover `ids`. how: see answers.join."""
        return join(ids, self.read(answers, settings), strict=settings.strict, **how)

    def read(self, path: Path, settings: TaskSettings, **how: Any) -> AnswerFile:
        """An answer file of this benchmark. how: see read_answers."""
        how |= {"id_keys": self.id_keys, "text_keys": self.text_keys, "inside": self.answers_in}
        return read_answers(path, skip_bad_lines=settings.skip_bad_lines, **how)


def check_settings(tasks: Sequence[Task], settings: TaskSettings) -> None:
    """Raises LlavaError for an option that none of `tasks` takes, or a split where none has any."""
    names = ", ".join(task.name for task in tasks)
    known = [name for task in tasks for name in task.options]
    for name in settings.options.keys() - set(known):
        has = f"{names} takes {', '.join(known) or 'none'}"
        fix = did_you_mean(name, known, "--set {}=VALUE") or has
        raise LlavaError(f"--set {name}: not an option of {names}", fix=fix)
    if "requery" in settings.options and "gpt4" not in settings.options:
        raise LlavaError("--set requery: does nothing without --set gpt4=FILE")
    for name in ("ocr", "videos"):
        if (value := settings.options.get(name)) not in (None, "yes", "no"):
            raise LlavaError(f"--set {name}={value}: not yes or no")
    if settings.split and not any(task.has_splits or task.takes_split for task in tasks):
        raise LlavaError(f"--split {settings.split}: {names} has no splits to choose from")


_OUTSIDE: dict[str, Task] = {}  # tasks that were registered


def register(task: Task, where: str) -> None:
    """Makes a task from outside known by its name; raises LlavaError where the name is taken."""
    name = task.name
    if name != name.lower() or not name.replace("_", "").isalnum():
        raise LlavaError(f"{where}: the name {name!r} is not of small letters, digits and _")
    if (name in TASKS and name not in _OUTSIDE) or name in ALIASES:
        raise LlavaError(f"{where}: there is a benchmark {name} already", fix="give another name")
    _OUTSIDE[name], TASKS[name] = task, task.own_title or name


def get_task(name: str) -> Task:
    """The benchmark called `name` ("pope", "mmbench_cn", …); raises LlavaError for another name."""
    key = name.lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in TASKS:
        from llava_jax.eval.outside import installed

        installed()
    if key in _OUTSIDE:
        return _OUTSIDE[key]
    if key not in TASKS:
        fix = did_you_mean(key, [*TASKS, *ALIASES]) or f"one of {', '.join(TASKS)}"
        raise LlavaError(f"unknown benchmark {name!r}", fix=fix)
    return _shipped(key)


@cache
def _shipped(name: str) -> Task:
    module = importlib.import_module(f"llava_jax.eval.benchmarks.{_BESIDE.get(name, name)}")
    return next(c for c in vars(module).values() if getattr(c, "name", "") == name)()


def percent(scores: Iterable[float], digits: int | None = None) -> float:
    """100 times the mean, or 0.0 of nothing. digits: rounded to, where the owner's scorer does."""
    scores = list(scores)
    mean = 100.0 * sum(scores) / len(scores) if scores else 0.0
    return mean if digits is None else round(mean, digits)


def by_group(samples: Iterable[Sample], group: str, digits: int | None = None) -> Table:
    """Per value of a sample's `group`: {"score": percent, "n": count}, in order of appearance."""
    lists: dict[str, list[float]] = {}
    for s in samples:
        if group in s.groups:
            lists.setdefault(s.groups[group], []).append(s.score)
    return {k: {"score": percent(v, digits), "n": len(v)} for k, v in lists.items()}
