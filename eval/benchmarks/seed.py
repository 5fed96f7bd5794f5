"""SEED-Bench 1: 14,233 image and 5,009 video questions (the video's middle frame).

Scorer: LLaVA scripts/convert_seed_for_submission.py: the answer is exactly the letter. lmms-eval
takes the first character whatever the case ("B." is right there), so both numbers are given. --set
videos=no leaves the video questions out, and the headline is then `image`. Frames that are not there are
taken from the videos in `videos/`, in folders of the names that the owner's code gives them.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, by_id, expect, find, read_list
from llava_jax.eval.questions import Question, question
from llava_jax.eval.simple import Item, choices
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent
from llava_jax.eval.video import save_middle_frame
from llava_jax.progress import progress
from llava_jax.reader import is_number

FRAMES = "SEED-Bench-video-image"
FILES = ("SEED-Bench*.json", "SEED_Bench*.json", "annotations.json")
# Question type -> folder of its videos.
VIDEOS = {10: "20bn-something-something-v2", 11: "EPIC-KITCHENS", 12: "BreakfastII_15fps_qvga_sync"}
_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


class Seed(Task):
    name = "seed"
    headline = "all"
    data_files = "SEED-Bench.json (or llava-seed-bench.jsonl to ask), SEED-Bench-image/, videos/"
    options = ("videos",)
    llava_files = ("llava-seed*.jsonl", "llava_seed*.jsonl")
    upload_lines = True

    def questions(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Question]:
        """The questions; takes the frames that they need and that are not there from the videos."""
        questions = super().questions(data, settings)
        if settings.options.get("videos") == "no":
            return [q for q in questions if not str(q.images[:1]).startswith(f"('{FRAMES}")]
        if (data / "videos").is_dir():
            _take_frames(data)
        return questions

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        fields = {"question": str, **dict.fromkeys(_CHOICES, str)}
        for q in _read_truth(data)["questions"]:
            expect(q, f"SEED-Bench question {q['question_id']}", fields)
            prompt = choices(q["question"], [q[c] for c in _CHOICES])
            questions.append(question(q["question_id"], prompt, _image(q)))
        return questions

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Item]:
        return [
            Item(str(q["question_id"]), choices(q["question"], texts, ""), "", (), texts)
            for q in _read_truth(data)["questions"]
            if (texts := tuple(str(q[c]) for c in _CHOICES)) and not _left_out(q, settings)
        ]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        meta, only = _read_truth(data), settings.options.get("videos") == "no"
        types = {number: name for name, number in meta["question_type"].items()}
        truth = {str(q["question_id"]): q for q in meta["questions"]}
        kept = {k: q for k, q in truth.items() if not _left_out(q, settings)}
        asked = {key: str(q.get("question", "")) for key, q in truth.items()}
        joined, coverage = self.join(truth, answers, settings, scored=kept, asked=asked)
        samples = {}
        for key, q in kept.items():
            text = joined.text(key)
            first, number = text.strip()[:1], q["question_type_id"]
            right = float(key in joined and text == q["answer"])
            image = _image(q) if "data_id" in q or q["data_type"] == "video" else ""
            groups = {"question_type": types.get(number, str(number)), "data_type": q["data_type"]}
            details = {"lmms_eval": float(first.lower() == q["answer"].lower())}
            how = (first.upper(), asked[key], image, groups, details)
            samples[key] = Sample(right, text, q["answer"], *how)
        scores = samples.values()
        per_type = by_group(scores, "question_type", digits=2)
        headline = "image" if only else "all"
        totals = {headline: percent((s.score for s in scores), 2)}
        totals |= {k: row["score"] for k, row in by_group(scores, "data_type", digits=2).items()}
        totals[f"lmms_eval_first_char_{headline}"] = percent(s.details["lmms_eval"] for s in scores)
        tables = {"per question type": {n: per_type[n] for n in types.values() if n in per_type}}
        notes = ["pictures only: the video questions were left out"] if only else []
        return Result(self, totals, samples, coverage, tables, notes, headline)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> list[dict[str, Any]]:
        """The leaderboard's jsonl: question_id and prediction of every question."""
        ids = [q["question_id"] for q in _read_truth(data)["questions"]]
        joined, _ = self.join(map(str, ids), answers, replace(settings, strict=True))
        return [{"question_id": i, "prediction": joined[str(i)].text} for i in ids]


def _read_truth(data: Path) -> dict[str, Any]:
    path = find(data, FILES, "annotation file")
    fields = {"question_id": ID, "answer": str, "data_type": str, "question_type_id": int}
    meta, rows = read_list(path, "questions", fields)
    by_id(rows, "question_id", path)
    expect(meta, str(path), {"question_type": dict})
    types = meta["question_type"]
    expect(types, f"{path}: question_type", dict.fromkeys(types, int))
    return meta


def _left_out(q: dict[str, Any], settings: TaskSettings) -> bool:
    return settings.options.get("videos") == "no" and q["data_type"] == "video"


def _take_frames(data: Path) -> None:
    wanted = [q for q in _read_truth(data)["questions"] if q["data_type"] == "video"]
    todo = [q for q in wanted if not (data / _image(q)).exists()]
    with progress(len(wanted), "frames", "video", initial=len(wanted) - len(todo)) as bar:
        for q in todo:
            where = f"SEED-Bench question {q['question_id']}"
            kind, name = q["question_type_id"], str(q.get("data_id"))
            segment = None
            if kind in (11, 12):
                expect(q, where, {"segment": list})
                if len(q["segment"]) != 2 or not all(map(is_number, q["segment"])):
                    raise DataError(f"{where}: the segment {q['segment']!r} is not two numbers")
                segment = tuple(q["segment"])
            places = [data / "videos" / f / name for f in (VIDEOS.get(kind, ""), "")]
            video = next((p for p in places if p.is_file()), None)
            if video is None:
                fix = "--set videos=no asks about pictures only"
                raise DataError(f"{where}: no video {places[0]}", fix=fix)
            save_middle_frame(video, data / _image(q), segment, seconds=kind == 11)
            bar.update()


def _image(q: dict[str, Any]) -> str:
    if q["data_type"] == "video":
        # Where LLaVA's extract_video_frames.py puts the middle frame.
        return f"{FRAMES}/{q['question_type_id']}_{q['question_id']}.png"
    return f"SEED-Bench-image/{q.get('data_id', '')}"
