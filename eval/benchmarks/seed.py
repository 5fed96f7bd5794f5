"""SEED-Bench 1: 14,233 image and 5,009 video questions (the video's middle frame).

Scorer: LLaVA scripts/convert_seed_for_submission.py: the answer is exactly the letter. lmms-eval
takes the first character whatever the case ("B." is right there), so both numbers are given.
"""

from pathlib import Path
from typing import Any

from llava_jax.eval.answers import join
from llava_jax.eval.files import ID, expect, find, read_list
from llava_jax.eval.questions import Question, question
from llava_jax.eval.simple import Item, choices
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent

FILES = ("SEED-Bench*.json", "SEED_Bench*.json", "annotations.json")
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class Seed(Task):
    name = "seed"
    headline = "all"
    data_files = "SEED-Bench.json; or llava-seed-bench.jsonl to ask"
    llava_files = ("llava-seed*.jsonl", "llava_seed*.jsonl")
    text_keys = ("text", "prediction", "answer")
    upload_lines = True

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        fields = {"question": str, **dict.fromkeys(_CHOICES, str)}
        for q in _read_truth(data)["questions"]:
            expect(q, f"SEED-Bench question {q['question_id']}", fields)
            prompt = choices(q["question"], [q[c] for c in _CHOICES])
            questions.append(question(q["question_id"], prompt, _image(q)))
        return questions

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Item]:
        questions = _read_truth(data)["questions"]
        return [
            Item(str(q["question_id"]), choices(q["question"], texts, ""), "", (), texts)
            for q in questions
            if (texts := tuple(str(q[c]) for c in _CHOICES))
        ]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        meta = _read_truth(data)
        types = {number: name for name, number in meta["question_type"].items()}
        truth = {str(q["question_id"]): q for q in meta["questions"]}
        joined, coverage = join(truth, self.read(answers, settings), strict=settings.strict)
        samples = {}
        for key, q in truth.items():
            text = joined.text(key)
            first, number = text.strip()[:1], q["question_type_id"]
            kind = types.get(number, str(number))
            samples[key] = Sample(
                float(key in joined and text == q["answer"]),
                text,
                q["answer"],
                parsed=first.upper(),
                prompt=str(q.get("question", "")),
                image=_image(q),
                groups={"question_type": kind, "data_type": q["data_type"]},
                details={"lmms_eval": float(first.lower() == q["answer"].lower())},
            )
        scores = samples.values()
        per_type = by_group(scores, "question_type", digits=2)
        totals = {"all": percent((s.score for s in scores), 2)}
        totals |= {k: row["score"] for k, row in by_group(scores, "data_type", digits=2).items()}
        totals["lmms_eval_first_char_all"] = percent(s.details["lmms_eval"] for s in scores)
        tables = {"per question type": {n: per_type[n] for n in types.values() if n in per_type}}
        return Result(self, totals, samples, coverage, tables)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> list[dict[str, Any]]:
        """The leaderboard's jsonl: question_id and prediction of every question."""
        ids = [q["question_id"] for q in _read_truth(data)["questions"]]
        joined, _ = join(map(str, ids), self.read(answers, settings), strict=True)
        return [{"question_id": i, "prediction": joined[str(i)].text} for i in ids]


def _read_truth(data: Path) -> dict[str, Any]:
    path = find(data, FILES, "annotation file")
    fields = {"question_id": ID, "answer": str, "data_type": str, "question_type_id": int}
    meta, _ = read_list(path, "questions", fields)
    expect(meta, str(path), {"question_type": dict})
    types = meta["question_type"]
    expect(types, f"{path}: question_type", dict.fromkeys(types, int))
    return meta


def _image(q: dict[str, Any]) -> str:
    if q["data_type"] == "video":
        # Where LLaVA's extract_video_frames.py puts the middle frame.
        return f"SEED-Bench-video-image/{q['question_type_id']}_{q['question_id']}.png"
    return f"SEED-Bench-image/{q.get('data_id', '')}"


TASK = Seed()
