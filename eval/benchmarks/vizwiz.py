"""VizWiz. Truth of train and val is local; test is scored by the server (EvalAI 2185).

Owner's scorer: the VizWiz VQA API: only the prediction is normalised (vqaEval's rules), the
annotators' answers stay raw, and an annotator is left out by position. Second task: which
questions cannot be answered (average precision and F1). LLaVA: scripts/convert_vizwiz_for_submission.py.
"""

from pathlib import Path
from typing import Any

from llava_jax.eval.answers import Answer, AnswerFile, join
from llava_jax.eval.errors import DataError, NoTruthError
from llava_jax.eval.files import by_id, expect, find, read_checked
from llava_jax.eval.normalize import leave_one_out, m4c_normalize, one_line, vqa_normalize
from llava_jax.eval.questions import SHORT, Question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
FIELDS = {"image": str, "question": str}
FILES = ("val.json", "*val*.json", "*test*.json")


class VizWiz(Task):
    name = "vizwiz"
    headline = "overall"
    data_files = "val.json (truth), test.json; or llava_test.jsonl to ask and submit"
    llava_files = ("llava_*.jsonl",)
    has_splits = True
    id_keys = ("image", "question_id")
    text_keys = ("answer", "text")

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        path = find(data, FILES, "annotation file", settings.split)
        questions = []
        for n, row in enumerate(read_checked(path, FIELDS)):
            # LLaVA's file has every question through str.capitalize (all 8,000 measured).
            prompt = row["question"].capitalize() + UNANSWERABLE + SHORT
            record = {"question_id": n, "image": row["image"], "prompt": prompt}
            questions.append(Question(row["image"], prompt, (row["image"],), record))
        return questions

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        path = find(data, FILES, "annotation file", settings.split)
        truth = by_id(read_checked(path, FIELDS), "image", path)
        if not all(isinstance(row.get("answers"), list) for row in truth.values()):
            what = f"{path}: has no answers (the test split is scored by the server)"
            raise NoTruthError(what, fix="write the upload with llava-jax eval submit")
        given = self._by_image(answers, data, settings)
        share = ("unanswerable_share",)
        asked = {image: row["question"] for image, row in truth.items()}
        how: dict[str, Any] = {"left_out_of": share, "asked": asked, "strict": settings.strict}
        joined, coverage = join(truth, given, **how)
        samples = {image: _sample(joined.get(image), row) for image, row in truth.items()}
        scores = list(samples.values())
        said = [samples[image].details["says_unanswerable"] for image in truth if image in joined]
        totals: dict[str, float] = {"overall": percent((s.score for s in scores), 2)}
        # lmms-eval normalises the annotators' answers as well.
        totals["lmms_eval_normalised_gt"] = percent(s.details["normalised_gt"] for s in scores)
        totals["unanswerable_share"] = percent(said)
        if all("answerable" in row for row in truth.values()):
            labels = {image: row["answerable"] == 0 for image, row in truth.items()}
            # A missing answer is wrong here too: the opposite of the label.
            says = {i: not label for i, label in labels.items()}
            says |= {i: samples[i].details["says_unanswerable"] for i in labels if i in joined}
            totals |= unanswerability(list(labels.values()), list(says.values()))
        tables = {"per answer type": by_group(scores, "answer_type")}
        return Result(self, totals, samples, coverage, tables)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> list[dict[str, str]]:
        """The upload of LLaVA's script: [{image, answer}] through the m4c processor, every image."""
        given = self._by_image(answers, data, settings)
        images = [str(q.images[0]) for q in self.questions(data, settings)]
        # The server refuses a file that lacks an image.
        joined, _ = join(images, given, strict=True)
        return [{"image": i, "answer": m4c_normalize(joined[i].text)} for i in images]

    def _by_image(self, path: Path, data: Path, settings: TaskSettings) -> AnswerFile:
        """Answer rows by image; LLaVA's carry only question_id, the place in its question file."""
        given = self.read(path, settings)
        if all("image" in a.row for a in given.rows):
            return given
        questions = self.questions(data, settings)
        own = {str(q.record["question_id"]): str(q.images[0]) for q in questions}
        return given.with_ids(
            lambda a: a.id if "image" in a.row else own.get(a.id, f"question {a.id}")
        )


def _sample(answer: Answer | None, row: dict[str, Any]) -> Sample:
    text = answer.text if answer else ""
    where = f"VizWiz {row['image']}: answers"
    rows = [a if isinstance(a, dict) else {"answer": a} for a in row["answers"]]
    raw = [expect(a, where, {"answer": str})["answer"] for a in rows]
    if not raw:
        raise DataError(f"{where}: none")
    predicted, upload = vqa_normalize(one_line(text)), m4c_normalize(text)
    normalised_gt = leave_one_out(upload, [m4c_normalize(a) for a in raw]) if answer else 0.0
    details = {"normalised_gt": normalised_gt, "says_unanswerable": upload == "unanswerable"}
    groups = {"answer_type": str(row["answer_type"])} if row.get("answer_type") else {}
    score, truth = leave_one_out(predicted, raw) if answer else 0.0, max(raw, key=raw.count)
    return Sample(score, text, truth, predicted, row["question"], row["image"], groups, details)


def unanswerability(labels: list[bool], said: list[bool]) -> dict[str, float]:
    """Average precision, F1 and recall of saying "unanswerable", in percent.

    With an answer for a score there are two thresholds, so the average precision is
    precision * recall of those who said so, plus the base rate for the rest of the recall.
    """
    positives, predicted = sum(labels), sum(said)
    hits = sum(a and b for a, b in zip(labels, said))
    precision = hits / predicted if predicted else 0.0
    recall = hits / positives if positives else 0.0
    f1 = 2 * hits / (positives + predicted) if positives + predicted else 0.0
    base = positives / len(labels) if labels else 0.0
    average = precision * recall + base * (1 - recall) if positives else 0.0
    found = {"ap": average, "f1": f1, "recall": recall}
    return {f"unanswerable_{name}": round(100 * value, 2) for name, value in found.items()}
