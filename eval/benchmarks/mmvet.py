"""MM-Vet (218 questions), graded 0.0 to 1.0 by a judge.

Judge and summary: yuweihao/MM-Vet mm-vet_evaluator.py (gpt-4-0613; LLaVA used gpt-4), one few-shot
table row per question, temperature 0, three tokens. `eval judge` writes the grades, `score` averages them.
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from llava_jax.errors import counted
from llava_jax.eval.answers import Answer, AnswerFile, join
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import expect, find
from llava_jax.eval.judge.mmvet_prompt import mmvet_message
from llava_jax.eval.questions import Question, llava_questions, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Table, Task, TaskSettings, percent
from llava_jax.reader import is_number
from llava_jax.util import read_json, read_object

# A number from 0 to 1 that stands alone: not a part of 10, of 0.5/1, 0,5 or -1, of a word or another scale.
_SCALE = re.compile(r"[\w/%]|[.,]\d|\s*(?:/|%|percent\b|out\b|of\b)", re.IGNORECASE)
_GRADE = re.compile(rf"(?<![\w./,-])(?:0(?:\.\d+)?|1(?:\.0+)?)(?!{_SCALE.pattern})", re.IGNORECASE)


class MMVet(Task):
    name = "mmvet"
    headline = "total"
    max_new_tokens = 1024
    judge = grades = True
    data_files = "mm-vet.json (capabilities, answers); llava-mm-vet.jsonl to ask"
    llava_files = ("llava-mm-vet*.jsonl", "llava_mm_vet*.jsonl")
    id_keys = ("question_id", "id")

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        path, rows = _read_file(data, "mm-vet.json")
        questions = []
        for key, row in rows.items():
            expect(row, f"{path}: {key}", {"question": str, "imagename": str})
            number = key.removeprefix("v1_")
            number = int(number) if number.isdigit() else key
            questions.append(question(number, row["question"], row["imagename"], key=key))
        return questions

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        """Sums a grade file: {id: {"model": […], "content": […], "score": [a grade per run]}}."""
        capabilities, images = _capabilities(data)
        grades = read_grades(answers, self.next_line("judge", answers, data, settings))
        _, coverage = join(capabilities, graded(answers, grades), strict=settings.strict)
        lengths = [len(g["score"]) for g in grades.values()]
        runs, most = min(lengths), max(lengths)
        samples, unread = {}, []
        for key, names in capabilities.items():
            grade = grades.get(key, {"score": [0.0] * runs})
            scores = grade["score"][:runs]
            if None in scores:  # no grade of the judge's: in no mean
                unread.append(key)
                continue
            said = str(grade["content"][0]) if isinstance(grade.get("content"), list) else ""
            details = {"runs": scores, "capabilities": names}
            how = (images.get(key, ""), {"integration": "_".join(names)}, details)
            samples[key] = Sample(sum(scores) / runs, said, 1.0, None, "", *how)
        if not samples:
            raise AnswerError(f"{answers}: not one grade could be read")
        per_run = _per_run(list(samples.values()), runs)
        centre = sum(per_run) / runs
        totals: dict[str, Any] = {
            "total": _round(centre),
            "std": _round(math.sqrt(sum((x - centre) ** 2 for x in per_run) / runs)),
            "runs": [_round(x) for x in per_run],
            "n": len(samples),
            "unread_grades": len(unread),
            "judge": judges_of(grades),
        }
        capability: dict[str, list[Sample]] = defaultdict(list)
        integration: dict[str, list[Sample]] = defaultdict(list)
        for s in samples.values():
            integration[s.groups["integration"]].append(s)
            for c in s.details["capabilities"]:
                capability[c].append(s)
        tables = {"per capability": _table(dict(sorted(capability.items())), runs)}
        tables["per integration"] = _table(integration, runs)
        notes = unread_note(unread)
        if runs < most:  # a judge's work that stopped
            notes.append(
                f"{counted(runs, 'run')} of {most} counted: further ones grade a part alone"
            )
        return Result(self, totals, samples, coverage, tables, notes)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> dict[str, str]:
        """The file of mm-vet_evaluator.py and of its online judge: {"v1_<id>": answer}, in the order of
        the answers."""
        asked = llava_questions(data, self.llava_files)
        keys = _capabilities(data)[0] if asked is None else [_own_id(q.key) for q in asked]
        joined, coverage = join(keys, self._given(answers, settings), strict=settings.strict)
        self.warn_of(coverage, "missing")
        return {key: answer.text for key, answer in joined.items()}

    def _given(self, answers: Path, settings: TaskSettings) -> AnswerFile:
        """An answer file with the ids of mm-vet.json."""
        return self.read(answers, settings).with_ids(lambda a: _own_id(a.id))

    def requests(
        self, answers: Path, data: Path, settings: TaskSettings = DEFAULT
    ) -> list[tuple[str, str]]:
        """(id, judge's message) per question; all must be answered."""
        path, truth = _read_file(data, "mm-vet.json")
        for key, row in truth.items():
            expect(row, f"{path}: {key}", {"question": str, "answer": str})
        asked = {key: row["question"] for key, row in truth.items()}
        joined, _ = join(truth, self._given(answers, settings), asked=asked, strict=True)
        said = {key: answer.text for key, answer in joined.items()}
        return [(k, mmvet_message(r["question"], r["answer"], said[k])) for k, r in truth.items()]


def _own_id(key: str) -> str:
    """The id of mm-vet.json, from it or from its number."""
    return f"v1_{key.removeprefix('v1_')}"


def _read_file(data: Path, *patterns: str) -> tuple[Path, dict[str, Any]]:
    """MM-Vet's file, or one of capabilities alone: its path, and id -> row."""
    path = find(data, patterns, "question file")
    return path, read_object(path, DataError)


def first_word(reply: str) -> str:
    """What a judge's reply of three tokens is read by."""
    return reply.split(" ")[0].strip()


def read_grade(reply: str) -> float | None:
    """The judge's grade: its first word if that is a number from 0 to 1, as in the owner's script,
    else the only such number of the reply ("The score is 0.5."); None where there is neither."""
    try:
        grade = float(first_word(reply))
        if _SCALE.match(reply.strip().removeprefix(first_word(reply))):  # "1 out of 10"
            return None
    except ValueError:
        found = {float(x) for x in _GRADE.findall(reply)}
        grade = found.pop() if len(found) == 1 else -1.0
    return grade if 0.0 <= grade <= 1.0 else None


def _capabilities(data: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Id -> the capabilities a question needs, sorted, each once; and id -> its image."""
    path, rows = _read_file(data, "mm-vet.json", "*capabilit*.json")
    found, images = {}, {}
    for key, row in rows.items():
        row = row if isinstance(row, dict) else {"capability": row}
        names, images[key] = row.get("capability"), str(row.get("imagename", ""))
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(f"{path}: {key}: no list of capabilities")
        found[key] = sorted(set(names))
    return found, images


def read_grades(path: Path, command: str) -> dict[str, dict[str, Any]]:
    """A grade file: id -> {"model": […], "content": […], "score": [a grade per run, or null]}.

    command: the line that has a judge make one, for the error."""
    grades = read_json(path, AnswerError) if path.suffix == ".json" else None
    fix = f"let a judge grade the answers first: {command}"
    if not isinstance(grades, dict) or not grades:
        raise AnswerError(f"{path}: not a grade file (id -> model, content, score)", fix=fix)
    for key, grade in grades.items():
        scores: Any = grade.get("score") if isinstance(grade, dict) else None
        listed = isinstance(scores, list) and scores and isinstance(grade.get("model", []), list)
        if not listed or not all(x is None or (is_number(x) and 0 <= x <= 1) for x in scores):
            what = 'no list of grades from 0 to 1 under "score"'
            raise AnswerError(f"{path}: {key}: {what}", fix=fix)
    return grades


def graded(path: Path, grades: dict[str, dict[str, Any]]) -> AnswerFile:
    """Grades as answers, to be joined; each row is a grade."""
    return AnswerFile(path, [Answer(k, "", n, g) for n, (k, g) in enumerate(grades.items(), 1)])


def judges_of(grades: dict[str, dict[str, Any]]) -> str:
    """The names of the models that gave grades."""
    return ", ".join(sorted({str(m) for g in grades.values() for m in g.get("model", ())}))


def unread_note(keys: list[str]) -> list[str]:
    """A note on what no grade could be read for, if any."""
    return [f"no grade could be read for {', '.join(keys)}; no mean has them"] if keys else []


def _per_run(samples: list[Sample], runs: int) -> list[float]:
    """The mean of each run in percent: the evaluator takes these first, and then their mean."""
    return [percent(s.details["runs"][r] for s in samples) for r in range(runs)]


def _table(groups: dict[str, list[Sample]], runs: int) -> Table:
    means = {name: _round(sum(_per_run(g, runs)) / runs) for name, g in groups.items()}
    return {name: {"score": mean, "n": len(groups[name])} for name, mean in means.items()}


def _round(x: float) -> float:
    # numpy's rounding, which the evaluator uses: 31.15 becomes 31.2, Python's round says 31.1.
    return round(x * 10) / 10
