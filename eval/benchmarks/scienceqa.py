"""ScienceQA test (4,241 questions, 2,017 with an image).

Scorers: LLaVA eval_science_qa.py (letter, "X. …", or one "The answer is X."; IMG = the prompt has
an image), the owner's tools/evaluate_acc.py for the eight categories, and LLaVA's GPT-4 ensemble
(eval_science_qa_gpt4_requery.py) with --set gpt4=FILE --set requery=FILE.
"""

import re
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import Answer
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import expect, find
from llava_jax.eval.questions import LETTER, Question, question
from llava_jax.eval.simple import Item, choices
from llava_jax.eval.task import DEFAULT, Result, Sample, Table, Task, TaskSettings, percent
from llava_jax.util import read_object

LETTERS = "ABCDE"
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


class ScienceQA(Task):
    name = "scienceqa"
    headline = "img_acc"
    max_new_tokens = 1024
    takes_split = True
    options = ("gpt4", "requery")
    data_files = "problems.json, pid_splits.json; or llava_test_CQM-A.json to ask"
    id_keys = ("question_id", "id")
    answers_in = "outputs"  # id -> text, in the results files of LLaVA's scripts

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        for pid, p in _read_problems(data, settings).items():
            expect(p, f"ScienceQA problem {pid}", {"question": str})
            context = f"Context: {p['hint']}\n" if p.get("hint") else ""
            prompt = choices(context + p["question"], p["choices"], "").strip() + LETTER
            images = (f"{pid}/{p['image']}",) if p.get("image") else ()
            recorded = f"<image>\n{prompt}" if images else prompt
            questions.append(question(pid, prompt, *images, prompt=recorded))
        return questions

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Item]:
        problems = _read_problems(data, settings).items()
        asked = [
            (i, choices(p["question"], p["choices"], ""), tuple(p["choices"])) for i, p in problems
        ]
        return [Item(i, prompt, "", (), of) for i, prompt, of in asked]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        problems = _read_problems(data, settings)
        asked = {pid: str(p.get("question", "")) for pid, p in problems.items()}
        how = {"left_out_of": ("img_acc",), "asked": asked}
        joined, coverage = self.join(problems, answers, settings, **how)
        samples = {pid: _sample(joined.get(pid), pid, p) for pid, p in problems.items()}
        scores = list(samples.values())
        img = [s for i, s in samples.items() if i in joined and s.details["is_multimodal"]]
        with_image = [s for pid, s in samples.items() if problems[pid].get("image")]
        right = [s.score for s in scores]
        totals: dict[str, Any] = {"img_acc": percent(s.score for s in img), "img_count": len(img)}
        totals |= {"acc": percent(right), "correct": int(sum(right)), "count": len(scores)}
        totals["img_acc_missing_wrong"] = percent(s.score for s in with_image)
        totals["unreadable_answers"] = sum(samples[i].parsed == "FAILED" for i in joined)
        table = categories(problems, samples)
        tables = {"official categories": table} if table else {}
        if "gpt4" in settings.options:
            gpt4, again = (self._texts(settings.options.get(n)) for n in ("gpt4", "requery"))
            tables["GPT-4 ensemble"] = _ensemble(problems, joined, gpt4, again)
        # LLaVA's script leaves missing answers out; a headline must not shrink by them.
        headline = "img_acc_missing_wrong" if coverage.missing else ""
        return Result(self, totals, samples, coverage, tables, headline=headline)

    def _texts(self, path: str | None) -> dict[str, str]:
        return {a.id: a.text for a in self.read(Path(path), DEFAULT).rows} if path else {}


def _read_problems(data: Path, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    path = find(data, ("problems.json",), "problems file")
    splits = find(data, ("pid_splits.json",), "split file")
    name = settings.split or "test"
    problems = read_object(path, DataError)
    ids = expect(read_object(splits, DataError), f"{splits}: split", {name: list})[name]
    chosen = {}
    for i in ids:
        where = f"{path}: problem {i}"
        p = expect(problems.get(str(i)), where, {"choices": list, "answer": int})
        if not 0 <= p["answer"] < min(len(p["choices"]), len(LETTERS)):
            raise DataError(f"{where}: answer {p['answer']} is none of its choices")
        chosen[str(i)] = p
    return chosen


def read_choice(text: str) -> str:
    """The letter of an answer by LLaVA's rule, or "FAILED"."""
    if text in tuple(LETTERS):
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    return _stated(text)


def _stated(text: str) -> str:
    found = _ANSWER_IS.findall(text)
    return found[0] if len(found) == 1 else "FAILED"


def _index(letter: str, choices: list[str]) -> int:
    return LETTERS.index(letter) if letter in tuple(LETTERS[: len(choices)]) else -1


def _sample(answer: Answer | None, pid: str, p: dict[str, Any]) -> Sample:
    text = answer.text if answer else ""
    parsed = read_choice(text) if answer else "FAILED"
    prompt = answer.row.get("prompt") if answer else None
    prompt = prompt if isinstance(prompt, str) else ""
    multimodal = "<image>" in prompt if prompt else bool(p.get("image"))
    score, truth = float(_index(parsed, p["choices"]) == p["answer"]), LETTERS[p["answer"]]
    image = f"{pid}/{p['image']}" if p.get("image") else ""
    groups = {k: str(p[k]) for k in ("subject", "grade") if k in p}
    prompt = prompt or str(p.get("question", ""))
    return Sample(score, text, truth, parsed, prompt, image, groups, {"is_multimodal": multimodal})


def categories(problems: dict[str, dict[str, Any]], samples: dict[str, Sample]) -> Table:
    """NAT SOC LAN / TXT IMG NO / G1-6 G7-12 as the owner's evaluate_acc.py cuts them."""
    if not all({"subject", "grade", "hint"} <= p.keys() for p in problems.values()):
        return {}
    low, high = ({f"grade{i}" for i in grades} for grades in (range(1, 7), range(7, 13)))
    cuts = {
        "NAT": lambda p: p["subject"] == "natural science",
        "SOC": lambda p: p["subject"] == "social science",
        "LAN": lambda p: p["subject"] == "language science",
        "TXT": lambda p: bool(p["hint"]),
        "IMG": lambda p: bool(p["image"]),
        "NO": lambda p: not p["hint"] and not p["image"],
        "G1-6": lambda p: p["grade"] in low,
        "G7-12": lambda p: p["grade"] in high,
        "Avg": lambda p: True,
    }
    table = {}
    for name, inside in cuts.items():
        scores = [samples[i].score for i, p in problems.items() if inside(p)]
        if scores:
            table[name] = {"score": percent(scores, 2), "n": len(scores)}
    return table


def _ensemble(
    problems: dict[str, Any], ours: dict[str, Answer], gpt4: dict[str, str], again: dict[str, str]
) -> Table:
    """LLaVA with GPT-4: GPT-4 where it answers, else ours; and GPT-4 asked again with both.

    The script guesses at random where no letter can be read; this is the mean over those guesses,
    so that the number can be had again.
    """
    rows: list[dict[str, float]] = []
    unread = 0
    for pid, p in problems.items():
        if pid not in gpt4 or pid not in ours:
            raise AnswerError(f"question {pid}: the ensemble needs an answer from both models")
        _, own = _chance(ours[pid].text, p)
        b, gpt = _chance(gpt4[pid], p)
        c, new = _chance(again.get(pid, ""), p)
        unread += b == "FAILED"
        row = {"ours": own, "gpt4": gpt, "gpt4, else ours": own if b == "FAILED" else gpt}
        row |= {"requery, else ours": own if c == "FAILED" else new} if again else {}
        rows.append(row | {"upper bound": 1 - (1 - own) * (1 - gpt)})
    n = len(rows)
    table = {k: {"score": percent(row[k] for row in rows), "n": n} for k in rows[0]}
    return table | {"gpt4 gives no answer": {"score": 100 * unread / n, "n": unread}}


def _chance(text: str, p: dict[str, Any]) -> tuple[str, float]:
    letter = _stated(text)
    index = _index(letter, p["choices"])
    return letter, 1 / len(p["choices"]) if index < 0 else float(index == p["answer"])
