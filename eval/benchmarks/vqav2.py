"""VQAv2. Truth of val is local; test-dev and test are scored by the server (EvalAI 830).

Owner's scorer: GT-Vision-Lab/VQA `vqaEvaluation/vqaEval.py`. LLaVA: scripts/convert_vqav2_for_submission.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import AnswerFile, join, read_answers
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, expect, find, find_optional, write_json
from llava_jax.eval.normalize import leave_one_out, m4c_normalize, one_line, vqa_normalize
from llava_jax.eval.task import (
    DEFAULT,
    SHORT,
    Options,
    Question,
    Result,
    Sample,
    Task,
    answer_text,
    by_group,
    listed,
    llava_questions,
    percent,
)

QUESTIONS = ("*uestions*.json",)
ASKED = {"question_id": ID, "question": str}


class VQAv2(Task):
    name = "vqav2"
    title = "VQAv2"
    data_files = (
        "v2_mscoco_*_annotations.json, v2_OpenEnded_mscoco_*_questions.json; "
        "or llava_vqav2_mscoco_*.jsonl"
    )

    def questions(self, data: Path, options: Options = DEFAULT) -> list[Question]:
        own = llava_questions(data, ("llava_vqav2_*.jsonl",), options.split)
        if own is not None:
            return own
        path = find(data, QUESTIONS, "questions file", options.split)
        meta, rows = listed(path, "questions", ASKED)
        subtype = str(meta.get("data_subtype", "val2014"))
        return [
            Question(
                str(q["question_id"]),
                q["question"] + SHORT,
                (_image(subtype, q),),
                {"question_id": q["question_id"], "prompt": q["question"] + SHORT},
            )
            for q in rows
        ]

    def score(self, answers: Path, data: Path, options: Options = DEFAULT) -> Result:
        path = find(data, ("*annotations*.json",), "annotations file", options.split)
        meta, rows = listed(path, "annotations", {"question_id": ID, "answers": list})
        truth = {str(a["question_id"]): a for a in rows}
        images = str(meta.get("data_subtype", "val2014"))
        texts = self._question_texts(data, options)
        joined, coverage = join(truth, self._answers(answers, options), strict=options.strict)
        samples, always, uploaded = {}, [], []
        for key, row in truth.items():
            text = answer_text(joined, key)
            exact, normal, upload = _accuracies(text, row, key, path)
            if key not in joined:  # "" could equal an annotator's "the", once normalised
                exact = normal = upload = 0.0
            always.append(normal)
            uploaded.append(upload)
            samples[key] = Sample(
                exact,
                text,
                row.get("multiple_choice_answer", ""),
                prompt=texts.get(key, ""),
                image=_image(images, row),
                groups={k: str(row[k]) for k in ("answer_type", "question_type") if k in row},
                extra={"always_normalised": normal, "after_submission": upload},
            )
        overall = round(percent(s.score for s in samples.values()), 2)
        totals = {
            "overall": overall,
            # lmms-eval, VLMEvalKit and m4c normalise even where all ten annotators agree.
            "always_normalised": percent(always),
            # What the server computes from the file LLaVA uploads.
            "after_llava_submission": round(percent(uploaded), 2),
        }
        tables = {
            title: {
                k: {"score": round(v["score"], 2), "n": v["n"]}
                for k, v in by_group(samples.values(), group).items()
            }
            for title, group in (
                ("per answer type", "answer_type"),
                ("per question type", "question_type"),
            )
        }
        return Result(self.name, "overall", totals, samples, coverage, tables)

    def submission(self, answers: Path, data: Path, out: Path, options: Options = DEFAULT) -> Path:
        """The EvalAI file: every id of test2015, in the question file's order, "" where a model
        was not asked (test-dev), answers passed through the m4c processor as LLaVA does."""
        ids = self._upload_ids(data, options)
        joined, _ = join(map(str, ids), self._answers(answers, options))
        rows = [
            {"question_id": i, "answer": m4c_normalize(answer_text(joined, str(i)))} for i in ids
        ]
        write_json(out, rows)
        return out

    def _answers(self, path: Path, options: Options) -> AnswerFile:
        return read_answers(
            path,
            id_keys=("question_id",),
            text_keys=("answer", "text", "prediction"),
            skip_bad_lines=options.skip_bad_lines,
        )

    def _upload_ids(self, data: Path, options: Options) -> list[Any]:
        patterns = ("llava_vqav2_mscoco_test2015.jsonl", "llava_vqav2_*.jsonl")
        own = llava_questions(data, patterns, options.split)
        if own is not None:
            return [q.record["question_id"] for q in own]
        path = find(data, ("*test2015_questions.json", *QUESTIONS), "questions file", options.split)
        return [q["question_id"] for q in listed(path, "questions", ASKED)[1]]

    def _question_texts(self, data: Path, options: Options) -> dict[str, str]:
        path = find_optional(data, QUESTIONS, "questions file", options.split)
        return (
            {str(q["question_id"]): q["question"] for q in listed(path, "questions", ASKED)[1]}
            if path
            else {}
        )


def _image(subtype: str, row: dict[str, Any]) -> str:
    """File name of an image; test-dev is a part of test2015."""
    number = row.get("image_id")
    return (
        f"COCO_{subtype.replace('-dev', '')}_{number:012d}.jpg" if isinstance(number, int) else ""
    )


def _accuracies(text: str, row: dict[str, Any], key: str, path: Path) -> Iterator[float]:
    """The official, the always normalised, and the uploaded answer's accuracy, each 0..1."""
    where = f"{path}: question {key}: answers"
    raw = [one_line(expect(a, where, {"answer": str})["answer"]) for a in row["answers"]]
    if not raw:
        raise DataError(f"{where}: none")
    normal = [vqa_normalize(a) for a in raw]
    agree = len(set(raw)) == 1
    uploaded = m4c_normalize(text)
    for predicted, always in ((text, False), (text, True), (uploaded, False)):
        predicted = one_line(predicted)
        if agree and not always:
            yield _soft(predicted, raw, row["answers"])
        else:
            yield _soft(vqa_normalize(predicted), normal, row["answers"])


def _soft(predicted: str, answers: list[str], rows: list[dict[str, Any]]) -> float:
    if len({str(r.get("answer_id")) for r in rows}) == len(rows):
        return leave_one_out(predicted, answers)
    # vqaEval leaves out every answer *equal* to the annotator's, so rows that no answer_id tells
    # apart leave together.
    full = [(a, {**r, "answer": a}) for a, r in zip(answers, rows)]
    total = 0.0
    for _, one in full:
        matches = sum(a == predicted and r != one for a, r in full)
        total += min(1, float(matches) / 3)
    return total / len(full)


TASK = VQAv2()
