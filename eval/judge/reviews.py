"""Reviews by a judge model, as LLaVA's eval_gpt_review*.py asks for them and stores them.

A review file is jsonl: question_id, category, content (the judge's words) and tuple (its scores for
the reference and the model, 1 to 10). Scores that could not be read are [-1, -1] in LLaVA's own files
and stay in its mean; in ours they are null and in no mean.
"""

import re
from pathlib import Path

from llava_jax.eval.answers import Answer, AnswerFile, as_id
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.files import read_rows
from llava_jax.reader import is_number

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


UNREAD = [-1.0, -1.0]
_LABEL = re.compile(r"assistant\s*[12]|/\s*10\b|\b[12]\s*[:)]", re.IGNORECASE)
_TURNED = re.compile(r"assistant\s*2.*assistant\s*1|\b2\s*[:)].*\b1\s*[:)]", re.IGNORECASE)
_SCORE = re.compile(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w%])")


def parse_score(review: str) -> list[float]:
    """The two numbers of a review's first line, or [-1, -1].

    A comma counts as a blank, so "8, 9" has three parts and is not read: as in LLaVA's script.
    """
    try:
        reference, model = review.split("\n")[0].replace(",", " ").split(" ")
        return [float(reference), float(model)]
    except ValueError:
        return list(UNREAD)


def read_scores(reply: str) -> list[float] | None:
    """The scores of a review that a judge gives now: LLaVA's rule, else the only two numbers from 0
    to 10 of its first line ("8, 9", "Assistant 1: 8/10 Assistant 2: 9/10") in this order, else None."""
    scores = parse_score(reply := reply.strip())
    if all(0 <= x <= 10 for x in scores):
        return scores
    line = reply.split("\n")[0]
    found = [float(x) for x in _SCORE.findall(_LABEL.sub(" ", line))]
    return found if len(found) == 2 and max(found) <= 10 and not _TURNED.search(line) else None


def read_reviews(
    path: Path, skip_bad_lines: bool = False, fix: str = "name another file"
) -> AnswerFile:
    """The reviews of a file: text is the judge's words, and each row has a tuple of two numbers.

    Raises:
      AnswerError: a row has no scores: then these are answers, which a judge must see first.
    """
    bad: list[int] = []
    reviews = []
    rows = read_rows(path, error=AnswerError, bad_lines=bad if skip_bad_lines else None)
    for n, (line, row) in enumerate(rows):
        where = f"{path} line {line}, question_id {row.get('question_id')!r}"
        key, scores = as_id(row.get("question_id", n), where), row.get("tuple", row.get("score"))
        text = str(row.get("content", row.get("text", "")))
        if scores is None and "judge_model" in row:  # ours, and unread
            reviews.append(Answer(key, text, line, {**row, "tuple": None}))
            continue
        if scores is None and isinstance(row.get("content"), str):
            scores = parse_score(row["content"])
        if scores is None:
            what = f"{where}: no tuple, score or content: these are answers, not reviews"
            raise AnswerError(what, fix=fix)
        if not isinstance(scores, list) or len(scores) != 2 or not all(map(is_number, scores)):
            raise AnswerError(f"{where}: the scores are {scores!r}, not two numbers")
        if scores != UNREAD and not all(0 <= x <= 10 for x in scores):
            raise AnswerError(f"{where}: the scores are {scores!r}, not from 0 to 10")
        if not isinstance(row.get("run", 0), int):
            raise AnswerError(f"{where}: run is {row['run']!r}, not a whole number")
        if not isinstance(row.get("category", ""), str):
            raise AnswerError(f"{where}: the category is {row['category']!r}, not text")
        reviews.append(Answer(key, text, line, {**row, "tuple": [float(x) for x in scores]}))
    if not reviews:
        raise AnswerError(f"{path}: no reviews in it")
    return AnswerFile(path, reviews, bad)


def summary(pairs: list[list[float]]) -> dict[str, float]:
    """LLaVA's summarize_gpt_review.py: the model relative to the reference in percent, and the means
    of both times 10, each rounded to one decimal."""
    reference, model = (round(sum(p[i] for p in pairs) / len(pairs), 3) for i in (0, 1))
    relative = round(model / reference * 100, 1) if reference else 0.0
    means = {"reference": round(reference * 10, 1), "model": round(model * 10, 1)}
    return {"relative": relative, **means, "n": len(pairs)}


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
