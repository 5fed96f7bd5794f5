"""What a judge wrote: kept line by line as it comes, and taken again only for the same answer and judge."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import AnswerError
from llava_jax.eval.judge.endpoint import Endpoint, in_parallel
from llava_jax.progress import progress

RETRIES = 3  # of a reply that cannot be read


def digest(message: str) -> str:
    """A short hash of what a judge was asked."""
    return hashlib.sha256(message.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def check_same(out: Path, key: str, old: Mapping[str, Any], message: str, judge: str) -> None:
    """Raises AnswerError where `old`, a grade or review in `out`, is of another answer or judge."""
    for name, now, words in (
        ("request", digest(message), "with another answer"),
        ("judge_model", judge, f"by {old.get('judge_model')!r}, not {judge!r}"),
    ):
        if old.get(name) != now:
            what = words if name in old else "by a command that did not note the answer"
            raise AnswerError(
                f"{out}: question {key} was reviewed {what}",
                fix="move the file away, or name another",
            )


def judge_missing(
    requests: Sequence[tuple[dict[str, Any], str, int]],
    done: Mapping[tuple[str, int], dict[str, Any]],
    out: Path,
    endpoint: Endpoint,
    work: Callable[[dict[str, Any], str], dict[str, Any]],
    threads: int,
) -> None:
    """Appends to `out` the rows that `done` (by id and run) lacks, in the order of the requests.

    requests: (row, message, run). work: (row, message) -> the whole row.
    """
    todo = []
    for row, message, run in requests:
        key = str(row["question_id"])
        if (old := done.get((key, run))) is not None:
            check_same(out, key, old, message, endpoint.model)
        else:
            todo.append((row, message))
    out.parent.mkdir(parents=True, exist_ok=True)

    def one(asked: tuple[dict[str, Any], str]) -> dict[str, Any]:
        request = {"request": digest(asked[1]), "judge_model": endpoint.model}
        return work(*asked) | request

    with progress(len(requests), "judge", "reply", initial=len(requests) - len(todo)) as bar:
        for row in in_parallel(one, todo, threads):
            with open(out, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            bar.update()
