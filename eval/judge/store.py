"""What a judge wrote: kept line by line as it comes, and taken again only for the same answer and judge."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from llava_jax.eval.errors import AnswerError
from llava_jax.eval.judge.endpoint import Asked, Endpoint, JudgeReply, in_parallel, repair_lines
from llava_jax.progress import progress

logger = logging.getLogger(__name__)
T = TypeVar("T")
Row = dict[str, Any]
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
            what = f"{out}: question {key} was reviewed {what}"
            raise AnswerError(what, fix="move the file away, or name another")


def ask_until_read(
    endpoint: Endpoint, read: Callable[[str], T | None], tries: Sequence[Row]
) -> tuple[T | None, JudgeReply]:
    """What `read` makes of the first reply in which it finds anything, and that reply; None after all.

    tries: what Endpoint.ask takes, for each.
    """
    reply = JudgeReply("", endpoint.model)
    for how in tries:
        reply = endpoint.ask(**how)
        if not reply.no_answer and (found := read(reply.text)) is not None:
            return found, reply
    logger.warning("judge: nothing to read in %r, counted apart", reply.text[:40])
    return None, reply


def judge_missing(
    requests: Asked, out: Path, endpoint: Endpoint, threads: int,
    there: Iterable[Row], work: Callable[[Row, str], Row], keep: Callable[[Row], None] | None = None,
) -> None:  # fmt: skip
    """Has `out` hold a row of each request, by id and run, in the order of the requests.

    there: the rows it has. work: (row, message) -> the whole row. keep: writes a row, by default as a line.
    """
    done, todo = {_place(row): row for row in there}, []
    for row, message in requests:
        if (old := done.get(_place(row))) is not None:
            check_same(out, str(row["question_id"]), old, message, endpoint.model)
        else:
            todo.append((row, message))
    out.parent.mkdir(parents=True, exist_ok=True)

    def one(asked: tuple[Row, str]) -> Row:
        return work(*asked) | {"request": digest(asked[1]), "judge_model": endpoint.model}

    def add_line(row: Row) -> None:
        with open(out, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    with progress(len(requests), "judge", "reply", initial=len(requests) - len(todo)) as bar:
        for row in in_parallel(one, todo, threads):
            (keep or add_line)(row)
            bar.update()


def kept_lines(path: Path, read: Callable[[Path], list[Row]]) -> list[Row]:
    """What `read` finds in a file that grows by lines, after its last one is repaired."""
    if path.exists() and path.stat().st_size:
        repair_lines(path)
    return read(path) if path.exists() and path.stat().st_size else []


def _place(row: Mapping[str, Any]) -> tuple[str, int]:
    return str(row.get("question_id")), row.get("run", 0)
