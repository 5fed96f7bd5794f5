"""What a report shows: results with their noise and the paper's numbers, and pairs of runs."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.eval.questions import same_question
from llava_jax.eval.report.paper import KNOWN_NOISE, OTHER_SPLIT, PAPER, PAPER_SIZE, ROWS, SIZES
from llava_jax.eval.report.stats import Flips, Interval, Rows, bootstrap, counted_rows, flips
from llava_jax.eval.report.text import answered_of, number, read_result
from llava_jax.eval.task import TASKS
from llava_jax.reader import is_number

ROUNDED = 0.08  # most that an owner's rounding takes from a headline


@dataclass
class ModelResult:
    """One model's result on one benchmark.

    run: the model's name. file: the result as in its file (Result.to_json). interval: the headline
    with its noise. paper: score per name of ROWS, empty if the paper has none. row: the one of ROWS
    that the model is to be compared with, "" if none is known.
    """

    run: str
    file: dict[str, Any]
    interval: Interval
    paper: dict[str, float]
    row: str = ""

    def __post_init__(self) -> None:
        self.task: str = self.file["task"]
        self.title: str = self.file["title"]
        self.samples: dict[str, dict[str, Any]] = self.file["per_sample"]

    @property
    def remark(self) -> str:
        """What a reader of the number must know: what it is not comparable in, what is missing."""
        answered = answered_of(self.file["coverage"])
        parts = [self.comparable, self.otherwise, answered if answered.endswith("!") else ""]
        return "; ".join(filter(None, parts))

    @property
    def partial(self) -> bool:
        """Whether the set is smaller than the paper's: a part of it, a later one (SEED-Bench), or one
        that was made."""
        return self._questions < 0.98 * PAPER_SIZE.get(self.task, 0)

    @property
    def _questions(self) -> int:
        return self.file["totals"].get("groups", self.file["coverage"]["expected"])  # MMBench

    @property
    def comparable(self) -> str:
        """Why the number is not the paper's kind of number, or ""."""
        if self.partial:
            return f"{self._questions:,} of the paper's {PAPER_SIZE[self.task]:,} questions"
        if self.task in OTHER_SPLIT:
            return f"the paper's split is {OTHER_SPLIT[self.task]}"
        if self.task in ("llava_wild", "mmvet"):
            return f"judge: {self.file['totals'].get('judge', 'unknown')}"
        return ""

    @property
    def otherwise(self) -> str:
        """What was asked for in place of the paper's way ("quantize nf4, ocr=no"), or ""."""
        run = self.file.get("experiment")
        run = run if isinstance(run, dict) else {}
        found = [f"{n} {run[n]}" for n in ("quantize", "template", "max_new_tokens") if run.get(n)]
        tasks = run.get("tasks")
        own = tasks.get(self.task) if isinstance(tasks, dict) else None
        options = own.get("set") if isinstance(own, dict) else None
        options = options if isinstance(options, dict) else {}
        return ", ".join(found + [f"{k}={v}" for k, v in options.items()])

    def difference(self, row: str) -> tuple[float, bool] | None:
        """Ours less the paper's, and whether that is more than noise: outside the bootstrap
        interval and beyond what runs of one recipe are known to differ by."""
        if row not in self.paper:
            return None
        d = self.interval.value - self.paper[row]
        outside = not self.interval.low <= self.paper[row] <= self.interval.high
        return d, outside and abs(d) > KNOWN_NOISE.get(self.task, 0.0)


@dataclass
class Comparison:
    """Two runs of one benchmark, or of the part of it that one of its headline numbers counts."""

    first: ModelResult
    second: ModelResult
    flips: Flips
    part: str = ""

    @property
    def title(self) -> str:
        return f"{self.first.title} {self.part}".strip()


def row_of(result: dict[str, Any]) -> str:
    """The paper's row of a result's own size, "" where the file does not say or it is of none."""
    both = [result.get(name) for name in ("settings", "experiment")]
    settings, experiment = (x if isinstance(x, dict) else {} for x in both)
    count: Any = settings.get("parameters")
    # With the tower, and the 7B and 13B of any decoder.
    known = SIZES if is_number(count) else ()
    size = next((n for n, low, high in known if low <= count < high), "")
    return f"{size} LoRA" if size and experiment.get("base") else size


def collect(paths: Sequence[Path], row: str | None = None) -> list[ModelResult]:
    """Reads results and their noise, in the order of TASKS and of the files. row: of all of them."""
    where = [path.resolve() for path in paths]
    if twice := next((p for p, n in Counter(where).items() if n > 1), None):
        raise DataError(f"{twice}: is given twice", fix="name each result once")
    results = [read_result(path) for path in paths]
    names = run_names(where, results)
    found = []
    for path, name, result in zip(paths, names, results):
        official = result["totals"][result["headline"]]  # rounded as its owner rounds it
        drawn = bootstrap(result["task"], result["per_sample"])
        if abs(drawn.value - official) > ROUNDED:
            what = f"the total {result['headline']} is {official}, but its samples make {drawn.value:.2f}"
            raise DataError(f"{path}: {what}", fix="write it anew with eval score --json")
        interval = replace(drawn, value=float(official))
        paper: dict[str, float] = dict(zip(ROWS, PAPER.get(result["task"], ())))
        own = row_of(result) if row is None else row
        found.append(ModelResult(name, result, interval, paper, own))
    order = [*TASKS]
    return sorted(found, key=lambda r: order.index(r.task) if r.task in TASKS else len(order))


def run_names(paths: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> list[str]:
    """The name of each result's run: its model's; where that is not known, or several results of one
    benchmark have it, as much of the file's path as tells them apart (OUT of OUT/pope/result.json)."""
    named = [(r["task"], r.get("run")) for r in results]
    counts = Counter(named)
    unclear = {None, *(run for (_, run), n in counts.items() if n > 1)}
    places: dict[int, list[str]] = {}
    for n, (path, (task, run)) in enumerate(zip(paths, named)):
        if run in unclear:
            parts = [*path.parent.parts, path.stem]
            usual = path.stem == "result" and len(parts) > 2
            places[n] = parts[: -1 - (parts[-2] == task)] if usual else parts
    while len(set(map(tuple, places.values()))) > 1 == len({p[-1] for p in places.values()}):
        places = {n: p[:-1] for n, p in places.items()}
    for length in range(1, 1 + max(map(len, places.values()), default=1)):
        found = [(t, "/".join(places[n][-length:]) if n in places else r)
                 for n, (t, r) in enumerate(named)]  # fmt: skip
        if len(set(found)) == len(found):
            break
    return [str(name) for _, name in found]


def comparisons_of(results: Sequence[ModelResult]) -> list[Comparison]:
    """Each later run of a benchmark against its first."""
    first: dict[str, ModelResult] = {}
    found = []
    for result in results:
        base = first.setdefault(result.task, result)
        if base is not result:
            if (key := other_question(base.samples, result.samples)) is not None:
                what = f"{base.run} and {result.run}: question {key!r} of {result.title} is another"
                raise DataError(f"{what} in each, and so is its data", fix="compare them apart")
            parts = [counted_rows(r.task, r.samples) for r in (base, result)]
            for part in dict.fromkeys([*parts[0], *parts[1]]):
                both = flips(result.task, *(p.get(part, {}) for p in parts))
                found.append(Comparison(base, result, both, part))
    return found


def other_question(first: Rows, second: Rows) -> str | None:
    """The first key under which two results have another truth or question."""
    for key in (k for k in first if k in second):
        a, b = first[key], second[key]
        asked = [str(r.get("prompt", "")) for r in (a, b)]
        if a["truth"] != b["truth"] or (all(asked) and not same_question(*asked)):
            return key
    return None


def failures(result: ModelResult, limit: int = 12) -> list[tuple[str, dict[str, Any]]]:
    """Samples that score nothing, spread over the file, as (key, sample)."""
    wrong = [(k, s) for k, s in result.samples.items() if not s["score"]]
    step = max(1, len(wrong) // limit)
    return wrong[::step][:limit]


def hallucinated(result: ModelResult, limit: int = 12) -> dict[str, int]:
    """The objects a model most often sees where they are not (POPE, CHAIR)."""
    counts: Counter[str] = Counter()
    for s in result.samples.values():
        if result.task == "chair":
            counts.update(s.get("hallucinated", ()))
        elif result.task == "pope" and s.get("parsed") == "yes" and s["truth"] == "no":
            counts[asked_object(s["prompt"])] += 1
    return dict(counts.most_common(limit))


def asked_object(question: str) -> str:
    """ "dog" of "Is there a dog in the image?" (POPE's only question)."""
    return re.sub(r"^Is there (an? )?", "", question).split(" in the ")[0]


SUMMARY_HEADER = ["benchmark", "run", "ours", "95 %", *ROWS, "difference", "remark"]
LEGEND = """95 %: bootstrap over pictures with all their questions. Difference: to the paper's row of the
model's own size, where that is known and the set is the paper's; ! where it is more than noise.
Remark: ! where questions are unanswered."""
RADAR_LEGEND = "Each axis runs from 85 % of its smallest value, in the middle, to its largest."


def summary_rows(results: Sequence[ModelResult]) -> list[list[str]]:
    """Cells of the first table: benchmark, run, ours, interval, the paper's rows, difference to that
    of the model's size with a mark when it is more than noise, remark."""
    rows = []
    for r in results:
        shown = ""
        if not r.partial and (found := r.difference(r.row)):
            shown = f"{round(found[0], 1) + 0.0:+.1f} ({r.row})" + (" !" if found[1] else "")
        ours, low, high = map(number, (r.interval.value, r.interval.low, r.interval.high))
        papers = [f"{r.paper[name]:.1f}" if name in r.paper else "" for name in ROWS]
        rows.append([r.title, r.run, ours, f"{low} – {high}", *papers, shown, r.remark])
    return rows


COMPARISON_HEADER = ["benchmark", "from", "to", "right in both", "gained", "lost", "neither", "p"]


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells of the table of flips."""
    rows = []
    for c in comparisons:
        both = [(r, r.file["totals"].get(c.part, r.interval.value)) for r in (c.first, c.second)]
        counts = (c.flips.both, len(c.flips.gained), len(c.flips.lost), c.flips.neither)
        p = f"{c.flips.p:.2g}" + (" !" if c.flips.p < 0.05 else "")
        rows.append([c.title, *(f"{r.run} {number(x)}" for r, x in both), *map(str, counts), p])
    return rows
