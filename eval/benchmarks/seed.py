"""SEED-Bench 1: 14,233 image and 5,009 video questions (the video's middle frame).

Scorer: LLaVA scripts/convert_seed_for_submission.py: the answer is exactly the letter. lmms-eval
takes the first character whatever the case ("B." is right there), so both numbers are given.
"""

from pathlib import Path
from typing import Any

from llava_jax.eval.answers import AnswerFile, join, read_answers
from llava_jax.eval.files import ID, expect, find
from llava_jax.eval.task import (
    DEFAULT,
    LETTER,
    Options,
    Question,
    Result,
    Sample,
    Task,
    by_group,
    listed,
    llava_questions,
    percent,
)

FILES = ("SEED-Bench*.json", "SEED_Bench*.json", "annotations.json")


class Seed(Task):
    name = "seed"
    title = "SEED-Bench"
    data_files = "SEED-Bench.json; or llava-seed-bench.jsonl to ask"

    def questions(self, data: Path, options: Options = DEFAULT) -> list[Question]:
        own = llava_questions(data, ("llava-seed*.jsonl", "llava_seed*.jsonl"))
        if own is not None:
            return own
        questions = []
        asked = {"question": str, **{f"choice_{c}": str for c in "abcd"}}
        for q in self._truth(data)["questions"]:
            expect(q, f"SEED-Bench question {q['question_id']}", asked)
            options_text = "".join(f"\n{c.upper()}. {q[f'choice_{c}']}" for c in "abcd")
            prompt = q["question"] + options_text + LETTER
            record = {"question_id": q["question_id"], "prompt": prompt}
            questions.append(Question(str(q["question_id"]), prompt, (_image(q),), record))
        return questions

    def score(self, answers: Path, data: Path, options: Options = DEFAULT) -> Result:
        meta = self._truth(data)
        names = {v: k for k, v in meta["question_type"].items()}
        truth = {str(q["question_id"]): q for q in meta["questions"]}
        joined, coverage = join(truth, self._answers(answers, options), strict=options.strict)
        samples = {}
        for key, q in truth.items():
            text = joined[key].text if key in joined else ""
            kind = names.get(q["question_type_id"], str(q["question_type_id"]))
            samples[key] = Sample(
                float(key in joined and text == q["answer"]),
                text,
                q["answer"],
                parsed=text.strip()[:1].upper(),
                prompt=str(q.get("question", "")),
                image=_image(q),
                groups={"question_type": kind, "data_type": q["data_type"]},
                extra={"lmms_eval": float(text.strip()[:1].lower() == q["answer"].lower())},
            )
        per_type = {
            k: {"score": round(v["score"], 2), "n": v["n"]}
            for k, v in by_group(samples.values(), "question_type").items()
        }
        per_type = {n: per_type[n] for n in names.values() if n in per_type}
        totals = {"all": round(percent(s.score for s in samples.values()), 2)}
        for kind, row in by_group(samples.values(), "data_type").items():
            totals[kind] = round(row["score"], 2)
        totals["lmms_eval_first_char_all"] = percent(s.extra["lmms_eval"] for s in samples.values())
        return Result(self.name, "all", totals, samples, coverage, {"per question type": per_type})

    def submission(self, answers: Path, data: Path, out: Path, options: Options = DEFAULT) -> Path:
        """The leaderboard's jsonl: question_id and prediction of every question."""
        import json

        ids = [q["question_id"] for q in self._truth(data)["questions"]]
        joined, _ = join(map(str, ids), self._answers(answers, options), strict=True)
        rows = [{"question_id": i, "prediction": joined[str(i)].text} for i in ids]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
        return out

    def _answers(self, path: Path, options: Options) -> AnswerFile:
        return read_answers(
            path,
            id_keys=("question_id",),
            text_keys=("text", "prediction", "answer"),
            skip_bad_lines=options.skip_bad_lines,
        )

    def _truth(self, data: Path) -> dict[str, Any]:
        path = find(data, FILES, "annotation file")
        fields = {"question_id": ID, "answer": str, "data_type": str, "question_type_id": int}
        meta, _ = listed(path, "questions", fields)
        expect(meta, str(path), {"question_type": dict})
        expect(
            meta["question_type"],
            f"{path}: question_type",
            dict.fromkeys(meta["question_type"], int),
        )
        return meta


def _image(q: dict[str, Any]) -> str:
    if q["data_type"] == "video":
        # Where LLaVA's extract_video_frames.py puts the middle frame.
        return f"SEED-Bench-video-image/{q['question_type_id']}_{q['question_id']}.png"
    return f"SEED-Bench-image/{q.get('data_id', '')}"


TASK = Seed()
