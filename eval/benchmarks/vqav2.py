"""VQAv2. Truth of val is local; test-dev and test are scored by the server (EvalAI 830).

Owner's scorer: GT-Vision-Lab/VQA `vqaEvaluation/vqaEval.py`. LLaVA: scripts/convert_vqav2_for_submission.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, by_id, expect, find, find_optional, read_list
from llava_jax.eval.normalize import leave_one_out, m4c_normalize, one_line, vqa_normalize
from llava_jax.eval.questions import SHORT, Question, llava_questions, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent

QUESTIONS = ("*uestions*.json",)
FIELDS = {"question_id": ID, "question": str}


class VQAv2(Task):
    name = "vqav2"
    headline = "overall"
    data_files = "v2_*_annotations.json, v2_OpenEnded_*_questions.json; or llava_vqav2_*.jsonl"
    llava_files = ("llava_vqav2_*.jsonl",)
    has_splits = True
    text_keys = ("answer", "text")

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        path = find(data, QUESTIONS, "questions file", settings.split)
        meta, rows = read_list(path, "questions", FIELDS)
        return [question(q["question_id"], q["question"] + SHORT, _image(meta, q)) for q in rows]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        path = find(data, ("*annotations*.json",), "annotations file", settings.split)
        meta, rows = read_list(path, "annotations", {"question_id": ID, "answers": list})
        truth = by_id(rows, "question_id", path)
        asked = find_optional(data, QUESTIONS, "questions file", settings.split)
        asked_rows = read_list(asked, "questions", FIELDS)[1] if asked else []
        prompts = {str(q["question_id"]): q["question"] for q in asked_rows}
        joined, coverage = self.join(truth, answers, settings, asked=prompts)
        samples = {}
        for key, row in truth.items():
            text = joined.text(key)
            exact, normal, upload = _accuracies(text, row, f"{path}: question {key}: answers")
            if key not in joined:  # "" could equal an annotator's "the", once normalised
                exact = normal = upload = 0.0
            said, asked = row.get("multiple_choice_answer", ""), prompts.get(key, "")
            groups = {k: str(row[k]) for k in ("answer_type", "question_type") if k in row}
            details = {"always_normalised": normal, "after_submission": upload}
            image = _image(meta, row)
            samples[key] = Sample(exact, text, said, None, asked, image, groups, details)
        scores = samples.values()
        totals = {
            "overall": percent((s.score for s in scores), 2),
            # lmms-eval, VLMEvalKit and m4c normalise even where all ten annotators agree.
            "always_normalised": percent(s.details["always_normalised"] for s in scores),
            # What the server computes from the file LLaVA uploads.
            "after_llava_submission": percent((s.details["after_submission"] for s in scores), 2),
        }
        tables = {f"per {t} type": by_group(scores, f"{t}_type", 2) for t in ("answer", "question")}
        return Result(self, totals, samples, coverage, tables)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> list[dict[str, Any]]:
        """The EvalAI file: every id of test2015, in the question file's order, "" where a model
        was not asked (test-dev), answers passed through the m4c processor as LLaVA does."""
        patterns = ("llava_vqav2_mscoco_test2015.jsonl", *self.llava_files)
        if (llavas := llava_questions(data, patterns, settings.split)) is not None:
            ids = [q.record["question_id"] for q in llavas]
        else:
            patterns = ("*test2015_questions.json", *QUESTIONS)
            path = find(data, patterns, "questions file", settings.split)
            ids = [row["question_id"] for row in read_list(path, "questions", FIELDS)[1]]
        joined, coverage = self.join(map(str, ids), answers, settings)
        self.warn_of(coverage)
        return [{"question_id": i, "answer": m4c_normalize(joined.text(str(i)))} for i in ids]


def _image(meta: dict[str, Any], row: dict[str, Any]) -> str:
    """File name of a row's image, "" if it names none; test-dev is a part of test2015."""
    subtype, number = str(meta.get("data_subtype", "val2014")), row.get("image_id")
    if not isinstance(number, int):
        return ""
    return f"COCO_{subtype.replace('-dev', '')}_{number:012d}.jpg"


def _accuracies(text: str, row: dict[str, Any], where: str) -> Iterator[float]:
    """The official, the always normalised, and the uploaded answer's accuracy, each 0..1."""
    raw = [one_line(expect(a, where, {"answer": str})["answer"]) for a in row["answers"]]
    if not raw:
        raise DataError(f"{where}: none")
    normal = [vqa_normalize(a) for a in raw]
    agree = len(set(raw)) == 1
    apart = len({str(a.get("answer_id")) for a in row["answers"]}) == len(raw)
    for predicted, always in ((text, False), (text, True), (m4c_normalize(text), False)):
        predicted = one_line(predicted)
        as_is = agree and not always
        said, answers = (predicted, raw) if as_is else (vqa_normalize(predicted), normal)
        if apart:
            yield leave_one_out(said, answers)
        else:
            yield _left_out_together(said, answers, row["answers"])


def _left_out_together(predicted: str, answers: list[str], rows: list[dict[str, Any]]) -> float:
    """vqaEval leaves out every answer *equal* to the annotator's, so rows that no answer_id tells
    apart leave together."""
    full = [(a, {**r, "answer": a}) for a, r in zip(answers, rows)]
    total = 0.0
    for _, one in full:
        matches = sum(a == predicted and r != one for a, r in full)
        total += min(1, float(matches) / 3)
    return total / len(full)
