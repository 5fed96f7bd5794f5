"""Reviews by a judge model, as LLaVA's eval_gpt_review*.py asks for them and stores them.

A review file is jsonl: question_id, category, content (the judge's words) and tuple (its scores for
the reference and the model, 1 to 10; [-1, -1] where they could not be read, which stay in the mean).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import Coverage, as_id, join, read_answers
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import ID, expect, find, read_checked, read_rows
from llava_jax.eval.task import Result, Sample, Task, TaskSettings
from llava_jax.util import read_json

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
UNREAD = [-1, -1]


def parse_score(review: str) -> list[float]:
    """The two numbers of a review's first line, or [-1, -1].

    A comma counts as a blank, so "8, 9" has three parts and is not read: as in LLaVA's script.
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(parts[0]), float(parts[1])] if len(parts) == 2 else list(UNREAD)
    except ValueError:
        return list(UNREAD)


def read_reviews(
    path: Path, skip_bad_lines: bool = False
) -> tuple[list[dict[str, Any]], list[int]]:
    """The reviews of a file, each with question_id, tuple and perhaps category; and unreadable lines.

    Raises:
      AnswerError: a row has no scores: then these are answers, which a judge must see first.
    """
    bad: list[int] = []
    reviews = []
    rows = read_rows(path, error=AnswerError, bad_lines=bad if skip_bad_lines else None)
    for line, row in rows:
        where = f"{path} line {line}, question_id {row.get('question_id')!r}"
        scores = row.get("tuple", row.get("score"))
        if scores is None and isinstance(row.get("content"), str):
            scores = parse_score(row["content"])
        if scores is None:
            raise AnswerError(
                f"{where}: no tuple, score or content: these are answers, not reviews",
                fix="let a judge read them: llava-jax eval judge",
            )
        if (
            not isinstance(scores, list)
            or len(scores) != 2
            or not all(isinstance(x, int | float) for x in scores)
        ):
            raise AnswerError(f"{where}: the scores are {scores!r}, not two numbers")
        if not isinstance(row.get("category", ""), str):
            raise AnswerError(f"{where}: the category is {row['category']!r}, not text")
        reviews.append({**row, "tuple": [float(x) for x in scores]})
    if not reviews:
        raise AnswerError(f"{path}: no reviews in it")
    return reviews, bad


def summary(pairs: list[list[float]]) -> list[float]:
    """LLaVA's summarize_gpt_review.py: [model relative to reference in percent, reference x 10,
    model x 10], each rounded to one decimal."""
    reference, model = (round(sum(p[i] for p in pairs) / len(pairs), 3) for i in (0, 1))
    relative = round(model / reference * 100, 1) if reference else 0.0
    return [relative, round(reference * 10, 1), round(model * 10, 1)]


def score_reviews(task: Task, path: Path, data: Path, settings: TaskSettings) -> Result:
    """The result of a review file. The questions are used, where `data` has them, only to say how
    many reviews are missing: the mean is over the reviews, as LLaVA's."""
    reviews, bad = read_reviews(path, settings.skip_bad_lines)
    groups: dict[str, list[list[float]]] = {"all": []}
    samples: dict[str, Sample] = {}
    for n, r in enumerate(reviews):
        reference, model = r["tuple"]
        category = {"category": r["category"]} if "category" in r else {}
        for group in ("all", *category.values()):
            groups.setdefault(group, []).append(r["tuple"])
        key = str(r.get("question_id", n))
        samples[key if key not in samples else f"{key}#{n}"] = Sample(
            model,
            str(r.get("content", r.get("text", ""))),
            reference,
            parsed=r["tuple"],
            groups=category,
            details={"reference": reference, "model": model},
        )
    table = {
        k: dict(zip(("relative", "reference", "model"), summary(v))) | {"n": len(v)}
        for k, v in sorted(groups.items())
    }
    totals: dict[str, Any] = {k: row["relative"] for k, row in table.items()}
    totals |= {"reference": table["all"]["reference"], "model": table["all"]["model"]}
    totals["unread_reviews"] = sum(p == [-1.0, -1.0] for p in groups["all"])
    judges = {str(r["judge"]) for r in reviews if r.get("judge")}
    totals["judge"] = ", ".join(sorted(judges)) or "not recorded (LLaVA used gpt-4-0314)"
    coverage = _coverage(reviews, data, bad)
    return task.result(totals, samples, coverage, {"per category": table})


def _coverage(reviews: list[dict[str, Any]], data: Path, bad: list[int]) -> Coverage:
    lines: dict[str, list[int]] = {}
    for n, r in enumerate(reviews):
        lines.setdefault(as_id(r.get("question_id", n)), []).append(n + 1)
    files = sorted(data.glob("*questions.jsonl")) if data.is_dir() else []
    asked = read_checked(files[0], {"question_id": ID}) if files else []
    expected = [as_id(r["question_id"]) for r in asked] or list(lines)
    return Coverage(
        expected=len(expected),
        answered=len(lines.keys() & set(expected)),
        missing=[i for i in expected if i not in lines],
        doubled={i: n for i, n in lines.items() if len(n) > 1},
        missing_left_out=True,
        bad_lines=bad,
    )


def requests(
    answers: Path, data: Path, *, boxes: bool, prefix: str = ""
) -> Iterator[tuple[dict[str, Any], str]]:
    """(review row to fill, the judge's user message) per question, in order.

    Args:
      answers: the model's answer file.
      data: folder with questions, context, GPT-4's answers and rule.json.
      boxes: the context has COCO captions and boxes (LLaVA-Bench COCO) instead of a caption.
      prefix: of a category's name in rule.json.
    """

    def file(what: str, *patterns: str) -> Path:
        return find(data, patterns, what)

    asked = file("questions file", "questions.jsonl", "qa90_questions.jsonl", "*questions.jsonl")
    fields = {"question_id": ID, "image": str, "text": str, "category": str}
    questions = read_checked(asked, fields)
    context = file("context file", "context.jsonl", "caps_boxes_*.jsonl")
    contexts = {row["image"]: row for row in read_checked(context, {"image": str})}
    gpt4 = file(
        "reference answers", "answers_gpt4.jsonl", "gpt4_answers.jsonl", "*gpt4_answer*.jsonl"
    )
    reference_rows = read_checked(gpt4, {"question_id": ID, "text": str})
    references = {str(r["question_id"]): r for r in reference_rows}
    rules = expect(read_json(file("judge's rules", "rule.json"), DataError), "rule.json")
    given = read_answers(answers, id_keys=("question_id",), text_keys=("text",))
    joined, _ = join((str(q["question_id"]) for q in questions), given, strict=True)
    for n, q in enumerate(questions, 1):
        key, category = str(q["question_id"]), prefix + q["category"]
        for what, where, table in (
            (category, "rule.json", rules),
            (q["image"], context.name, contexts),
            (key, gpt4.name, references),
        ):
            if what not in table:
                raise DataError(f"{data}: question {key}: {what!r} is not in {where}")
        answer, reference = joined[key], references[key]
        row = {
            "id": n,
            "question_id": q["question_id"],
            "answer1_id": reference.get("answer_id", q["question_id"]),
            "answer2_id": answer.row.get("answer_id", q["question_id"]),
            "category": category,
        }
        shown = _context(contexts[q["image"]], boxes)
        yield row, message(rules[category], shown, q["text"], reference["text"], answer.text)


def message(rule: dict[str, str], context: str, question: str, reference: str, answer: str) -> str:
    """The judge's user message, to the letter of eval_gpt_review_bench.py and _visual.py."""
    role = rule["role"]
    return (
        f"[Context]\n{context}\n\n"
        f"[Question]\n{question}\n\n"
        f"[{role} 1]\n{reference}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{answer}\n\n[End of {role} 2]\n\n"
        f"[System]\n{rule['prompt']}\n\n"
    )


def _context(row: dict[str, Any], boxes: bool) -> str:
    if not boxes:
        caption = row["caption"]
        return "\n".join(caption) if isinstance(caption, list) else caption
    lines = [f"{i['category']}: {i['bbox']}" for i in row["instances"]]
    return "\n".join(row["captions"]) + "\n\n" + "\n".join(lines)
