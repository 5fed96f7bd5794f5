"""LLaVA-Bench: in the wild (60 questions on 24 images) and COCO (v1: 90 on 30, with captions and boxes).

Judge and summary: LLaVA eval_gpt_review_bench.py, for COCO eval_gpt_review_visual.py (gpt-4-0314,
temperature 0.2; against GPT-4's answers), and summarize_gpt_review.py. The 85.1 % of LLaVA v1 on COCO is
the relative score over all. Numbers of different judges are not comparable.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import join
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import ID, by_id, find, read_checked
from llava_jax.eval.judge.reviews import UNREAD, message, read_reviews, summary
from llava_jax.eval.questions import Question, llava_questions
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings
from llava_jax.util import read_object


class LlavaWild(Task):
    name = "llava_wild"
    headline = "all"
    max_new_tokens = 1024
    judge = True
    boxes = False  # the judge sees COCO captions and boxes instead of a caption
    prefix = "llava_bench_"  # of a category's name in rule.json
    files = ("questions.jsonl", "*questions.jsonl")
    data_files = "questions.jsonl, context.jsonl, answers_gpt4.jsonl, rule.json (to judge)"
    text_keys = ("text",)

    def questions(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Question]:
        return llava_questions(find(data, self.files, "questions file"), ("*",)) or []

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        """The result of a file of reviews. The questions are used, where `data` has them, only to
        say how many reviews are missing: the mean is over the reviews, as LLaVA's."""
        fix = f"let a judge read them: {self.next_line('judge', answers, data, settings)}"
        reviews = read_reviews(answers, settings.skip_bad_lines, fix)
        files = sorted(data.glob("*questions.jsonl")) if data.is_dir() else []
        rows = read_checked(files[0], {"question_id": ID}) if files else []
        asked = {str(r["question_id"]): str(r.get("image", "")) for r in rows}
        groups: dict[str, list[list[float]]] = {"all": []}
        samples: dict[str, Sample] = {}
        read = [r for r in reviews.rows if r.row["tuple"] is not None]
        if not read:
            raise AnswerError(f"{answers}: not one review could be read")
        for n, r in enumerate(read):
            reference, model = scores = r.row["tuple"]
            category = {"category": r.row["category"]} if "category" in r.row else {}
            for group in ("all", *category.values()):
                groups.setdefault(group, []).append(scores)
            details, image = {"reference": reference, "model": model}, asked.get(r.id, "")
            sample = Sample(model, r.text, reference, scores, "", image, category, details)
            samples[r.id if r.id not in samples else f"{r.id}#{n}"] = sample
        table = {name: summary(pairs) for name, pairs in sorted(groups.items())}
        totals: dict[str, Any] = {name: row["relative"] for name, row in table.items()}
        totals |= {"reference": table["all"]["reference"], "model": table["all"]["model"]}
        unread = len(reviews.rows) - len(read)
        totals["unread_reviews"] = unread + groups["all"].count(UNREAD)
        judges = {str(r.row["judge"]) for r in reviews.rows if r.row.get("judge")}
        totals["judge"] = ", ".join(sorted(judges)) or "not recorded (LLaVA used gpt-4-0314)"
        runs = 1 + max(int(r.row.get("run", 0)) for r in reviews.rows)
        lowest: dict[str, int] = {}
        for r in read:
            lowest[r.id] = min(r.row.get("run", 0), lowest.get(r.id, runs))
        first = [r for r in read if r.row.get("run", 0) == lowest[r.id]]  # more runs are no doubles
        how: dict[str, Any] = {"leaves_out": True, "all_rows_count": True}
        how |= {"strict": settings.strict, "open_end": "" if asked else "no questions file"}
        _, coverage = join(asked or [r.id for r in first], replace(reviews, rows=first), **how)
        whole = len(read) == runs * len(lowest)
        each = f"{runs} reviews" if whole else f"{len(read)} reviews, not {runs}"
        notes = [f"the mean over {each} of each answer"] if runs > 1 else []
        notes += [f"{unread} reviews were not readable; no mean has them"] if unread else []
        return Result(self, totals, samples, coverage, {"per category": table}, notes)

    def requests(
        self, answers: Path, data: Path, settings: TaskSettings = DEFAULT
    ) -> Iterator[tuple[dict[str, Any], str]]:
        """(review row to fill, judge's message) per question, in order; all must be answered."""
        fields = {"question_id": ID, "image": str, "text": str, "category": str}
        patterns = ("questions.jsonl", "qa90_questions.jsonl", "*questions.jsonl")
        questions = read_checked(find(data, patterns, "questions file"), fields)
        context = find(data, ("context.jsonl", "caps_boxes_*.jsonl"), "context file")
        contexts = by_id(read_checked(context, {"image": str}), "image", context)
        patterns = ("answers_gpt4.jsonl", "gpt4_answers.jsonl", "*gpt4_answer*.jsonl")
        gpt4 = find(data, patterns, "reference answers")
        rows = read_checked(gpt4, {"question_id": ID, "text": str})
        references = by_id(rows, "question_id", gpt4)
        rules = read_object(find(data, ("rule.json",), "judge's rules"), DataError)
        given = self.read(answers, settings)
        asked = {str(q["question_id"]): q["text"] for q in questions}
        joined, _ = join(asked, given, asked=asked, strict=True)
        for n, q in enumerate(questions, 1):
            key, category = str(q["question_id"]), self.prefix + q["category"]
            tables = {"rule.json": (category, rules), context.name: (q["image"], contexts)}
            for where, (what, table) in {**tables, gpt4.name: (key, references)}.items():
                if what not in table:
                    raise DataError(f"{data}: question {key}: {what!r} is not in {where}")
            answer, reference = joined[key], references[key]
            row = {"id": n, "question_id": q["question_id"], "category": category}
            row["answer1_id"] = reference.get("answer_id", q["question_id"])
            row["answer2_id"] = answer.row.get("answer_id", q["question_id"])
            shown = _context(contexts[q["image"]], self.boxes)
            yield row, message(rules[category], shown, q["text"], reference["text"], answer.text)


class Coco30(LlavaWild):
    name = "coco30"
    boxes = True
    prefix = ""
    files = ("qa90_questions.jsonl", "questions.jsonl", "*questions.jsonl")
    data_files = (
        "qa90_questions.jsonl, caps_boxes_coco2014_val_80.jsonl, qa90_gpt4_answer.jsonl, rule.json"
    )


def _context(row: dict[str, Any], boxes: bool) -> str:
    if not boxes:
        caption = row["caption"]
        return "\n".join(caption) if isinstance(caption, list) else caption
    lines = [f"{i['category']}: {i['bbox']}" for i in row["instances"]]
    return "\n".join(row["captions"]) + "\n\n" + "\n".join(lines)
