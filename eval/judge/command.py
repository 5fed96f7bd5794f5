"""Has a judge grade answers: reviews for the LLaVA-Bench sets, grades for MM-Vet.

The owners' judges (gpt-4-0314, gpt-4-0613) are retired, so the judge's name is in every row and in
every result: numbers of different judges are not comparable.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError, counted
from llava_jax.eval.benchmarks.mmvet import first_word, read_grade
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.judge.endpoint import Endpoint, JudgeError, JudgeReply
from llava_jax.eval.judge.mmvet_prompt import RETRY
from llava_jax.eval.judge.reviews import SYSTEM, parse_score, read_reviews
from llava_jax.eval.task import get_task
from llava_jax.progress import progress
from llava_jax.util import read_object, write_json

logger = logging.getLogger(__name__)

REVIEW_TOKENS, GRADE_TOKENS = 1024, 3
GRADE = ("model", "content", "score")  # lists of a question in MM-Vet's grade file


def judge_reviews(
    requests: Sequence[tuple[dict[str, Any], str]], out: Path, endpoint: Endpoint
) -> None:
    """Appends a review per request that `out` has none for (temperature 0.2, as LLaVA's).

    Raises:
      AnswerError: `out` holds a review of another answer to the same question.
    """
    done = {r.id: r.row for r in read_reviews(out).rows} if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    with progress(len(requests), "judge", "review") as bar:
        for row, message in requests:
            bar.update()
            digest = hashlib.sha256(message.encode()).hexdigest()[:16]
            old = done.get(str(row["question_id"]))
            if old is not None:
                if old.get("request", digest) != digest:
                    raise AnswerError(
                        f"{out}: question {row['question_id']} was reviewed with another answer",
                        fix="move the file away, or name another",
                    )
                continue
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
            reply = endpoint.ask(messages, temperature=0.2, max_tokens=REVIEW_TOKENS)
            review = {"content": reply.text, "tuple": parse_score(reply.text), "judge": reply.model}
            with open(out, "a", encoding="utf-8") as f:
                f.write(json.dumps({**row, **review, "request": digest}, ensure_ascii=False) + "\n")


def judge_grades(
    requests: Sequence[tuple[str, str]], out: Path, endpoint: Endpoint, runs: int = 1
) -> None:
    """Writes MM-Vet's grade file, `runs` grades per answer; goes on where `out` stopped."""
    out.parent.mkdir(parents=True, exist_ok=True)
    grades: dict[str, dict[str, list]] = read_object(out, AnswerError) if out.exists() else {}
    for grade in grades.values():
        if not (isinstance(grade, dict) and all(isinstance(grade.get(n), list) for n in GRADE)):
            raise AnswerError(f"{out}: holds no grades of a judge", fix="name another file")
    with progress(runs * len(requests), "judge", "grade") as bar:
        for run in range(runs):
            for key, message in requests:
                bar.update()
                grade = grades.setdefault(key, {name: [] for name in GRADE})
                if len(grade["score"]) > run:
                    continue
                for name, value in zip(GRADE, grade_one(message, endpoint, run)):
                    grade[name].append(value)
                write_json(out, {k: g for k, g in grades.items() if g["score"]}, indent=4)


def grade_one(message: str, endpoint: Endpoint, run: int = 0) -> tuple[str, str, float]:
    """(judge, its first word, grade): asked at temperature 0, then with a reminder at 0, 0.5, 1 and
    1.5; after that the grade is 0, as in mm-vet_evaluator.py."""
    reply = JudgeReply("", endpoint.model)
    for reminder, temperature in [("", 0.0)] + [(RETRY, 0.5 * n) for n in range(4)]:
        messages = [{"role": "user", "content": message + reminder}]
        reply = endpoint.ask(messages, temperature=temperature, max_tokens=GRADE_TOKENS, again=run)
        if read_grade(reply.text) is not None:
            break
    else:
        logger.warning("judge: no grade in %r, counted as 0", first_word(reply.text))
    return reply.model, first_word(reply.text), read_grade(reply.text) or 0.0


def estimate(
    messages: Sequence[str], tokens_out: int, price_in: float | None, price_out: float | None
) -> str:
    """A line that says what judging will take, at four characters per token.

    tokens_out: most tokens of one reply. price_in, price_out: dollars per million tokens, if known.
    """
    read = sum(len(m) for m in messages) // 4
    written = len(messages) * tokens_out
    line = f"{counted(len(messages), 'request')}, about {read:,} tokens read and at most {written:,} written"
    if price_in is not None and price_out is not None:
        line += f", at most ${(read * price_in + written * price_out) / 1e6:.2f}"
    return line


def judge_command(args: argparse.Namespace) -> int:
    """`llava-jax eval judge`: shows the cost, asks, judges."""
    task = get_task(args.task)
    if not task.judge:
        raise LlavaError(f"{task.name} needs no judge", fix="score it: llava-jax eval score")
    requests = list(task.requests(args.answers, args.data))  # type: ignore[attr-defined]
    graded = task.name == "mmvet"
    messages = [m for _, m in requests] * (args.runs if graded else 1)
    tokens = GRADE_TOKENS if graded else REVIEW_TOKENS
    print(f"{args.judge_model}: {estimate(messages, tokens, args.price_in, args.price_out)}")
    if not args.yes and not _agreed():
        return 1
    endpoint = Endpoint(
        args.endpoint,
        args.judge_model,
        args.out.with_name(args.out.name + ".transcript.jsonl"),
        key_env=args.key_env,
        per_minute=args.per_minute,
    )
    if graded:
        judge_grades(requests, args.out, endpoint, args.runs)
    else:
        judge_reviews(requests, args.out, endpoint)
    print(f"wrote {args.out}; score it with: llava-jax eval score {task.name} --answers {args.out}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise JudgeError(
            "standard input is not a terminal, so nobody can confirm",
            fix="--yes starts without asking",
        )
    return input("start? [y/N] ").strip().lower() in ("y", "yes")
