"""What a report shows: results with their noise and the paper's numbers, and pairs of runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llava_jax.eval.paper import KNOWN_NOISE, OTHER_SPLIT, PAPER, PAPER_SIZE, ROWS
from llava_jax.eval.show import number, read_result
from llava_jax.eval.stats import Flips, Interval, bootstrap, flips
from llava_jax.eval.task import TASKS


@dataclass
class Entry:
    """One result in the report. run: its name; paper: the paper's row per name of ROWS, if any."""

    run: str
    result: dict[str, Any]
    interval: Interval
    paper: dict[str, float]

    @property
    def task(self) -> str:
        return self.result["task"]

    @property
    def title(self) -> str:
        return TASKS.get(self.task, self.task)

    @property
    def comparable(self) -> str:
        """Why the number is not the paper's kind of number, or ""."""
        wanted = PAPER_SIZE.get(self.task)
        have = self.result["coverage"]["expected"]
        if self.task in ("mmbench", "mmbench_cn"):
            have = self.result["totals"].get("groups", have)
        if wanted and have < 0.9 * wanted:
            return f"{have:,} of the paper's {wanted:,} questions"
        if self.task in OTHER_SPLIT:
            return f"the paper's split is {OTHER_SPLIT[self.task]}"
        if self.task in ("llava_wild", "mmvet"):
            return f"judge: {self.result['totals'].get('judge', 'unknown')}"
        return ""

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
    """Two runs of one benchmark."""

    title: str
    first: Entry
    second: Entry
    flips: Flips


def collect(paths: Sequence[Path]) -> list[Entry]:
    """Reads results and their noise, in the order of TASKS and of the files."""
    results = [read_result(path) for path in paths]
    names = dict(zip(paths, (r.get("run") for r in results)))
    if None in names.values() or len({(r["task"], r["run"]) for r in results}) < len(results):
        names = run_names(paths)
    entries = []
    for path, result in zip(paths, results):
        interval = bootstrap(result["task"], result["per_sample"])
        official = result["totals"][result["headline"]]  # rounded as its owner rounds it
        interval = replace(interval, value=float(official))
        paper: dict[str, float] = dict(zip(ROWS, PAPER.get(result["task"], ())))
        entries.append(Entry(str(names[path]), result, interval, paper))
    order = {t: n for n, t in enumerate(TASKS)}
    return sorted(entries, key=lambda e: order.get(e.task, len(order)))


def run_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each file: its folder's where the folders differ, else its own."""
    folders = {p.resolve().parent for p in paths}
    name = {p: p.resolve().parent.name if len(folders) > 1 else p.stem for p in paths}
    if len(folders) > 1 and len({f.name for f in folders}) < len(folders):
        name = {p: str(p.parent) for p in paths}
    return name


def comparisons_of(entries: Sequence[Entry]) -> list[Comparison]:
    """Each later run of a benchmark against its first."""
    first: dict[str, Entry] = {}
    found = []
    for e in entries:
        if e.task not in first:
            first[e.task] = e
            continue
        base = first[e.task]
        both = flips(e.task, base.result["per_sample"], e.result["per_sample"])
        found.append(Comparison(e.title, base, e, both))
    return found


def failures(entry: Entry, limit: int = 12) -> list[tuple[str, dict[str, Any]]]:
    """Samples that score nothing, spread over the file, as (key, sample)."""
    wrong = [(k, s) for k, s in entry.result["per_sample"].items() if not s["score"]]
    step = max(1, len(wrong) // limit)
    return wrong[::step][:limit]


def hallucinated(entry: Entry, limit: int = 12) -> dict[str, int]:
    """The objects a model most often sees where they are not (POPE, CHAIR)."""
    counts: Counter[str] = Counter()
    for s in entry.result["per_sample"].values():
        if entry.task == "chair":
            counts.update(s["hallucinated"])
        elif s.get("parsed") == "yes" and s["truth"] == "no":
            counts[asked_object(s["prompt"])] += 1
    return dict(counts.most_common(limit))


def asked_object(question: str) -> str:
    """ "dog" of "Is there a dog in the image?" (POPE's only question)."""
    words = question.removeprefix("Is there ").split(" in the ")[0]
    return words.removeprefix("an ").removeprefix("a ")


def summary_rows(entries: Sequence[Entry]) -> list[list[str]]:
    """Cells of the first table: benchmark, run, ours, interval, the paper's rows, difference to the
    nearest of them with a mark when it is more than noise, remark."""
    rows = []
    for e in entries:
        near = min(e.paper, key=lambda r: abs(e.paper[r] - e.interval.value), default=None)
        shown = ""
        if near and (found := e.difference(near)):
            shown = f"{round(found[0], 1) + 0.0:+.1f} ({near})" + (" !" if found[1] else "")
        rows.append(
            [
                e.title,
                e.run,
                number(e.interval.value),
                f"{number(e.interval.low)} – {number(e.interval.high)}",
                *(f"{e.paper[r]:.1f}" if r in e.paper else "" for r in ROWS),
                shown,
                e.comparable,
            ]
        )
    return rows


SUMMARY_HEADER = ["benchmark", "run", "ours", "95 %", *ROWS, "difference", "remark"]
LEGEND = (
    "95 %: bootstrap over questions (MME: images; MMBench: circular groups). Difference: to the "
    "nearest row of the paper; ! where it is more than noise."
)
