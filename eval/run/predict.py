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
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.questions import Question
from llava_jax.eval.run.model import agree
from llava_jax.util import write_text

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

logger = logging.getLogger(__name__)


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Writes questions as LLaVA's question files are (question_id, image, text, category)."""
    lines = []
    for q in questions:
        row = {"question_id": q.record.get("question_id", q.key)}
        if q.images:
            if isinstance(q.images[0], bytes):
                raise DataError(f"question {q.key}: its image is inside the benchmark's table")
            row["image"] = q.images[0]
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
) -> list[Question]:
    """The part of the questions to ask: shuffled first, then limited, then cut into chunks of
    ceil(n / parts) as LLaVA's scripts do.

    Raises:
      DataError: two questions have one key.
    """
    key, count = next(iter(Counter(q.key for q in questions).most_common(1)), ("", 0))
    if count > 1:
        raise DataError(f"two questions have the key {key!r}")
    chosen = list(questions)
    if shuffle_seed is not None:
        random.Random(shuffle_seed).shuffle(chosen)
    chosen = chosen[:limit]
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
        group = list(same)
        for start in range(0, len(group), batch):
            yield group[start : start + batch]


def answered_lines(path: Path, repair: bool = True) -> dict[str, str]:
    """Key -> line of each answer in `path`; cuts off a last line that was not written to its end
    (only reads past it without `repair`).

    Raises:
      AnswerError: another line is broken or has no key, or the last one cannot be the start of one of ours:
        the file is then left as it is.
    """
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    lines: dict[str, str] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            key, text = json.loads(line)["metadata"]["key"], line.decode()
        except (ValueError, KeyError, TypeError):
            raise _foreign(path, number) from None
        if key in lines:
            raise AnswerError(f"{path} line {number}: {key!r} is answered a second time")
        lines[key] = text
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
    except ValueError:
        return rest[:2] == b'{"'[: len(rest)]


def image_paths(question: Question, folders: Sequence[Path]) -> tuple[Path | bytes, ...]:
    """The images of a question, found in one of `folders`; raises DataError naming what is missing."""
    found: list[Path | bytes] = []
    for image in question.images:
        if isinstance(image, bytes):
            found.append(image)
            continue
        names = [image] if Path(image).suffix else [image, f"{image}.jpg", f"{image}.png"]
        path = next((f / n for f in folders for n in names if (f / n).is_file()), None)
        if path is None:
            where = ", ".join(map(str, folders))
            raise DataError(
                f"question {question.key}: no image {image!r} in {where}",
                fix="--images names the image folder",
            )
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
    progress: Callable[[int], Any] = lambda n: None,
    writes: bool = True,
) -> int:
    """Asks what is not in `out` yet, greedily, and appends the answers; returns how many were asked.

    Args:
      out: LLaVA's answer jsonl: question_id, prompt, …, text, answer_id, model_id, metadata.
      folders: where images may lie, in order.
      progress: receives the number of answers after each batch.
      writes: whether this process writes; the hosts of one mesh all ask, and one writes.
    Raises:
      DataError: an image is missing (before anything is asked).
      AnswerError: the file is not ours.
    """
    from llava_jax.model import Request

    done = answered_lines(out, repair=writes)
    answered = agree([q.key in done for q in questions])
    todo = [q for q, is_answered in zip(questions, answered) if not is_answered]
    found = {q.key: image_paths(q, folders) for q in todo}
    progress(len(questions) - len(todo))
    if writes:
        out.parent.mkdir(parents=True, exist_ok=True)
    with open(out if writes else os.devnull, "a", encoding="utf-8") as f:
        for group in length_buckets(todo, batch):
            # A user's turn is the images, one per line, and then the prompt: "<image>\n" and the
            # question, as in LLaVA's evaluation.
            asked = [Request(q.prompt, found[q.key], max_new_tokens=max_new_tokens) for q in group]
            replies = model.generate_batch(asked, batch_size=len(asked))
            answers = zip(group, replies, strict=True)
            f.write("".join(_line(q, reply.text, model_id) for q, reply in answers))
            f.flush()
            progress(len(group))
    return len(todo)


def _line(q: Question, text: str, model_id: str) -> str:
    ids = {"answer_id": uuid.uuid4().hex[:22], "model_id": model_id, "metadata": {"key": q.key}}
    row = {**q.record, "text": text, **ids}
    # Escaped (ensure_ascii), so that a cut-off line can never be half a character.
    return json.dumps(row) + "\n"


def merge(parts: Sequence[Path], questions: Sequence[Question], out: Path) -> None:
    """Joins the answer files of several processes, in the order of the questions.

    Raises:
      AnswerError: two files answer the same question.
    """
    lines: dict[str, str] = {}
    for part in parts:
        found = answered_lines(part)
        if again := next((key for key in found if key in lines), None):
            raise AnswerError(f"{part}: {again!r} is answered in another part as well")
        lines |= found
    write_text(out, "".join(f"{lines[q.key]}\n" for q in questions if q.key in lines))
