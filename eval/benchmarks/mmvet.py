"""MM-Vet (218 questions), graded 0.0 to 1.0 by a judge.

Judge and summary: yuweihao/MM-Vet mm-vet_evaluator.py (gpt-4-0613; LLaVA used gpt-4), one few-shot
table row per question, temperature 0, three tokens. `eval judge` writes the grades, `score` sums them.
"""

import math
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import Coverage, read_answers
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import expect, find, read_json, write_json
from llava_jax.eval.mmvet_prompt import mmvet_message
from llava_jax.eval.task import DEFAULT, Options, Question, Result, Sample, Task, llava_questions

_FILES = ("mm-vet.json", "*capabilit*.json")


class MMVet(Task):
    name = "mmvet"
    title = "MM-Vet"
    max_new_tokens = 1024
    judge = True
    data_files = "mm-vet.json (capabilities, answers); llava-mm-vet.jsonl to ask"

    def questions(self, data: Path, options: Options = DEFAULT) -> list[Question]:
        own = llava_questions(data, ("llava-mm-vet*.jsonl", "llava_mm_vet*.jsonl"))
        if own is not None:
            return own
        questions = []
        for key, row in read_json(find(data, ("mm-vet.json",), "question file")).items():
            number = key.removeprefix("v1_")
            record = {"question_id": int(number) if number.isdigit() else key}
            record["prompt"] = row["question"]
            questions.append(Question(key, row["question"], (row["imagename"],), record))
        return questions

    def score(self, answers: Path, data: Path, options: Options = DEFAULT) -> Result:
        """Sums a grade file: {id: {"model": […], "content": […], "score": [a grade per run]}}."""
        capabilities = _capabilities(data)
        grades = _grades(answers)
        unknown = [i for i in grades if i not in capabilities]
        missing = [i for i in capabilities if i not in grades]
        runs = min(len(g["score"]) for g in grades.values())
        samples = {}
        for key, names in capabilities.items():
            grade = grades.get(key, {"score": [0.0] * runs})
            scores = [float(x) for x in grade["score"][:runs]]
            samples[key] = Sample(
                sum(scores) / runs,
                str(grade["content"][0]) if isinstance(grade.get("content"), list) else "",
                1.0,
                groups={"integration": "_".join(sorted(set(names)))},
                extra={"runs": scores, "capabilities": sorted(set(names))},
            )
        names = sorted({c for s in samples.values() for c in s.extra["capabilities"]})
        per_run = [_mean([s.extra["runs"][r] for s in samples.values()]) for r in range(runs)]
        centre = sum(per_run) / runs
        totals: dict[str, Any] = {
            "total": _round(centre),
            "std": _round(math.sqrt(sum((x - centre) ** 2 for x in per_run) / runs)),
            "runs": [_round(x) for x in per_run],
            "n": len(samples),
            "judge": ", ".join(
                sorted({str(m) for g in grades.values() for m in g.get("model", ())})
            ),
        }
        tables = {
            "per capability": {
                c: _row([s for s in samples.values() if c in s.extra["capabilities"]])
                for c in names
            },
            "per integration": {
                g: _row([s for s in samples.values() if s.groups["integration"] == g])
                for g in dict.fromkeys(s.groups["integration"] for s in samples.values())
            },
        }
        coverage = Coverage(
            expected=len(capabilities),
            answered=len(capabilities) - len(missing),
            missing=missing,
            unknown={i: n for n, i in enumerate(unknown, 1)},
        )
        return Result(self.name, "total", totals, samples, coverage, tables)

    def submission(self, answers: Path, data: Path, out: Path, options: Options = DEFAULT) -> Path:
        """The file of mm-vet_evaluator.py and of its online judge: {"v1_<id>": answer}."""
        write_json(out, mmvet_answers(answers))
        return out

    def requests(self, answers: Path, data: Path) -> list[tuple[str, str]]:
        """(id, judge's message) of every question; all must be answered."""
        path = find(data, ("mm-vet.json",), "question file")
        truth = expect(read_json(path), str(path), {})
        for key, row in truth.items():
            expect(row, f"{path}: {key}", {"question": str, "answer": str})
        given = mmvet_answers(answers)
        absent = [i for i in truth if i not in given]
        if absent:
            raise AnswerError(
                f"{answers}: no answer to {', '.join(absent[:5])} ({len(absent)} in all)"
            )
        return [(i, mmvet_message(r["question"], r["answer"], given[i])) for i, r in truth.items()]


def mmvet_answers(path: Path) -> dict[str, str]:
    """Answers by MM-Vet's ids ("v1_0"), of LLaVA's jsonl or of the file made from it."""
    rows = read_answers(path, id_keys=("question_id", "id"), text_keys=("text", "answer")).rows
    return {a.id if a.id.startswith("v1_") else f"v1_{a.id}": a.text for a in rows}


def read_grade(reply: str) -> float | None:
    """The judge's grade, if its first word is a number from 0 to 1."""
    try:
        grade = float(reply.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0.0 <= grade <= 1.0 else None


def _capabilities(data: Path) -> dict[str, list[str]]:
    path = find(data, _FILES, "question file")
    found = {}
    for key, row in expect(read_json(path), str(path), {}).items():
        names = row.get("capability") if isinstance(row, dict) else row
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(f"{path}: {key}: no list of capabilities")
        found[key] = names
    return found


def _grades(path: Path) -> dict[str, dict[str, Any]]:
    grades = read_json(path, AnswerError) if path.suffix == ".json" else None
    if not isinstance(grades, dict) or not grades:
        raise AnswerError(
            f"{path}: not a grade file (id -> model, content, score)",
            fix="let a judge grade the answers: llava-jax eval judge mmvet",
        )
    for key, grade in grades.items():
        scores = grade.get("score") if isinstance(grade, dict) else None
        if (
            not isinstance(scores, list)
            or not scores
            or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in scores)
            or not isinstance(grade.get("model", []), list)
        ):
            raise AnswerError(
                f'{path}: {key}: no list of grades from 0 to 1 under "score"',
                fix="answers go through a judge first: llava-jax eval judge mmvet",
            )
    return grades


def _mean(grades: list[float]) -> float:
    return 100.0 * sum(grades) / len(grades)


def _row(samples: list[Sample]) -> dict[str, float]:
    return {"score": _round(_mean([s.score for s in samples])), "n": len(samples)}


def _round(x: float) -> float:
    # numpy's rounding, which the evaluator uses: 31.15 becomes 31.2, Python's round says 31.1.
    return round(x * 10) / 10


TASK = MMVet()
