"""TextVQA (val 0.5.1), with the OCR tokens in the prompt as in the paper, or without (--set ocr=no).

Scorer: LLaVA eval_textvqa.py over m4c_evaluator.py (identical to mmf's): both sides normalised.
question_id is the *image* id and repeats, so answers are joined by (image id, question).
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import Answer, AnswerFile, join
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import ID, find, find_optional, read_list
from llava_jax.eval.normalize import leave_one_out, m4c_normalize
from llava_jax.eval.questions import SHORT, Question, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, percent

FILES = ("TextVQA_[0-9]*val*.json", "TextVQA_val*.json", "*TextVQA*.json")
_OCR = "Reference OCR token:"
_OCR_FIRST = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


class TextVQA(Task):
    name = "textvqa"
    headline = "accuracy"
    data_files = "TextVQA_0.5.1_val.json (+ TextVQA_Rosetta_OCR_v0.2_val.json); or llava_textvqa_*.jsonl to ask"
    llava_files = ("llava_textvqa_*.jsonl",)
    has_splits = True
    options = ("ocr",)
    id_keys = ("question_id", "image_id")

    def questions(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Question]:
        questions = super().questions(data, settings)
        if _with_ocr(settings):
            return questions
        lines = [[x for x in q.prompt.split("\n") if not x.startswith(_OCR)] for q in questions]
        both = zip(questions, map("\n".join, lines))
        return [replace(q, prompt=text, record=q.record | {"prompt": text}) for q, text in both]

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        rows = _read_truth(data)
        tokens = _ocr_tokens(data) if _with_ocr(settings) else {}
        questions = []
        for row in rows:
            # LLaVA's file has every question through str.capitalize (all 5,000 measured).
            prompt = row["question"].capitalize()
            if _with_ocr(settings):
                prompt += f"\n{_OCR} {', '.join(tokens.get(row['image_id'], ()))}"
            image, key = row["image_id"], str(row["question_id"])
            questions.append(question(image, prompt + SHORT, f"{image}.jpg", key=key))
        return questions

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        rows = _read_truth(data)
        keys = {(r["image_id"], r["question"].lower()): str(r["question_id"]) for r in rows}
        truth = {keys[r["image_id"], r["question"].lower()]: r for r in rows}
        given = _by_question(self.read(answers, settings), keys)
        script = ("llava_script_over_given_answers",)
        joined, coverage = join(truth, given, left_out_of=script, strict=settings.strict)
        # The script's denominator is the answer file; ours is the questions. Equal when complete.
        order = {a.id: None for a in given.rows if a.id in truth} | dict.fromkeys(truth)
        samples = {i: _sample(joined.get(i), truth[i]) for i in order}
        over_given = [_sample(a, truth[a.id]).score for a in given.rows if a.id in truth]
        totals = {"accuracy": percent(s.score for s in samples.values())}
        totals["llava_script_over_given_answers"] = percent(over_given)
        return Result(self, totals, samples, coverage)


def _with_ocr(settings: TaskSettings) -> bool:
    return settings.options.get("ocr") != "no"


def _read_truth(data: Path) -> list[dict[str, Any]]:
    path = find(data, FILES, "annotation file")
    fields = {"question_id": ID, "image_id": str, "question": str, "answers": list}
    _, rows = read_list(path, "data", fields)
    for row in rows:
        if not row["answers"] or not all(isinstance(a, str) for a in row["answers"]):
            where = f"{path}: question {row['question_id']}"
            raise DataError(f"{where}: answers are not a list of texts")
    return rows


def _by_question(given: AnswerFile, keys: dict[tuple[str, str], str]) -> AnswerFile:
    """The answers under the ids of their questions. keys: (image id, question) -> question id."""

    def id_of(a: Answer) -> str:
        prompt = a.row.get("prompt")
        if not isinstance(prompt, str):  # mmf's own prediction files: question_id is the question's
            return a.id
        if (asked := question_of(prompt)) is None:
            where = f"{given.path} line {a.line}, question_id {a.id}"
            raise AnswerError(f"{where}: no question found in the prompt {prompt[:60]!r}")
        return keys.get((a.id, asked), f"{a.id}/{asked}")

    return given.with_ids(id_of)


def question_of(prompt: str) -> str | None:
    """The question inside a prompt of any of LLaVA's three layouts, lower-cased, or None."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        if match := _OCR_FIRST.search(prompt):
            return match[1].lower()
    elif f"{_OCR} " in prompt and len(lines) == 3:
        return lines[prompt.startswith(_OCR)].lower()
    elif len(lines) == 2:
        return lines[0].lower()
    return None


def _sample(answer: Answer | None, row: dict[str, Any]) -> Sample:
    text = answer.text if answer else ""
    predicted, truth = m4c_normalize(text), max(row["answers"], key=row["answers"].count)
    score = leave_one_out(predicted, [m4c_normalize(a) for a in row["answers"]]) if answer else 0.0
    image, groups = f"{row['image_id']}.jpg", {k: row[k] for k in ("set_name",) if k in row}
    return Sample(score, text, truth, predicted, row["question"], image, groups)


def _ocr_tokens(data: Path) -> dict[str, list[str]]:
    path = find_optional(data, ("TextVQA_Rosetta_OCR*val*.json", "*OCR*.json"), "OCR file")
    if path is None:
        what = f"{data}: no Rosetta OCR file, and the paper's prompt holds its tokens"
        fix = "add TextVQA_Rosetta_OCR_v0.2_val.json, or leave the tokens out with --set ocr=no"
        raise DataError(what, fix=fix)
    _, rows = read_list(path, "data", {"image_id": str, "ocr_tokens": list})
    return {r["image_id"]: r["ocr_tokens"] for r in rows}
