"""Benchmarks that are a list of items and a rule: most of today's, and those from outside.

A subclass says where its rows are (`files`), what an item is of a row (`item`), and by which rule its
answer is read. Scores of groups (both questions of a pair right) come from `Item.group`.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava_jax.errors import LlavaError, counted
from llava_jax.eval import truths
from llava_jax.eval.answers import Joined
from llava_jax.eval.errors import AnswerError, DataError, NoTruthError
from llava_jax.eval.files import find_all, read_rows
from llava_jax.eval.questions import LETTER, Question, question
from llava_jax.eval.rules import LETTERS, RULES
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent

_SHARD = re.compile(r"(.*?)-?(\d+)-of-(\d+)")


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its truth.

    prompt: all that the user says. truth: what the rule compares with; None where only a server has
    it. options: texts of the options. groups: kind of group -> the item's, for tables. group: what is
    right only as a whole. images: as in Question.
    """

    key: str
    prompt: str
    truth: Any
    images: tuple[str | bytes, ...] = ()
    options: tuple[str, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    group: str = ""


class SimpleTask(Task):
    """A benchmark by its rows."""

    headline = "accuracy"
    rule: ClassVar[str] = "exact"  # a name of RULES; or `read` is written anew
    files: ClassVar[tuple[str, ...]] = ()  # globs in the data folder, all of whose matches are read
    inside: ClassVar[str] = ""  # key of a .json file under which the rows are
    takes_split = True  # part of the names of `files`
    id_keys = ("question_id", "questionId", "id", "index")
    parts: ClassVar[tuple[str, int]] = ("", 0)  # a group, and how many values the whole set has
    macro: ClassVar[str] = ""  # the headline is the mean over the values of this group
    shares: ClassVar[dict[str, float] | None] = None  # value -> its part of it; equal by default

    def item(self, row: dict[str, Any], number: int) -> Item | None:
        """The item of a row (number: from 1, of all files), or None for a row that is none."""
        raise NotImplementedError

    def judged(self, text: str, item: Item) -> tuple[float, Any]:
        """(score from 0 to 1, what was read) of an answer."""
        return RULES[self.rule](text, item.truth, item.options)

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Item]:
        """All items, in the order of the files; raises DataError for none, or for one key twice."""
        found: dict[str, Item] = {}
        for number, (path, line, row) in enumerate(self.rows(data, settings), 1):
            where = f"{path} row {line}"
            try:
                item = self.item(row, number)
                images = item.images if item is not None else ()
                if not all(isinstance(i, str | bytes) and i for i in images):
                    raise ValueError("a picture is neither a name nor bytes")
            except LlavaError:
                raise
            except Exception as e:  # whatever a task from outside raises
                kind = "no " if isinstance(e, KeyError) else f"{type(e).__name__}: "
                what = str(e) if type(e) is ValueError else f"{kind}{e}"
                raise DataError(f"{where}: not a row of {self.title} ({what})") from None
            if item is not None and item.key in found:
                raise DataError(f"{where}: a second item {item.key!r}")
            found |= {item.key: item} if item is not None else {}
        if not found:
            raise DataError(f"{data}: no question of {self.title} in it")
        return list(found.values())

    def rows(self, data: Path, settings: TaskSettings) -> Iterator[tuple[Path, int, Any]]:
        """(file, number, row) of all files of the split."""
        for path in self.paths(data, settings):
            for number, row in read_rows(path, inside=self.inside):
                yield path, number, row

    def paths(self, data: Path, settings: TaskSettings) -> list[Path]:
        """The files of the split: those of the first of `files` that fits any."""
        return self.matching(data, self.files, settings)

    def matching(self, data: Path, files: Sequence[str], settings: TaskSettings) -> list[Path]:
        """What fits the first pattern that fits any, in `data` or one folder below; raises DataError
        for nothing, or for several such folders."""
        if data.is_file():
            return [data]
        found = find_all(data, [place for p in files for place in (p, f"*/{p}")], settings.split)
        folders = {str(p.parent.relative_to(data)) for p in found}
        if len(folders) > 1 and not any(
            found[0].relative_to(data).match(p) for p in files if "/" in p
        ):
            what = f"{data}: questions are in several folders: {', '.join(sorted(folders))}"
            raise DataError(what, fix="--data names one of them")
        if found:
            shards(found)
            return found
        where = f" for split {settings.split!r}" if settings.split else ""
        what = " or ".join(files)
        fix = self.data_files if self.data_files != what else None
        raise DataError(f"{data}{where}: no {what}", fix=fix)

    def lacks(self, data: Path, settings: TaskSettings, items: list[Item]) -> str:
        """What of the whole set is known not to be in the data, "" for nothing."""
        reasons = [
            f"{len(numbers)} of the {int(count)} files {name}-*-of-{count} are there"
            for name, (count, numbers) in shards(self.paths(data, settings)).items()
            if len(numbers) < int(count)
        ]
        kind, whole = self.parts
        if kind and len(values := dict.fromkeys(i.groups[kind] for i in items)) < whole:
            some = ", ".join([*values][:5])
            reasons.append(f"{len(values)} of the set's {whole} values of {kind} are there: {some}")
        return "; ".join(reasons)

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        for i in self.items(data, settings):
            more: dict[str, Any] = {"options": list(i.options)} if i.options else {}
            more |= {"group": i.group} if i.group else {}
            questions.append(question(i.key, i.prompt, *i.images, **more))
        return questions

    def group_of(self, question: Question) -> str:
        return str(question.record.get("group") or question.key)

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        items = self.items(data, settings)
        by_rule = type(self).judged is SimpleTask.judged
        absent = [i for i in items if i.truth is None or (by_rule and truths.hidden(i.truth))]
        if absent:
            what = f"{data}: {len(absent)} of {len(items)} questions have no answers, first"
            raise NoTruthError(f"{what} {absent[0].key} (such a split is scored by a server)")
        end = self.lacks(data, settings, items)
        how = {"open_end": end, **asked_of(items)}
        joined, coverage = self.join([i.key for i in items], answers, settings, **how)
        samples = {i.key: self._sample(i, joined) for i in items}
        return self.result(items, samples, Result(self, {}, samples, coverage))

    def result(self, items: list[Item], samples: dict[str, Sample], result: Result) -> Result:
        """Fills in totals and tables; a benchmark with a formula of its own overrides it."""
        scores = list(samples.values())
        self.weigh(scores)
        result.totals[self.headline] = weighted(scores)
        if self.macro:
            result.totals["mean_over_questions"] = percent(s.score for s in scores)
        result.totals["n"] = len(scores)
        for kind in dict.fromkeys(k for i in items for k in i.groups):
            result.tables[f"per {kind}"] = by_group(scores, kind)
        if any(i.group for i in items):
            right = groups_right(samples)
            result.totals["group_accuracy"] = percent(map(float, right.values()))
            result.totals["groups"] = len(right)
        if unread := sum(s.parsed == "Z" for s in scores):
            result.notes.append(f"{counted(unread, 'answer')} without an option")
        return result

    def weigh(self, samples: Sequence[Sample]) -> None:
        if self.macro:
            weigh(samples, self.macro, self.shares)

    def _sample(self, item: Item, joined: Joined) -> Sample:
        text, there = joined.text(item.key), item.key in joined
        try:
            score, parsed = self.judged(text, item) if there else (0.0, "missing")
            if not 0 <= score <= 1:
                raise ValueError(f"the score {score} is not from 0 to 1")
        except LlavaError:
            raise
        except Exception as e:  # whatever a task from outside raises
            what = f"{type(e).__name__}: {' '.join(str(e).split())}"
            raise AnswerError(f"{self.name}, question {item.key}: cannot be scored ({what})") from e
        image = next(iter(item.images), "")
        if isinstance(image, bytes):  # the same picture is one unit of the interval
            image = f"sha256:{hashlib.sha256(image).hexdigest()[:16]}"
        groups = item.groups | ({"group": item.group} if item.group else {})
        return Sample(score, text, item.truth, parsed, item.prompt, image, groups)


def shards(paths: Iterable[Path]) -> dict[str, tuple[str, set[str]]]:
    """Of files NAME-00000-of-00006, …: NAME -> how many there should be, and those that are there.

    Raises DataError where the counts differ: the rows of two downloads would be read twice."""
    found: dict[str, tuple[str, set[str]]] = {}
    for path in paths:
        if shard := _SHARD.match(path.name):
            name = str(path.parent / shard[1])
            count, numbers = found.setdefault(name, (shard[3], set()))
            if count != shard[3]:
                what = f"{name}: files of two downloads, -of-{count} and -of-{shard[3]}"
                raise DataError(what, fix="keep those of one")
            numbers.add(shard[2])
    return found


def asked_of(items: Iterable[Item]) -> dict[str, Any]:
    """What `answers.join` compares answers with: the items' pictures and prompts."""
    images = {i.key: [x for x in i.images if isinstance(x, str)] for i in items}
    return {"images": images, "asked": {i.key: i.prompt for i in items}}


def weigh(scores: Sequence[Sample], kind: str, share: dict[str, float] | None = None) -> None:
    """Gives samples the weights by which their mean is that of the means of a group's values.

    share: value -> its part of the headline; equal parts by default.
    """
    sizes: dict[str, int] = {}
    for s in scores:
        sizes[s.groups[kind]] = sizes.get(s.groups[kind], 0) + 1
    for s in scores:
        value = s.groups[kind]
        s.details["weight"] = (share[value] if share else 1.0) / sizes[value]


def weighted(scores: list[Sample]) -> float:
    """The mean in percent, by the samples' weights."""
    weights = [s.details.get("weight", 1.0) for s in scores]
    return 100 * sum(w * s.score for w, s in zip(weights, scores)) / sum(weights)


def groups_right(samples: dict[str, Sample], kind: str = "group") -> dict[str, bool]:
    """Value of a group -> whether every answer of it is right, in order of appearance."""
    return {k: row["score"] == 100.0 for k, row in by_group(samples.values(), kind).items()}


def choices(question: str, options: tuple[str, ...] | list[str], suffix: str = LETTER) -> str:
    """A question and its options, a line each ("A. …"), as LLaVA-1.5 is asked (paper, Table 8)."""
    lines = [question, *(f"{c}. {o}" for c, o in zip(LETTERS, options))]
    return "\n".join(lines) + suffix
