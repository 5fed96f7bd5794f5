"""Answer files: read, joined to the benchmark's questions by id, and accounted for.

Owners' scripts put answers into a dict or zip them to the labels, so a missing, doubled or foreign
row changes the number without a word (POPE's random split drops to 50.2 % when the label file has
90 more rows). Here every row is counted: what is missing scores zero and is listed, the last of
doubled rows counts (as in LLaVA's scripts) and is listed, an answer to nothing is listed.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import AnswerError
from llava_jax.eval.files import read_rows, text_of

ID_KEYS = ("question_id", "questionId", "id", "index", "image")
TEXT_KEYS = ("text", "prediction", "answer", "caption")


@dataclass(slots=True)
class Answer:
    """One row: its id (always str), the answer text, its line in the file, and the whole row."""

    id: str
    text: str
    line: int
    row: dict[str, Any]


@dataclass
class AnswerFile:
    """All rows of an answer file in file order; `bad_lines` are those that were not readable."""

    path: Path
    rows: list[Answer]
    bad_lines: list[int] = field(default_factory=list)


@dataclass
class Coverage:
    """How the answers cover the questions, in the benchmark's ids. doubled: id -> lines; unknown:
    id -> line. missing_left_out: missing ones are not in the score at all (reviews, captions)."""

    expected: int = 0
    answered: int = 0
    missing: list[str] = field(default_factory=list)
    doubled: dict[str, list[int]] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    bad_lines: list[int] = field(default_factory=list)
    missing_left_out: bool = False

    @property
    def clean(self) -> bool:
        return not (self.missing or self.doubled or self.unknown or self.bad_lines)

    def lines(self) -> list[str]:
        """One sentence for each thing that is not as it should be."""
        out = []
        if self.missing:
            how = "are left out" if self.missing_left_out else "count as wrong"
            out.append(
                f"{len(self.missing)} of {self.expected} questions have no answer and {how}: "
                f"{_some(self.missing)}"
            )
        if self.doubled:
            shown = [f"{i} (lines {_some(map(str, n))})" for i, n in self.doubled.items()]
            out.append(f"{len(self.doubled)} ids answered twice, the last counts: {_some(shown)}")
        if self.unknown:
            shown = [f"{i} (line {n})" for i, n in self.unknown.items()]
            out.append(f"{len(self.unknown)} answers belong to no question: {_some(shown)}")
        if self.bad_lines:
            out.append(
                f"{len(self.bad_lines)} lines are unreadable: {_some(map(str, self.bad_lines))}"
            )
        return out

    def to_json(self) -> dict[str, Any]:
        return {
            "expected": self.expected,
            "answered": self.answered,
            "missing": len(self.missing),
            "doubled": len(self.doubled),
            "unknown": len(self.unknown),
            "bad_lines": len(self.bad_lines),
            "details": self.lines(),
        }


def _some(items: Iterable[str], limit: int = 5) -> str:
    items = list(items)
    return ", ".join(items[:limit]) + (", …" if len(items) > limit else "")


def read_answers(
    path: Path,
    *,
    id_keys: tuple[str, ...] = ID_KEYS,
    text_keys: tuple[str, ...] = TEXT_KEYS,
    skip_bad_lines: bool = False,
    empty_is_none: bool = False,
) -> AnswerFile:
    """Reads an answer file of any of the kinds of `files.read_rows`.

    Args:
      id_keys, text_keys: fields that may hold the id and the answer; the first present is used.
      skip_bad_lines: note unreadable jsonl lines instead of raising.
      empty_is_none: an absent or null answer is "" (spreadsheets) instead of an error.
    Raises:
      AnswerError: naming the file and the line.
    """
    bad: list[int] = []
    rows = read_rows(path, error=AnswerError, bad_lines=bad if skip_bad_lines else None)
    if not rows:
        raise AnswerError(f"{path}: no answers in it")
    answers = []
    for line, row in rows:
        id_key = next((k for k in id_keys if row.get(k) is not None), None)
        if id_key is None:
            raise AnswerError(f"{path} line {line}: no id; expected one of {', '.join(id_keys)}")
        where = f"{path} line {line}, {id_key} {row[id_key]!r}"
        text_key = next((k for k in text_keys if k in row), None)
        if text_key is None:
            if not empty_is_none:
                raise AnswerError(f"{where}: no answer; expected one of {', '.join(text_keys)}")
            text = ""
        elif row[text_key] is None and empty_is_none:
            text = ""
        else:
            text = text_of(row[text_key], where)
        answers.append(Answer(as_id(row[id_key], where), text, line, row))
    return AnswerFile(path, answers, bad)


def as_id(value: Any, where: str = "id") -> str:
    """An id as text: 5, "5" and 5.0 (a spreadsheet's) are the same id."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise AnswerError(f"{where}: an id must be text or a whole number")


def join(
    ids: Iterable[str],
    answers: AnswerFile,
    *,
    images: Mapping[str, str] | None = None,
    strict: bool = False,
) -> tuple[dict[str, Answer], Coverage]:
    """The answer of each id, and how the file covers them.

    Args:
      ids: the benchmark's ids, unique, in order.
      images: id -> image name; an answer row that names another image raises.
      strict: raise where anything is missing, doubled, unknown or unreadable.
    Raises:
      AnswerError: not one id fits, or an answer names the wrong image.
    """
    wanted = dict.fromkeys(ids)
    joined: dict[str, Answer] = {}
    coverage = Coverage(expected=len(wanted), bad_lines=answers.bad_lines)
    for a in answers.rows:
        if a.id not in wanted:
            coverage.unknown.setdefault(a.id, a.line)
            continue
        if a.id in joined:
            coverage.doubled.setdefault(a.id, [joined[a.id].line]).append(a.line)
        if images and a.row.get("image") not in (None, images.get(a.id)):
            raise AnswerError(
                f"{answers.path} line {a.line}, id {a.id}: the answer is for image "
                f"{a.row['image']!r}, the question's is {images[a.id]!r}"
            )
        joined[a.id] = a
    if not joined:
        sample, own = answers.rows[0].id, next(iter(wanted), "none at all")
        raise AnswerError(
            f"{answers.path}: none of its {len(answers.rows)} ids is in the benchmark "
            f"(file: {sample!r}, benchmark: {own!r})"
        )
    coverage.answered = len(joined)
    coverage.missing = [i for i in wanted if i not in joined]
    check(answers.path, coverage, strict)
    return joined, coverage


def check(path: Path, coverage: Coverage, strict: bool) -> None:
    """Raises if `strict` and the coverage is not clean."""
    if strict and not coverage.clean:
        raise AnswerError(f"{path}: {'; '.join(coverage.lines())}")
