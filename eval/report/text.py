"""Results as plain text, and result files read back."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.eval.task import TASKS, Result, get_task
from llava_jax.reader import is_number
from llava_jax.util import read_json


def read_result(path: Path) -> dict[str, Any]:
    """A result as `eval score --json` writes it (Result.to_json)."""
    value = read_json(path, DataError)
    keys = {"task", "totals", "per_sample", "headline", "coverage"}
    if not isinstance(value, dict) or not keys <= value.keys():
        raise DataError(f"{path}: not a result file", fix=_FIX)
    title = TASKS.get(value["task"], value["task"]) if isinstance(value["task"], str) else ""
    value = {"title": title, "tables": {}, "notes": [], **value}
    for what, is_right in _shapes(value):
        if not is_right:
            raise DataError(f"{path}: not a result file: {what}", fix=_FIX)
    return value


_FIX = "write one with eval score --json"
# What the report reads of a sample of these benchmarks besides score, answer and truth.
_GROUPS = {"pope": ("split",), "mme": ("task", "pair")}
_DETAILS: dict[str, tuple] = dict.fromkeys(("llava_wild", "coco30"), ("model", "reference"))


def _shapes(r: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """(what is wrong, whether it is right) of all that the report reads, the outer shapes first."""
    named = [r[n] for n in ("task", "title", "headline")]
    yield "its task, title or headline is not text", _texts(named)
    yield "run is not text", isinstance(r.get("run", ""), str)
    for name in ("totals", "per_sample", "coverage", "tables"):
        yield f"{name} is not an object", isinstance(r[name], dict)
    yield "notes is not a list of texts", _texts(r["notes"])
    coverage, task = r["coverage"], r["task"]
    counts = [coverage.get(n) for n in ("answered", "expected")]
    yield "coverage has no numbers answered and expected", all(map(_whole, counts))
    yield "coverage: answered is not from 0 to expected", 0 <= counts[0] <= counts[1]
    yield "coverage has no list details", _texts(coverage.get("details"))
    yield f"no total {r['headline']!r}", is_number(r["totals"].get(r["headline"]))
    mmbench = task in ("mmbench", "mmbench_cn")
    groups = r["totals"].get("groups", None if mmbench else 0)
    yield "no total groups, or no whole number", _whole(groups)
    low, high = (-1, 10) if task in _DETAILS else (0, 1)  # -1 is unread, see judge/reviews.py
    for name, table in r["tables"].items():
        yield f"table {name!r} is not an object", isinstance(table, dict)
    if task == "pope":
        rows = r["tables"].get("per split", {}).values()
        ratios = [row.get("Yes ratio") if isinstance(row, dict) else None for row in rows]
        yield "no table per split with Yes ratio", bool(ratios) and all(map(is_number, ratios))
    yield "there are no samples", bool(r["per_sample"])
    for key, s in r["per_sample"].items():
        where = f"sample {key!r}"
        yield f"{where} is not an object", isinstance(s, dict)
        yield f"{where} has no score", is_number(s.get("score"))
        yield f"{where}: the score is not from {low} to {high}", low <= s["score"] <= high
        weight = s.get("weight", 1)
        yield f"{where}: the weight is no number above 0", is_number(weight) and weight > 0
        yield f"{where} has no answer or truth", "truth" in s and isinstance(s.get("answer"), str)
        shown = [s.get(n, "") for n in ("prompt", "image")]
        yield f"{where}: prompt or image is not text", _texts(shown)
        for name in _DETAILS.get(task, ()):
            yield f"{where} has no {name}", is_number(s.get(name))
        yield f"{where}: hallucinated is not a list of texts", _texts(s.get("hallucinated", []))
        names, groups = _GROUPS.get(task, ()), s.get("groups", {})
        right = not names or (isinstance(groups, dict) and _texts([groups.get(n) for n in names]))
        yield f"{where} has no groups {', '.join(names)}", right


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, str) for v in values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and is_number(value)


def answered_of(coverage: dict[str, Any]) -> str:
    """ "answered 300 of 600", with a mark where that is not all."""
    answered, expected = coverage["answered"], coverage["expected"]
    if coverage.get("open_end"):
        return f"answered {answered:,} of an unknown number !"
    return f"answered {answered:,} of {expected:,}" + (" !" if answered < expected else "")


def number(value: Any) -> str:
    """A number with as many digits as a reader wants, other values as they are."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if 0 < abs(value) < 0.01 else f"{value:.2f}"


def complete(result: Result, unasked: Collection[str] = ()) -> dict[str, Any]:
    """A result as written to files. Where answers are missing, which count as wrong, the headline
    of the answered questions alone is given as well, under its own name. Where it is not known how
    many questions there are, the headline's name says so.

    Args:
      unasked: of the missing ones, those that were not meant to be asked (--limit): they are left out
        of the samples, and the headline is that of the others, of which an unanswered one is wrong.
    """
    value = result.to_json()
    gone = set(result.coverage.missing)
    if result.coverage.open_end:
        name = f"{value['headline']}_of_given"
        value["totals"][name] = value["totals"][value["headline"]]
        value["headline"] = name
    if not gone or result.coverage.missing_left_out:
        return value
    from llava_jax.eval.report.stats import answered, headline_of  # numpy, only where it is used

    def total_of(kind: str, absent: set[str]) -> tuple[str, dict[str, Any]]:
        name, kept = f"{result.task.headline}_of_{kind}", answered(value["per_sample"], absent)
        result.task.weigh([result.samples[k] for k in kept])  # the parts as they were answered
        samples = {k: result.samples[k].to_json() for k in kept}
        value["totals"][name] = headline_of(result.task.name, samples)
        return name, samples

    name, samples = total_of("answered", gone)
    if unasked:
        total, failed = result.coverage.expected, len(gone) - len(unasked)
        if failed:
            name, samples = total_of("asked", set(unasked))
        value |= {"headline": name, "per_sample": samples}
        value["coverage"] |= {"expected": total - len(unasked), "missing": failed}
        lines = [f"{failed} of the questions asked have no answer and count as wrong"]
        others = [x for x in result.coverage.lines() if " questions have no answer and " not in x]
        value["coverage"]["details"] = lines[: bool(failed)] + others
        what = f"{len(unasked)} of {total} questions were not asked; tables and all totals but"
        value["notes"].append(f"{what} {name} count them as wrong")
    return value


def as_text(result: dict[str, Any], tables: bool = True) -> str:
    """The totals, tables and coverage of a result as `complete` returns it, for a terminal."""
    task = get_task(result["task"])
    lines = [result["title"]]
    width = max(map(len, result["totals"]))
    for name, value in result["totals"].items():
        mark = " <" if name == result["headline"] else ""
        lines.append(f"  {name:{width}}  {number(value)}{mark}")
    lines.append(f"  < headline, which stands beside published numbers; {task.unit_note}")
    for title, table in result["tables"].items() if tables else ():
        lines += [f"{title}:", *columns(table)]
    coverage = result["coverage"]
    lines.append(answered_of(coverage))
    lines += [f"warning: {line}" for line in coverage["details"]]
    lines += [f"note: {line}" for line in result["notes"]]
    return "\n".join(lines)


def columns(table: dict[str, Any]) -> list[str]:
    """A table in aligned columns, its header first."""
    header, rows = grid(table)
    first, *others = (max(map(len, cells)) for cells in zip(header, *rows))
    lines = []
    for name, *cells in (header, *rows):
        right = [f"{c:>{w}}" for c, w in zip(cells, others)]
        lines.append("  ".join([f"  {name:{first}}", *right]))
    return lines


def grid(table: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table {row: number or {column: number}}, as text."""
    cells = {k: v if isinstance(v, dict) else {"value": v} for k, v in table.items()}
    names = list(dict.fromkeys(name for row in cells.values() for name in row)) or ["value"]
    shown = {k: [number(row[n]) if n in row else "" for n in names] for k, row in cells.items()}
    return ["", *names], [[str(k), *row] for k, row in shown.items()]
