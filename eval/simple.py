"""Benchmarks that are a list of items and a rule: most of today's, and those from outside.

A subclass says where its rows are (`files`), what an item is of a row (`item`), and by which rule its
answer is read. Scores of groups (both questions of a pair right) come from `Item.group`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from llava_jax.errors import counted
from llava_jax.eval.answers import Joined
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import read_rows
from llava_jax.eval.questions import LETTER, Question, question
from llava_jax.eval.rules import LETTERS, RULES
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent


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
    id_keys = ("question_id", "id", "index")
    macro: ClassVar[str] = ""  # the headline is the mean over the values of this group
    shares: ClassVar[dict[str, float] | None] = None  # value -> its part of it; equal by default

    def item(self, row: dict[str, Any], number: int) -> Item | None:
        """The item of a row (number: from 1, of its file), or None for a row that is none."""
        raise NotImplementedError

    def judged(self, text: str, item: Item) -> tuple[float, Any]:
        """(score from 0 to 1, what was read) of an answer."""
        return RULES[self.rule](text, item.truth, item.options)

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Item]:
        """All items, in the order of the files; raises DataError for none, or for one key twice."""
        found: dict[str, Item] = {}
        for path, number, row in self.rows(data, settings):
            where = f"{path} row {number}"
            try:
                item = self.item(row, number)
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as e:
                what = f"no {e}" if isinstance(e, KeyError) else str(e)
                raise DataError(f"{where}: not a row of {self.title} ({what})") from None
            if item is not None and item.key in found:
                raise DataError(f"{where}: a second item {item.key!r}")
            found |= {item.key: item} if item is not None else {}
        if not found:
            raise DataError(f"{data}: no question of {self.title} in it")
        return list(found.values())

    def rows(self, data: Path, settings: TaskSettings) -> Iterator[tuple[Path, int, Any]]:
        """(file, number, row) of all files of the split."""
        found: list[Path] = []
        for pattern in self.files if data.is_dir() else ():
            for place in (pattern, f"*/{pattern}"):
                matches = sorted(data.glob(place))
                found = found or [p for p in matches if (settings.split or "") in p.name]
        if not found and not data.is_file():
            where = f" for split {settings.split!r}" if settings.split else ""
            raise DataError(f"{data}{where}: no {' or '.join(self.files)}", fix=self.data_files)
        for path in found or [data]:
            for number, row in read_rows(path, inside=self.inside):
                yield path, number, row

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
        if any(i.truth is None for i in items):
            raise DataError(f"{data}: has no answers (this split is scored by a server)")
        joined, coverage = self.join([i.key for i in items], answers, settings)
        samples = {i.key: self._sample(i, joined) for i in items}
        return self.result(items, samples, Result(self, {}, samples, coverage))

    def result(self, items: list[Item], samples: dict[str, Sample], result: Result) -> Result:
        """Fills in totals and tables; a benchmark with a formula of its own overrides it."""
        scores = list(samples.values())
        if self.macro:
            weigh(scores, self.macro, self.shares)
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
            result.notes.append(f"{counted(unread, 'answer')} name no option")
        return result

    def _sample(self, item: Item, joined: Joined) -> Sample:
        text, there = joined.text(item.key), item.key in joined
        score, parsed = self.judged(text, item) if there else (0.0, "missing")
        image = next((i for i in item.images if isinstance(i, str)), "")
        groups = item.groups | ({"group": item.group} if item.group else {})
        return Sample(score, text, item.truth, parsed, item.prompt, image, groups)


def weigh(scores: list[Sample], kind: str, share: dict[str, float] | None = None) -> None:
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
