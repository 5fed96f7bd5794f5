"""The tables of the report: how runs stand, what they ran on, which settings differ."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Sequence
from typing import Any

from llava_jax.report.markup import Raw, escape
from llava_jax.report.runs import Run, number, sets_of
from llava_jax.settings import TRAINING

Table = tuple[Sequence[str], list[Sequence[str]]]
NO = "–"


def summary_table(runs: Sequence[Run], colors: Sequence[str]) -> Table:
    """How each run stands: a row per run."""
    header = ("run", "state", "steps", "loss", *_shown_scores(runs), "best", "tokens/s", "MFU",
              "goodput", "time", "memory")  # fmt: skip
    rows = []
    for i, run in enumerate(runs):
        dot = f'<i class="dot" style="background:{colors[i % len(colors)]}"></i>' * (len(runs) > 1)
        rows.append((Raw(dot + escape(run.name)), *_standing(run, _shown_scores(runs))))
    keep = [0, *(i for i in range(1, len(header)) if any(row[i] != NO for row in rows))]
    return [header[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _shown_scores(runs: Sequence[Run]) -> list[str]:
    """The numbers of the last validations: "vqa loss", "vqa exact_match"."""
    found = (f"{name} {key}" for run in runs for row in run.evals
             for name, numbers in sets_of(row).items()
             for key in numbers if key not in ("samples", "tokens", "asked"))  # fmt: skip
    return list(dict.fromkeys(found))[:6]


def _standing(run: Run, scores: Sequence[str]) -> list[str]:
    last = run.metrics[-1] if run.metrics else {}
    total = run.facts.get("steps")
    state = "finished" if run.done else "not finished" if run.metrics else "not a step yet"
    done = f"{last.get('step', 0):,}" + (f" of {total:,}" if isinstance(total, int) else "")
    last_part = run.metrics[-max(1, min(50, len(run.metrics) // 20)) :]
    losses = _numbers(last_part, "loss")
    found = []
    evals = sets_of(run.evals[-1]) if run.evals else {}
    for score in scores:
        name, _, key = score.partition(" ")
        found.append(_number(evals.get(name, {}).get(key)))
    best = run.evals[-1].get("best") if run.evals else None
    best = best if isinstance(best, dict) and number(best.get("step")) else {}
    best_words = f"{_number(best.get('value'))} at {best['step']:,}" if best else NO
    rates, mfus = _numbers(run.system, "tokens_per_second"), _numbers(run.system, "mfu")
    memory = _numbers(run.system, "device_memory_peak") or _numbers(run.system, "host_memory")
    return [
        state,
        done,
        _number(statistics.fmean(losses)) if losses else NO,
        *found,
        best_words,
        f"{statistics.median(rates):,.0f}" if rates else NO,
        f"{statistics.median(mfus):.1%}" if mfus else NO,
        _goodput(run),
        _time(sum(_numbers(run.metrics, "seconds"))),
        f"{max(memory) / 1e9:.1f} GB" if any(memory) else NO,
    ]


def _goodput(run: Run) -> str:
    """Of all processes that trained this run: the time in steps that count, of the time they took."""

    def last(key: str) -> float:  # of each process, all in all
        found = [r for r in run.system if number(r.get("started")) and number(r.get(key))]
        return sum({row["started"]: row[key] for row in found}.values())

    whole = last("elapsed_seconds")
    trained = sum(_numbers(run.metrics, "seconds")) - last("compile_seconds")
    return f"{min(max(trained, 0) / whole, 1):.1%}" if whole > 0 else NO


def _numbers(rows: Sequence[dict[str, Any]], key: str) -> list[float]:
    """The values of `key` in the rows that have a number there."""
    return [row[key] for row in rows if number(row.get(key))]


def _number(value: Any) -> str:
    return f"{value:.4g}" if number(value) else NO


def _time(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if 0 < seconds < 1e12 else NO


def facts_table(runs: Sequence[Run]) -> Table:
    """What the runs ran on: a column per run."""
    names = {
        "recipe": "recipe",
        "folder": "work directory",
        "started": "started",
        "version": "llava_jax",
        "commit": "commit",
        "versions": "versions",
        "devices": "devices",
        "mesh": "mesh",
        "attention": "attention",
        "samples": "samples",
        "data": "digest of the data",
        "trained": "trained parameters",
        "frozen": "frozen parameters",
        "model": "started from",
    }
    rows = []
    for key, title in names.items():
        cells = [str(run.folder) if key == "folder" else _fact(run.facts.get(key)) for run in runs]
        if any(cell != NO for cell in cells):
            rows.append((title, *cells))
    return (("", *(run.name for run in runs)) if len(runs) > 1 else ()), rows


def _fact(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_fact(part)}" for name, part in value.items()) or NO
    if isinstance(value, int):
        return f"{value:,}"
    return str(value) if value not in (None, "") else NO


def difference(runs: Sequence[Run]) -> Table:
    """The settings that differ from the default, from the recipe or between runs: a row each."""
    names = sorted({name for run in runs for name in run.settings})
    recipes = [run.facts.get("recipe_settings") for run in runs]
    recipes = [recipe if isinstance(recipe, dict) else {} for recipe in recipes]
    rows = []
    for name in names:
        values = [run.settings.get(name) for run in runs]
        row = TRAINING.get(name)
        default = _plain(row.default) if row else None
        from_recipe = [recipe.get(name, default) for recipe in recipes]
        if all(value == default for value in (*map(_plain, values), *map(_plain, from_recipe))):
            continue
        first = [_shown(default)] + ([_shown(from_recipe[0])] if any(recipes) else [])
        rows.append((name, *first, *map(_shown, values)))
    header = ("setting", "default", *(["recipe"] if any(recipes) else []))
    return (*header, *(run.name for run in runs)), rows


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or NO
    return NO if value in (None, "") else f"{value}"
