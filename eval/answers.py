"""Answer files: read, joined to the benchmark's questions by id, and accounted for.

Owners' scripts put answers into a dict or zip them to the labels, so a missing, duplicated or foreign
row changes the number silently (POPE's random split drops to 50.2 % when the label file has 90 more
rows). Here every row is accounted for: a missing answer is a wrong one, of several answers to one
question the last counts (as in LLaVA's scripts), and both are listed, as are answers to unknown
questions. Where a number does otherwise, `Coverage.lines` says so.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from llava_jax.errors import counted
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import TABLES, read_rows
from llava_jax.eval.questions import same_question

ID_KEYS = ("question_id", "questionId", "id", "index", "image")
TEXT_KEYS = ("text", "answer", "caption")
# Where a row has one of these it is the model's, and `answer` beside it is the truth, as in the files of
# VLMEvalKit, MMMU, MathVista, OCRBench and HallusionBench.
MODELS = ("prediction", "response", "predict", "model_prediction")
_OF_DATA = ("options", "choices", "Options", "A")  # a lone `answer` beside one may be the truth


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

    def with_ids(self, id_of: Callable[[Answer], str]) -> "AnswerFile":
        """The same answers under other ids, where an owner's file does not carry the benchmark's."""
        return replace(self, rows=[replace(a, id=id_of(a)) for a in self.rows])


class Joined(dict[str, Answer]):
    """Question id -> its answer; questions without one are absent."""

    def text(self, key: str) -> str:
        """The answer to a question, "" if there is none."""
        return self[key].text if key in self else ""


@dataclass
class Coverage:
    """How the answers cover the questions, in the benchmark's ids. duplicated: id -> lines; unknown:
    id -> line.

    missing_left_out: missing ones are not in the score at all (reviews, captions).
    left_out_of: names of the totals that leave missing ones out, where the others do not.
    all_rows_count: duplicated and unknown rows are in the score too (reviews).
    open_end: why it is not known how many questions there are, so that `expected` is only what was
      found; "" where it is.
    """

    expected: int = 0
    answered: int = 0
    missing: list[str] = field(default_factory=list)
    duplicated: dict[str, list[int]] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    bad_lines: list[int] = field(default_factory=list)
    missing_left_out: bool = False
    left_out_of: tuple[str, ...] = ()
    all_rows_count: bool = False
    open_end: str = ""

    def lines(self) -> list[str]:
        """One sentence per problem."""
        how = "are left out" if self.missing_left_out else "count as wrong"
        how += f" (left out of {', '.join(self.left_out_of)})" if self.left_out_of else ""
        which, also = "the last counts", ""
        if self.all_rows_count:
            which, also = "all count", ", which count too"
        duplicated = [f"{i} (lines {_some(n)})" for i, n in self.duplicated.items()]
        unknown = [f"{i} (line {n})" for i, n in self.unknown.items()]
        found = {
            f"{len(self.missing)} of {self.expected} questions have no answer and {how}": self.missing,
            f"{counted(len(duplicated), 'id')} answered more than once, {which}": duplicated,
            f"{counted(len(unknown), 'answer')} to unknown questions{also}": unknown,
            counted(len(self.bad_lines), "unreadable line"): self.bad_lines,
        }
        lines = [f"{what}: {_some(items)}" for what, items in found.items() if items]
        unknown = f"how many questions there are is not known: {self.open_end}"
        return [unknown, *lines] if self.open_end else lines

    def check(self, path: Path, strict: bool) -> None:
        """Raises AnswerError, where `strict`, for anything that `lines` names."""
        if strict and (problems := self.lines()):
            raise AnswerError(f"{path}: {'; '.join(problems)}")

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"expected": self.expected, "answered": self.answered}
        lists = ("missing", "duplicated", "unknown", "bad_lines")
        found |= {name: len(getattr(self, name)) for name in lists}
        found |= {"open_end": self.open_end} if self.open_end else {}
        return found | {"details": self.lines()}


def _some(items: Sequence[Any], limit: int = 5) -> str:
    return ", ".join(map(str, items[:limit])) + (", …" if len(items) > limit else "")


def read_answers(
    path: Path,
    *,
    id_keys: tuple[str, ...] = ID_KEYS,
    text_keys: tuple[str, ...] = TEXT_KEYS,
    inside: str = "",
    skip_bad_lines: bool = False,
    empty_is_none: bool = False,
) -> AnswerFile:
    """Reads an answer file of any of the kinds of `files.read_rows`; raises AnswerError naming the line.

    Args:
      id_keys: fields that may hold the id; the first present is used.
      text_keys: fields that may hold the answer, besides MODELS. Two that differ are an error.
      inside: see `files.read_rows`.
      skip_bad_lines: note unreadable jsonl lines instead of raising.
      empty_is_none: an absent or null answer is "" instead of an error; an empty cell of a table always is.
    """
    bad: list[int] = []
    how = {"error": AnswerError, "bad_lines": bad if skip_bad_lines else None}
    if not (rows := read_rows(path, inside=inside, **how)):
        raise AnswerError(f"{path}: no answers in it")
    answers = []
    for line, row in rows:
        known = row.get("metadata")
        if isinstance(known, dict) and known.get("error"):  # `eval` got no answer: it is missing
            continue
        if (id_key := next((k for k in id_keys if row.get(k) is not None), None)) is None:
            raise AnswerError(f"{path} line {line}: no id; expected one of {', '.join(id_keys)}")
        where = f"{path} line {line}, {id_key} {row[id_key]!r}"
        text_key = _answer_key(row, text_keys, where)
        value: Any = row[text_key] if text_key else None
        if text_key is None and not empty_is_none:
            names = ", ".join(dict.fromkeys((*text_keys, *MODELS[:2])))
            raise AnswerError(f"{where}: no answer; expected one of {names}")
        if value is None and (empty_is_none or path.suffix.lower() in TABLES):
            value = ""
        number = type(value) is int or (type(value) is float and math.isfinite(value))
        if not isinstance(value, str) and not number:
            raise AnswerError(f"{where}: the answer is {value!r}, not text")
        answers.append(Answer(as_id(row[id_key], where), str(value), line, row))
    if not answers:
        what = f"{path}: not one of its {counted(len(rows), 'question')} was answered"
        raise AnswerError(f"{what}: {rows[0][1]['metadata']['error']}")
    return AnswerFile(path, answers, bad)


def _answer_key(row: dict[str, Any], text_keys: tuple[str, ...], where: str) -> str | None:
    """The field of a row that is the model's answer, None where there is none."""
    keys = [k for k in MODELS if k in row] or [k for k in text_keys if k in row]
    if len(keys) > 1 and any(row[k] != row[keys[0]] for k in keys):
        what = f"{where}: {' and '.join(keys)} differ"
        raise AnswerError(what, fix="keep the model's answer alone")
    if keys == ["answer"] and (own := [k for k in _OF_DATA if k in row]):
        what = f"{where}: its answer stands beside {own[0]} and may be the benchmark's own"
        raise AnswerError(what, fix="name the model's answer prediction")
    return keys[0] if keys else None


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
    scored: Iterable[str] | None = None,
    images: Mapping[str, Sequence[str]] | None = None,
    asked: Mapping[str, str] | None = None,
    leaves_out: bool = False,
    strict: bool = False,
    **how: Any,
) -> tuple[Joined, Coverage]:
    """The answer to each question, and how the file covers the questions.

    Args:
      ids: the benchmark's ids, unique, in order.
      scored: those of them that must be answered; all by default.
      images, asked: id -> names of its pictures, and its question; an answer row that names another
        picture, prompt or question raises.
      leaves_out: questions without an answer are not in the score (reviews, captions).
      strict: raise where anything is missing, duplicated, unknown or unreadable.
      how: left_out_of, all_rows_count, open_end, see Coverage.
    Raises:
      AnswerError: not one id fits, they are numbered from 0 where the benchmark counts from 1, or an
        answer is for another picture or question. DataError: there is nothing to score.
    """
    wanted, joined = dict.fromkeys(ids), Joined()
    scored = list(wanted) if scored is None else list(scored)
    if not scored:  # 0 of nothing
        raise DataError(f"{answers.path}: the benchmark's data hold no question to score it by")
    how |= {"bad_lines": answers.bad_lines, "missing_left_out": leaves_out}
    coverage = Coverage(len(scored), **how)
    for a in answers.rows:
        if a.id not in wanted:
            coverage.unknown.setdefault(a.id, a.line)
            continue
        if a.id in joined:
            coverage.duplicated.setdefault(a.id, [joined[a.id].line]).append(a.line)
        names, question = (images or {}).get(a.id, ()), (asked or {}).get(a.id, "")
        if wrong := _of_another(a.row, names, question):
            own = f"{', '.join(names) or 'a picture'} and {question[:60]!r}"
            what = f"the answer is for {wrong}, not for {own}"
            raise AnswerError(f"{answers.path} line {a.line}, id {a.id}: {what}")
        joined[a.id] = a
    if not joined:
        what = f"none of its {len(answers.rows)} ids is in the benchmark"
        sample, own = answers.rows[0].id, next(iter(wanted), "none at all")
        raise AnswerError(f"{answers.path}: {what} (file: {sample!r}, benchmark: {own!r})")
    if "0" in coverage.unknown and next(iter(wanted)) == "1":
        what = f"{answers.path}: its ids begin at 0; those of the benchmark at 1"
        raise AnswerError(what, fix="write the ids of llava-jax eval questions")
    coverage.missing = [i for i in scored if i not in joined]
    coverage.answered = coverage.expected - len(coverage.missing)
    coverage.check(answers.path, strict)
    return joined, coverage


def _of_another(row: Mapping[str, Any], images: Sequence[str], question: str) -> str:
    """What of an answer's row names another picture or question, "" for nothing."""
    image, stems = row.get("image"), [PurePath(name).stem for name in images]
    if stems and isinstance(image, str) and len(image) < 300 and PurePath(image).stem not in stems:
        return f"image {image!r}"
    for name in ("prompt", "question") if question else ():
        said = row.get(name)
        if isinstance(said, str) and question not in said and not same_question(said, question):
            return f"{name} {said[:60]!r}"
    return ""
