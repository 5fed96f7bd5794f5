"""Noise: bootstrap intervals of every headline, and McNemar's test between two runs, by scipy.

The unit that is drawn is what is independent: a picture with all its questions and reviews. POPE's
8,910 questions are about 500 pictures; drawn one by one, its interval would be 1.7 times too narrow.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = dict[str, dict[str, Any]]
Statistic = Callable[[Any], float]  # weights float64[units] -> headline


@dataclass(frozen=True)
class Interval:
    """A headline with the ends of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def counted_rows(task: str, rows: Rows) -> dict[str, Rows]:
    """Part -> the samples of a result that each of its headline numbers counts; one part named ""
    for most benchmarks."""
    if task == "mme":
        from llava_jax.eval.benchmarks.mme import PERCEPTION

        parts: dict[str, Rows] = {}
        for k, r in rows.items():
            part = "perception" if r["groups"]["task"] in PERCEPTION else "cognition"
            parts.setdefault(part, {})[k] = r
        return parts
    if task == "scienceqa" and any("is_multimodal" in r for r in rows.values()):
        return {"": {k: r for k, r in rows.items() if r.get("is_multimodal")}}
    return {"": rows}


def statistic(task: str, rows: Rows) -> tuple[int, Statistic]:
    """The number of units of a result's `per_sample`, and the headline as a function of their weights.

    A unit is what is drawn: a picture with all its questions, since these are not independent.
    """
    parts = counted_rows(task, rows)
    rows = parts.get("perception", {}) if task == "mme" else parts[""]
    places: dict[str, int] = {}
    for k, r in rows.items():
        places.setdefault(_unit(task, k, r), len(places))
    unit = np.array([places[_unit(task, k, r)] for k, r in rows.items()], int)
    of_samples = _of_samples(task, list(rows.values()))
    return len(places), lambda w: of_samples(w[unit])


def _unit(task: str, key: str, row: dict[str, Any]) -> str:
    if task == "mme":  # its pair: the tool's files pair lines by position
        return f"{row['groups']['task']}/{row['groups']['pair']}"
    return str(row.get("image") or key.partition("#")[0])


def _of_samples(task: str, values: list[dict[str, Any]]) -> Statistic:
    """The headline as a function of the samples' weights."""
    if task in ("pope", "mme"):
        return (_pope if task == "pope" else _mme)(values)
    if task in ("llava_wild", "coco30"):
        model = np.array([r["model"] for r in values], float)
        reference = np.array([r["reference"] for r in values], float)
        return lambda w: float(100 * (w @ model) / (w @ reference))
    scores = np.array([r["score"] for r in values], float)
    if task == "chair":
        scores = 1 - scores
    # A benchmark whose headline is a mean of means gives its samples weights.
    own = np.array([r.get("weight", 1.0) for r in values], float)
    return lambda w: float(100 * (w @ (own * scores)) / (w @ own))


def bootstrap(task: str, rows: Rows, draws: int | None = None, seed: int = 0) -> Interval:
    """The headline of a result and its 95 % percentile interval.

    Args:
      draws: resamples; by default 1,000, or 200 for more than 20,000 units.
    """
    units, headline = statistic(task, rows)
    value = headline(np.ones(units)) if units else 0.0
    if units < 2:  # nothing to draw from
        return Interval(value, value, value)
    from scipy import stats

    found = stats.bootstrap(
        (np.arange(units),),
        lambda drawn: headline(np.bincount(drawn, minlength=units).astype(float)),
        n_resamples=draws or (1000 if units <= 20_000 else 200),
        batch=1,  # else all draws of 100,000 units are held at once
        vectorized=False,
        method="percentile",
        rng=seed,
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def answered(rows: Rows, missing: set[str]) -> Rows:
    """The samples but those in `missing`, and but MMBench groups that lack a rotation."""
    return {k: r for k, r in rows.items() if not missing & {k, *r.get("rows", ())}}


def headline_of(task: str, rows: Rows) -> float:
    """The headline over these samples; 0.0 of none."""
    units, headline = statistic(task, rows)
    return headline(np.ones(units)) if units else 0.0


@dataclass(frozen=True)
class Flips:
    """Two runs on the same questions. gained: wrong in the first, right in the second; p: two-sided
    exact McNemar test (a sign test for reviews, whose scores are not right or wrong)."""

    gained: list[str]
    lost: list[str]
    both: int
    neither: int
    only_one: int
    p: float


def flips(task: str, first: Rows, second: Rows) -> Flips:
    """Compares two results of one benchmark, question by question. A soft score counts as right
    from 0.5 on. Questions that only one of the results has are left out and counted."""
    shared = [k for k in first if k in second]
    pairs = [(k, first[k]["score"], second[k]["score"]) for k in shared]
    if task not in ("llava_wild", "coco30", "mmvet"):
        pairs = [(k, a >= 0.5, b >= 0.5) for k, a, b in pairs]
    gained, lost = [k for k, a, b in pairs if b > a], [k for k, a, b in pairs if a > b]
    neither = sum(not a and not b and isinstance(a, bool) for _, a, b in pairs)
    both = len(pairs) - len(gained) - len(lost) - neither
    alone = len(first) + len(second) - 2 * len(shared)
    return Flips(gained, lost, both, neither, alone, sign_test(len(gained), len(lost)))


def sign_test(gained: int, lost: int) -> float:
    """Two-sided exact p of so uneven a split of a fair coin's tosses; 1.0 of none."""
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _parts(names: list[str]) -> list[Any]:
    """For each name, which samples are of it."""
    return [np.array(names) == name for name in dict.fromkeys(names)]


def _pope(values: list[dict[str, Any]]) -> Statistic:
    # A missing answer is neither yes nor no, and wrong as either, as in the scorer.
    yes = np.array([r.get("parsed") == "yes" for r in values])
    no = np.array([r.get("parsed") == "no" for r in values])
    true = np.array([r["truth"] == "yes" for r in values])
    parts = _parts([r["groups"]["split"] for r in values])

    def mean_f1(w) -> float:
        scores = []
        for part in parts:
            tp, fp = w[part & yes & true].sum(), w[part & ~no & ~true].sum()
            fn = w[part & ~yes & true].sum()
            scores.append(2 * tp / (2 * tp + fp + fn) if tp else 0.0)
        return float(100 * np.mean(scores))

    return mean_f1


def _mme(values: list[dict[str, Any]]) -> Statistic:
    # Samples of a pair have one weight: each then counts for half of its pair.
    pairs = [(r["groups"]["task"], r["groups"]["pair"]) for r in values]
    score = np.array([r["score"] for r in values], float)
    sizes, right = Counter(pairs), Counter()
    for pair, x in zip(pairs, score):
        right[pair] += x
    share = np.array([1 / sizes[p] for p in pairs])
    plus = np.array([float(right[p] == 2) for p in pairs])
    parts = _parts([task for task, _ in pairs])

    def points(w) -> float:
        total = 0.0
        for part in (p for p in parts if w[p].sum()):
            halves = w[part] * share[part]
            total += 100 * (w[part] @ score[part]) / w[part].sum()
            total += 100 * (halves @ plus[part]) / halves.sum()
        return float(total)

    return points
