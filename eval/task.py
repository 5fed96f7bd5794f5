"""What a benchmark is, and the list of them. A benchmark is one file under eval/benchmarks.

Adding one: write `eval/benchmarks/<name>.py` with a `Task` subclass named `TASK`, add its line to
`TASKS`, and its paper numbers to eval/paper.py. Nothing here or there imports jax.
"""

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava_jax.errors import LlavaError
from llava_jax.eval.answers import Answer, Coverage
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, expect, find_optional, read_json, read_rows

# Appended prompts of LLaVA-1.5 (paper Table 8, scripts/v1_5/eval).
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."

TASKS = {
    "vqav2": "VQAv2",
    "gqa": "GQA",
    "vizwiz": "VizWiz",
    "scienceqa": "ScienceQA",
    "textvqa": "TextVQA",
    "pope": "POPE",
    "mme": "MME",
    "mmbench": "MMBench",
    "mmbench_cn": "MMBench-CN",
    "seed": "SEED-Bench",
    "llava_wild": "LLaVA-Bench (in the wild)",
    "mmvet": "MM-Vet",
    "coco30": "LLaVA-Bench (COCO)",
    "refcoco": "RefCOCO",
    "chair": "CHAIR",
}
ALIASES = {"sqa": "scienceqa", "seedbench": "seed", "llava_bench": "llava_wild", "vqa": "vqav2"}


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask a model.

    key: unique within the task, stable between runs (a resumed run goes by it).
    prompt: the user's words. The model sees "<image>\\n" before them, once, if there are images.
    images: file names under the image folder, or bytes of an encoded image.
    record: what the answer row holds besides `text` (question_id, prompt, …).
    """

    key: str
    prompt: str
    images: tuple[str | bytes, ...]
    record: dict[str, Any]


@dataclass(slots=True)
class Sample:
    """One scored answer. `score` is in 0..1 (reviews: 0..10) and is what a comparison flips on."""

    score: float
    answer: str
    truth: Any
    parsed: Any = None
    prompt: str = ""
    image: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """The scores of one answer file on one benchmark.

    headline: the key of `totals` that stands beside the paper's number.
    totals: name -> number. Where LLaVA's script and the owner's scorer differ, both are here.
    tables: name -> {row: number or dict of numbers}.
    samples: key -> Sample, in the order of the questions.
    unit: full scale of the headline (100 for a percentage).
    """

    task: str
    headline: str
    totals: dict[str, Any]
    samples: dict[str, Sample]
    coverage: Coverage
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unit: float = 100.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object: task, headline, totals, tables, coverage, notes, per_sample."""
        return {
            "task": self.task,
            "title": TASKS.get(self.task, self.task),
            "headline": self.headline,
            "unit": self.unit,
            "totals": self.totals,
            "tables": self.tables,
            "coverage": self.coverage.to_json(),
            "notes": self.notes,
            "per_sample": {k: _sample_json(s) for k, s in self.samples.items()},
        }


def _sample_json(s: Sample) -> dict[str, Any]:
    out: dict[str, Any] = {"score": s.score, "answer": s.answer, "truth": s.truth}
    for name in ("parsed", "prompt", "image", "groups"):
        if value := getattr(s, name):
            out[name] = value
    return out | s.extra


@dataclass(frozen=True)
class Options:
    """How to score. split: part of a file name where several fit. strict: incomplete coverage
    raises. skip_bad_lines: unreadable lines are counted instead of raising. extra: what one task
    alone takes (see its file), such as gpt4 and requery answers for ScienceQA's ensemble."""

    split: str | None = None
    strict: bool = False
    skip_bad_lines: bool = False
    extra: dict[str, str] = field(default_factory=dict)


DEFAULT = Options()


class Task:
    """Base of the benchmarks: what they have in common, and what each must say."""

    name: ClassVar[str]
    title: ClassVar[str]
    max_new_tokens: ClassVar[int] = 128
    template: ClassVar[str] = "vicuna_v1"
    # A line for `eval list`: which files of the owner or of LLaVA the data folder holds.
    data_files: ClassVar[str]
    judge: ClassVar[bool] = False

    def questions(self, data: Path, options: Options = DEFAULT) -> list[Question]:
        """The questions in the owner's order, prompts as in the paper."""
        raise NotImplementedError

    def score(self, answers: Path, data: Path, options: Options = DEFAULT) -> Result:
        """Scores an answer file by the owner's rule."""
        raise NotImplementedError

    def submission(self, answers: Path, data: Path, out: Path, options: Options = DEFAULT) -> Path:
        """Writes the file that the benchmark's server takes and returns its path."""
        raise LlavaError(f"{self.name}: no server takes a submission, it is scored here")


def get_task(name: str) -> Task:
    """The benchmark called `name` ("pope", "mmbench_cn", …); raises LlavaError for another name."""
    key = name.lower().replace("-", "_")
    key = ALIASES.get(key, key)
    if key not in TASKS:
        raise LlavaError(f"unknown benchmark {name!r}", fix=f"one of {', '.join(TASKS)}")
    return importlib.import_module(f"llava_jax.eval.benchmarks.{key}").TASK


def llava_questions(
    data: Path, patterns: Sequence[str], split: str | None = None
) -> list[Question] | None:
    """The questions of one of LLaVA's own question files (jsonl: question_id, image, text,
    category), or None where there is none. The key is the id, with "#2", … where ids repeat."""
    path = find_optional(data, patterns, "question file of LLaVA", split)
    if path is None:
        return None
    seen: dict[str, int] = {}
    questions = []
    for line, row in read_rows(path):
        expect(row, f"{path} line {line}", {"question_id": ID, "text": str})
        for name in ("image", "category"):
            if row.get(name) is not None:
                expect(row, f"{path} line {line}", {name: str})
        key = str(row["question_id"])
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            key = f"{key}#{seen[key]}"
        text = row["text"]
        record = {"question_id": row["question_id"], "prompt": row["text"]}
        if "category" in row:
            record["category"] = row["category"]
        images = (row["image"],) if row.get("image") else ()
        questions.append(Question(key, text, images, record))
    return questions


def rows_of(path: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a benchmark's file; raises DataError naming the line whose `fields` (see
    files.expect) are missing or of another type."""
    return [expect(row, f"{path} line {line}", fields) for line, row in read_rows(path)]


def listed(
    path: Path, key: str, fields: Mapping[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A JSON file's object, and the objects in its list `key`, checked like `rows_of`."""
    value = read_json(path)
    rows = value.get(key) if isinstance(value, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path}: no list {key!r} in it")
    for n, row in enumerate(rows, 1):
        expect(row, f"{path}: {key} entry {n}", fields)
    return value, rows


def percent(scores: Iterable[float]) -> float:
    """100 times the mean, or 0.0 of nothing."""
    scores = list(scores)
    return 100.0 * sum(scores) / len(scores) if scores else 0.0


def by_group(samples: Iterable[Sample], group: str) -> dict[str, dict[str, float]]:
    """Per value of a sample's `group`: {"score": percent, "n": count}, in order of appearance."""
    lists: dict[str, list[float]] = {}
    for s in samples:
        if group in s.groups:
            lists.setdefault(s.groups[group], []).append(s.score)
    return {k: {"score": percent(v), "n": len(v)} for k, v in lists.items()}


def answer_text(joined: dict[str, Answer], key: str) -> str:
    """The answer of a question, "" if there is none."""
    return joined[key].text if key in joined else ""
