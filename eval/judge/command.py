"""Has a judge grade answers: reviews for the LLaVA-Bench sets, grades for MM-Vet.

The owners' judges (gpt-4-0314, gpt-4-0613) are retired, so the judge's name is in every row and in
every result: numbers of different judges are not comparable. A reply that holds no grade is asked for
again and then counted apart, never as a 0.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError
from llava_jax.eval.benchmarks.mmvet import first_word, read_grade
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.files import locked
from llava_jax.eval.judge.endpoint import Asked, Endpoint, JudgeError, not_asked
from llava_jax.eval.judge.mmvet_prompt import RETRY
from llava_jax.eval.judge.reviews import SYSTEM, read_reviews, read_scores
from llava_jax.eval.judge.store import RETRIES, ask_until_read, judge_missing, kept_lines
from llava_jax.eval.task import TaskSettings, get_task
from llava_jax.util import read_object, write_json

REVIEW_TOKENS, GRADE_TOKENS = 1024, 3
Graded = Sequence[tuple[str, str]]  # id, message to the judge
GRADE = ("model", "content", "score")  # lists of a question in MM-Vet's grade file


def judge_reviews(
    requests: Asked, out: Path, endpoint: Endpoint, runs: int = 1, threads: int = 8
) -> None:
    """Appends the reviews that `out` lacks, `runs` per request (temperature 0.2, as LLaVA's).

    Raises:
      AnswerError: `out` holds a review of another answer to the same question, or by another judge.
    """

    def review(row: dict[str, Any], message: str) -> dict[str, Any]:
        tries = review_tries(message, row.get("run", 0))
        scores, reply = ask_until_read(endpoint, read_scores, tries)
        return {**row, "content": reply.text, "tuple": scores, "judge": reply.model}

    every = [(r | ({"run": run} if run else {}), m) for run in range(runs) for r, m in requests]
    there = kept_lines(out, lambda path: [r.row for r in read_reviews(path).rows])
    judge_missing(every, out, endpoint, threads, there, review)


def review_tries(message: str, run: int) -> list[dict[str, Any]]:
    """What is sent for a review until its scores can be read: another request than that of any run."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": message}]
    how = {"messages": messages, "temperature": 0.2, "max_tokens": REVIEW_TOKENS}
    return [{**how, "again": run + 1000 * n} for n in range(1 + RETRIES)]


def judge_grades(
    requests: Graded, out: Path, endpoint: Endpoint, runs: int = 1, threads: int = 8
) -> None:
    """Writes MM-Vet's grade file, `runs` grades per answer; goes on where `out` stopped.

    Raises:
      AnswerError: `out` holds grades of other answers, or by another judge.
    """
    grades: dict[str, dict[str, Any]] = read_object(out, AnswerError) if out.exists() else {}
    there = []
    for key, grade in grades.items():
        if not (isinstance(grade, dict) and all(isinstance(grade.get(n), list) for n in GRADE)):
            raise AnswerError(f"{out}: holds no grades of a judge", fix="name another file")
        there += [{**grade, "question_id": key, "run": n} for n in range(len(grade["score"]))]

    def work(row: dict[str, Any], message: str) -> dict[str, Any]:
        return row | dict(zip(GRADE, grade_one(message, endpoint, row["run"])))

    def keep(row: dict[str, Any]) -> None:
        known = {name: row[name] for name in ("request", "judge_model")}
        grade = grades.setdefault(row["question_id"], {name: [] for name in GRADE} | known)
        for name in GRADE:
            grade[name].append(row[name])
        write_json(out, grades, indent=4)

    every = [({"question_id": k, "run": run}, m) for run in range(runs) for k, m in requests]
    judge_missing(every, out, endpoint, threads, there, work, keep)


def grade_one(message: str, endpoint: Endpoint, run: int = 0) -> tuple[str, str, float | None]:
    """(judge, its words, grade), which is None where there is none, and the owner's script counts 0."""
    grade, reply = ask_until_read(endpoint, read_grade, grade_tries(message, run))
    return reply.model, first_word(reply.text), grade


def grade_tries(message: str, run: int) -> list[dict[str, Any]]:
    """What is sent for a grade until one can be read: at temperature 0, then with a reminder at 0, 0.5, 1
    and 1.5, as in mm-vet_evaluator.py."""
    tries = []
    for reminder, temperature in [("", 0.0)] + [(RETRY, 0.5 * n) for n in range(4)]:
        messages = [{"role": "user", "content": message + reminder}]
        # More than the owner's three tokens where the judge talks before it grades.
        tokens = 16 * GRADE_TOKENS if reminder else GRADE_TOKENS
        how = {"messages": messages, "temperature": temperature, "max_tokens": tokens}
        tries.append({**how, "again": run})
    return tries


def estimate(
    left: Sequence[Sequence[dict[str, Any]]], price_in: float | None, price_out: float | None
) -> str:
    """A line that says what judging will take, at four characters per token: where each first reply can
    be read, and where none can.

    left: of each request, what may be sent (see not_asked). price_in, price_out: dollars per million
      tokens, if known.
    """
    every = [how for tries in left for how in tries]
    read = [
        sum(len(m["content"]) for how in sent for m in how["messages"]) // 4
        for sent in ([tries[0] for tries in left], every)
    ]
    written = sum(how["max_tokens"] for how in every)
    requests = f"{_span(len(left), len(every))} request{'s' * (len(every) != 1)}"
    line = f"{requests}, about {_span(*read)} tokens read and at most {written:,} written"
    return line + _cost(", at most ", read[1], written, price_in, price_out)


def _span(least: int, most: int) -> str:
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _cost(before: str, read: int, written: int, *prices: float | None) -> str:
    each = [n * price for n, price in zip((read, written), prices) if price is not None]
    return f"{before}${sum(each) / 1e6:.2f}" if len(each) == 2 else ""


def judge_command(args: argparse.Namespace, settings: TaskSettings) -> int:
    """`llava-jax eval judge` and `extract`: shows the cost, asks, judges."""
    task, extracts = get_task(args.task), args.action == "extract"
    if not task.judge and not extracts:
        line = task.next_line("score", args.answers, args.data, settings)
        raise LlavaError(f"{task.name} needs no judge", fix=f"score it: {line}")
    for name in ("runs", "parallel"):
        if getattr(args, name) < 1:
            raise LlavaError(f"--{name} must be at least 1")
    requests: Sequence[Any]
    plan: list[tuple[Any, Any]]
    judge: Any
    if extracts:
        from llava_jax.eval.judge import extract

        requests = extract.requests(task, args.answers, args.data, settings)
        judge = extract.extract_answers
        plan = [(extract.tries(m), extract.reader(row)) for row, m in requests]
    else:
        requests = list(task.requests(args.answers, args.data, settings))  # type: ignore[attr-defined]
        judge, tries, read = judge_reviews, review_tries, read_scores
        if task.grades:
            judge, tries, read = judge_grades, grade_tries, read_grade
        plan = [(tries(m, run), read) for run in range(args.runs) for _, m in requests]
    prices = args.price_in, args.price_out
    transcript = args.out.with_name(f"{args.out.name}.transcript.jsonl")
    left = not_asked(plan, transcript, args.judge_model)
    print(f"{args.judge_model}: {estimate(left, *prices)}")
    if left and not args.yes and not _agreed():
        return 1
    named = {"key_env": args.key_env, "per_minute": args.per_minute}
    endpoint = Endpoint(args.endpoint, args.judge_model, transcript, **named)
    if left:
        endpoint.check()
    with locked(args.out.with_name(f".{args.out.name}.lock")):
        judge(requests, args.out, endpoint, args.runs, args.parallel)
    took = endpoint.tokens_in, endpoint.tokens_out
    print(f"took {took[0]:,} tokens read and {took[1]:,} written{_cost(', ', *took, *prices)}")
    scored, read_from = (args.answers, args.out) if extracts else (args.out, None)
    line = task.next_line("score", scored, args.data, settings, read_from)
    print(f"wrote {args.out}; score it with: {line}")
    return 0


def _agreed() -> bool:
    if not sys.stdin.isatty():
        what = "standard input is not a terminal, so nobody can confirm"
        raise JudgeError(what, fix="--yes starts without asking")
    try:
        return input("start? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:  # Ctrl-D
        print()
        return False
