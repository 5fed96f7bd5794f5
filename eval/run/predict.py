"""Asking a model all questions of a benchmark: in batches, appended as they come, resumable.

An answer file belongs to one model and one question list. Each line is flushed when its batch is
done; a line that a kill cut in half is cut off on the next start, and every question whose key is in
the file is not asked again: no answer is lost or duplicated.
"""

import json
import logging
import math
import os
import random
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import suppress
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llava_jax.errors import counted
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.questions import Question
from llava_jax.eval.run.identity import ELSEWHERE, Digests
from llava_jax.eval.run.model import agree
from llava_jax.util import write_text

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

logger = logging.getLogger(__name__)
Images = dict[str, tuple[Path | bytes, ...]]  # by the key of a question
HOPELESS = 32  # requests after which a run stops where not one was answered


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Writes questions as LLaVA's question files are (question_id, image, text, category).

    Raises DataError for what they have no form for: a picture that is no file, and a second one."""
    lines = []
    for q in questions:
        if any(isinstance(image, bytes) for image in q.images[:1]):
            raise DataError(f"question {q.key}: its image is inside the benchmark's table")
        if len(q.images) > 1:
            what = f"question {q.key}: has {len(q.images)} pictures"
            raise DataError(f"{what}, and a question of LLaVA's files has one at most")
        row = {"question_id": q.record.get("question_id", q.key)}
        row |= {"image": q.images[0]} if q.images else {}
        row |= {"text": q.prompt, "category": q.record.get("category", "default")}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(lines))


def choose(
    questions: Sequence[Question],
    *,
    limit: int | None = None,
    shuffle_seed: int | None = None,
    chunk: tuple[int, int] = (0, 1),
    group_of: Callable[[Question], str] = lambda q: q.key,
) -> list[Question]:
    """The part of the questions to ask: shuffled first, then limited, then cut into chunks of
    ceil(n / parts) as LLaVA's scripts do.

    Args:
      limit: at most so many, in whole groups (one group at least): half of an MME pair or of an
        MMBench rotation would be a wrong answer.
      group_of: the group that a question is scored in.
    Raises:
      DataError: two questions have one key.
    """
    key, count = next(iter(Counter(q.key for q in questions).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(f"two questions have the key {key!r}")
    groups: dict[str, list[Question]] = {}
    for q in questions:
        groups.setdefault(group_of(q), []).append(q)
    order = list(groups)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(order)
    chosen: list[Question] = []
    for group in order:
        if limit is not None and chosen and len(chosen) + len(groups[group]) > limit:
            break
        chosen += groups[group]
    if shuffle_seed is None:
        taken = {q.key for q in chosen}
        chosen = [q for q in questions if q.key in taken]  # rotations stay where they were
    index, parts = chunk
    size = math.ceil(len(chosen) / parts)
    return chosen[index * size : (index + 1) * size]


def length_buckets(questions: Sequence[Question], batch: int) -> Iterator[list[Question]]:
    """Batches of questions of like length, longest first: a model then meets its largest shapes at
    once and runs few others. Questions with different numbers of images are never mixed.

    Args:
      batch: size of all batches but the last of each number of images.
    """
    # Stable: questions of one length keep their order, whatever was done before a restart.
    ordered = sorted(questions, key=lambda q: (-len(q.images), -len(q.prompt)))
    for _, same in groupby(ordered, key=lambda q: len(q.images)):
        while group := list(islice(same, batch)):
            yield group


class Line(NamedTuple):
    """A line of an answer file: its text, the digest of the question as it was asked, why there is no
    answer, if so, the model's name in the server's reply, and what was sent otherwise than asked."""

    text: str
    asked: str
    error: str
    served: str
    sent: dict[str, Any]


def answered_lines(path: Path, repair: bool = True) -> dict[str, Line]:
    """Key -> each answer in `path`; cuts off a last line that was not written to its end
    (only reads past it without `repair`).

    Raises:
      AnswerError: another line is broken or has no key, or the last one cannot be the start of one of ours:
        the file is then left as it is.
    """
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    lines: dict[str, Line] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            known, text = json.loads(line)["metadata"], line.decode()
            key, sent = known["key"], dict(known.get("sent") or {})
            hash(key)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise _foreign(path, number) from None
        if key in lines:
            what = f"{path} line {number}: {key!r} is answered a second time"
            raise AnswerError(what, fix="take one of the two lines out")
        more = {name: str(known.get(name) or "") for name in ("asked", "error", "served")}
        lines[key] = Line(text, sent=sent, **more)
    if rest := raw[len(whole) :]:
        if not _may_be_cut_off(rest):
            raise _foreign(path, whole.count(b"\n") + 1)
        if repair:
            logger.warning("%s: dropped a line that was cut off", path)
            with open(path, "r+b") as f:
                f.truncate(len(whole))
    return lines


def _foreign(path: Path, number: int) -> AnswerError:
    what = f"{path} line {number}: not an answer of this command"
    return AnswerError(what, fix="move the file away")


def _may_be_cut_off(rest: bytes) -> bool:
    """Whether a last line without its end may be the beginning of one of ours."""
    try:
        return "key" in json.loads(rest)["metadata"]
    except (KeyError, TypeError):  # a whole row of another kind
        return False
    except (ValueError, RecursionError):
        return rest[:2] == b'{"'[: len(rest)]


def image_paths(question: Question, folders: Sequence[Path]) -> tuple[Path | bytes, ...]:
    """The images of a question, found in one of `folders`; raises DataError naming what is missing, or
    lies outside of them: a data set must not have any file of this machine sent to a server."""
    found: list[Path | bytes] = []
    roots = [os.path.abspath(f) for f in folders]
    for image in question.images:
        if isinstance(image, bytes):
            found.append(image)
            continue
        names = [image] if Path(image).suffix else [image, f"{image}.jpg", f"{image}.png"]
        path = next((f / n for f in folders for n in names if (f / n).is_file()), None)
        if path and not any(Path(os.path.abspath(path)).is_relative_to(root) for root in roots):
            what = f"question {question.key}: the image {image!r} is outside of its folder"
            raise DataError(what, fix="--images names the image folder")
        if path is None:
            where = f"question {question.key}: no image {image!r} in {', '.join(map(str, folders))}"
            raise DataError(where, fix="--images names the image folder")
        found.append(path)
    return tuple(found)


def predict(
    model: "LlavaModel",
    questions: Sequence[Question],
    out: Path,
    *,
    model_id: str,
    max_new_tokens: int,
    batch: int,
    folders: Sequence[Path],
    digests: Digests | None = None,
    others: Sequence[Path] = (),
    progress: Callable[[int], Any] = lambda n: None,
    writes: bool = True,
) -> int:
    """Asks what is not in `out` yet, greedily, and appends the answers; returns how many were asked.

    A question without an answer (a corrupt picture, a request that a server refuses, a reply without
    text) gets an empty row that says why. It counts as missing, and the next run asks it again.

    Args:
      out: LLaVA's answer jsonl: question_id, prompt, …, text, answer_id, model_id, metadata.
      others: answer files of other parts of the run: what is in them is not asked either.
      folders: where images may lie, in order.
      progress: receives the number of answers after each batch.
      writes: whether this process writes; the hosts of one mesh all ask, and one writes.
    Raises:
      DataError: an image is missing (before anything is asked).
      AnswerError: the file is not ours, its answers are to other prompts, about other pictures or of
        another model at the same address, or not one request was answered.
    """
    digests = digests or Digests()
    done = answered_lines(out, repair=writes)
    if writes:
        done = _still_true(out, done, questions, folders, digests)
    for other in others:
        done = answered_lines(other, repair=False) | done
    answered = agree([q.key in done for q in questions])
    todo = [q for q, is_answered in zip(questions, answered) if not is_answered]
    found = {q.key: image_paths(q, folders) for q in todo}
    progress(len(questions) - len(todo))
    out.parent.mkdir(parents=True, exist_ok=True)
    served, answers, error = {line.served for line in done.values()}, sum(answered), ""
    with open(out if writes else os.devnull, "a", encoding="utf-8") as f:
        for n, group in enumerate(length_buckets(todo, batch), 1):
            rows = _ask(model, group, found, digests, model_id, max_new_tokens)
            known = [row["metadata"] for row in rows]
            served |= {m.get("served", "") for m in known}
            check_served(served, out)
            f.write("".join(json.dumps(row) + "\n" for row in rows))  # ASCII: never half a letter
            f.flush()
            progress(len(group))
            answers += sum("error" not in m for m in known)
            error = next((m["error"] for m in known if "error" in m), error)
            if not answers and n * batch >= HOPELESS:
                break
    if writes:
        digests.save()
    if todo and not answers:
        raise AnswerError(f"{out}: not one question was answered: {error}")
    return len(todo)


def check_asked(
    out: Path, done: dict[str, Line], asked: Sequence[Question], folders: Sequence[Path], digests: Digests
) -> None:  # fmt: skip
    """Raises AnswerError where a question or a picture changed under its answer in `done`, those of the
    file `out`; of pictures that are no longer there nothing is known."""
    changed = []
    for q in (q for q in asked if q.key in done and not done[q.key].error):
        with suppress(DataError):
            if digests.of(q, image_paths(q, folders)) != done[q.key].asked:
                changed.append(q.key)
    if changed:
        what = f"{counted(len(changed), 'answer')} to another prompt or about other pictures than"
        raise AnswerError(f"{out}: {what} are there now, first {changed[0]!r}", fix=ELSEWHERE)


def _still_true(
    out: Path, done: dict[str, Line], asked: Sequence[Question], folders: Sequence[Path], digests: Digests
) -> dict[str, Line]:  # fmt: skip
    """The answers in `done`, compared with what is asked now; rows that say why there is none are taken
    out, to be asked again."""
    check_asked(out, done, asked, folders, digests)
    if again := {q.key for q in asked if q.key in done and done[q.key].error}:
        done = {key: line for key, line in done.items() if key not in again}
        write_text(out, "".join(f"{line.text}\n" for line in done.values()))
    return done


def _ask(
    model: "LlavaModel", group: Sequence[Question], found: Images, digests: Digests, model_id: str, most: int
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of a batch. A user's turn is the images, one per line, and then the prompt: "<image>\\n" and
    the question, as in LLaVA's evaluation."""
    from llava_jax.generate.request import Request

    requests = [Request(q.prompt, found[q.key], max_new_tokens=most) for q in group]
    replies = model.generate_batch(requests, batch_size=len(requests), on_error="reply")
    rows = []
    for q, reply in zip(group, replies, strict=True):
        known = {"key": q.key, "asked": digests.of(q, found[q.key])}
        told = {name: getattr(reply, name, None) for name in ("error", "served", "sent")}
        known |= {name: value for name, value in told.items() if value}
        if told["error"]:
            logger.warning("question %s: no answer: %s", q.key, told["error"])
        ids = {"answer_id": uuid.uuid4().hex[:22], "model_id": model_id, "metadata": known}
        rows.append({**q.record, "text": reply.text, **ids})
    return rows


def check_served(names: Set[str], out: Path) -> None:
    """Raises AnswerError where a server's replies, which name their model, are of several."""
    if len(names - {""}) > 1:
        what = f"{out}: an address answers as several models: {', '.join(sorted(names - {''}))}"
        raise AnswerError(what, fix=ELSEWHERE)


def merge(parts: Sequence[Path], questions: Sequence[Question], out: Path) -> dict[str, Line]:
    """Joins the answer files of several processes, in the order of the questions; returns them.

    Raises:
      AnswerError: two files answer the same question, or are of different models.
    """
    lines: dict[str, Line] = {}
    for part in parts:
        found = answered_lines(part)
        if again := next((key for key in found if key in lines), None):
            raise AnswerError(f"{part}: {again!r} is answered in another part as well")
        lines |= found
    check_served({line.served for line in lines.values()}, out)
    if unknown := lines.keys() - {q.key for q in questions}:
        what = f"{counted(len(unknown), 'answer')} to questions that are not in the benchmark"
        raise AnswerError(f"{out.parent}: {what}, such as {min(unknown)!r}", fix=ELSEWHERE)
    write_text(out, "".join(f"{lines[q.key].text}\n" for q in questions if q.key in lines))
    return lines
