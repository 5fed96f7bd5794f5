"""Lets a judge read answers: reviews for the LLaVA-Bench sets, grades for MM-Vet.

The owners' judges (gpt-4-0314, gpt-4-0613) are retired, so the judge's name is in every row and in
every result: numbers of different judges are not comparable.
"""

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError, counted
from llava_jax.eval.benchmarks.mmvet import read_grade
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.judge.endpoint import Endpoint, JudgeError
from llava_jax.eval.judge.mmvet_prompt import RETRY
from llava_jax.eval.judge.reviews import SYSTEM, parse_score, read_reviews
from llava_jax.eval.task import get_task
from llava_jax.util import read_object, write_json

logger = logging.getLogger(__name__)

REVIEW_TOKENS, GRADE_TOKENS = 1024, 3
Progress = Callable[[int, int], None]


def judge_reviews(
    requests: Sequence[tuple[dict[str, Any], str]],
    out: Path,
    endpoint: Endpoint,
    progress: Progress = lambda done, total: None,
) -> None:
    """Appends a review per request that `out` has none for (temperature 0.2, as LLaVA's).

    Raises:
      AnswerError: `out` holds a review of another answer to the same question.
    """
    done = {str(r["question_id"]): r for r in read_reviews(out)[0]} if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    for n, (row, message) in enumerate(requests, 1):
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
        review = {**row, "content": reply.text, "tuple": parse_score(reply.text)}
        with open(out, "a", encoding="utf-8") as f:
            row = {**review, "judge": reply.model, "request": digest}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
        progress(n, len(requests))


def judge_grades(
    requests: Sequence[tuple[str, str]],
    out: Path,
    endpoint: Endpoint,
    runs: int = 1,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes MM-Vet's grade file, `runs` grades per answer; goes on where `out` stopped."""
    out.parent.mkdir(parents=True, exist_ok=True)
    grades: dict[str, dict[str, list]] = read_object(out, AnswerError) if out.exists() else {}
    for run in range(runs):
        for n, (key, message) in enumerate(requests, 1):
            grade = grades.setdefault(key, {"model": [], "content": [], "score": []})
            if len(grade["score"]) > run:
                continue
            model, content, score = grade_one(message, endpoint, run)
            grade["model"].append(model)
            grade["content"].append(content)
            grade["score"].append(score)
            write_json(out, {k: g for k, g in grades.items() if g["score"]}, indent=4)
            progress(run * len(requests) + n, runs * len(requests))


def grade_one(message: str, endpoint: Endpoint, run: int = 0) -> tuple[str, str, float]:
    """(judge, its first word, grade): asked at temperature 0, then with a reminder at 0, 0.5, 1 and
    1.5; after that the grade is 0, as in mm-vet_evaluator.py."""
    attempts = [("", 0.0)] + [(RETRY, 0.5 * n) for n in range(4)]
    reply, content = None, ""
    for reminder, temperature in attempts:
        messages = [{"role": "user", "content": message + reminder}]
        reply = endpoint.ask(messages, temperature=temperature, max_tokens=GRADE_TOKENS, again=run)
        content = reply.text.split(" ")[0].strip()
        grade = read_grade(reply.text)
        if grade is not None:
            return reply.model, content, grade
    logger.warning("judge: no grade in %r, counted as 0", content)
    return (reply.model if reply else endpoint.model), content, 0.0


def estimate(
    messages: Sequence[str], tokens_out: int, price_in: float | None, price_out: float | None
) -> str:
    """A line that says what judging will take, at four characters per token.

    Args:
      messages: all user messages. tokens_out: most tokens of one reply.
      price_in, price_out: dollars per million tokens, if known.
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
        judge_grades(requests, args.out, endpoint, args.runs, _show)
    else:
        judge_reviews(requests, args.out, endpoint, _show)
    print(f"wrote {args.out}; sum it with: llava-jax eval score {task.name} --answers {args.out}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise JudgeError("nobody to ask whether to go on", fix="--yes starts without asking")
    return input("start? [y/N] ").strip().lower() in ("y", "yes")


def _show(done: int, total: int) -> None:
    print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)
