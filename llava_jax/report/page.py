"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from llava_jax.errors import counted
from llava_jax.report.markup import escape, table
from llava_jax.report.runs import SHOWN, Run, curves
from llava_jax.report.summary import difference, facts_table, summary_table

COLORS = ("#2f6fde", "#d9542b", "#2b9a66", "#9a4fd0", "#c08a00", "#0b98a8", "#d03f7f", "#7a7a80")
LAST = 4
"""The answers of a sample that are shown at once."""


def report_page(runs: Sequence[Run], title: str) -> str:
    """The page of some runs."""
    folder = resources.files("llava_jax").joinpath("assets/report")
    text = {name: folder.joinpath(name).read_text(encoding="utf-8")
            for name in ("page.html", "page.css", "page.js")}  # fmt: skip
    drawn = [{"name": run.name, "color": COLORS[i % len(COLORS)], "series": curves(run)}
             for i, run in enumerate(runs)]  # fmt: skip
    keys = list(dict.fromkeys(key for run in drawn for key in run["series"]))
    data = json.dumps({"runs": drawn, "charts": charts(keys)}, allow_nan=False)
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    sections = [
        _section("What ran", table(*facts_table(runs))),
        _section("Settings", _settings(runs)),
        *(_section(_of(runs, run, "Samples"), _samples(run)) for run in runs),
        *(_section(_of(runs, run, "What was skipped, and why"), _skipped(run)) for run in runs),
    ]
    return Template(text["page.html"]).substitute(
        title=escape(title),
        subtitle=escape(f"{counted(len(runs), 'run')}, as of {now}"),
        style=text["page.css"],
        summary=table(*summary_table(runs, COLORS), kind="stand"),
        sections="\n".join(filter(None, sections)),
        data=data.replace("<", "\\u003c"),
        script=text["page.js"],
    )


def charts(keys: Sequence[str]) -> list[dict[str, Any]]:
    """What is drawn together: [{"title", "keys", "names", "big", "smooth", "zero", "dots"}]."""
    found: list[dict[str, Any]] = []

    def add(title: str, prefix: str, end: str = "", **how: Any) -> None:
        own = [k for k in keys if k == prefix or (prefix[-1:] == "/" and k.startswith(prefix))]
        own = [k for k in own if k.endswith(end)]
        names = [k.removeprefix(prefix).removesuffix(end) for k in own]
        if own:
            found.append({"id": len(found), "title": title, "keys": own, "names": names, **how})

    add("training loss, mean over trained tokens", "loss", big=True, smooth=True)
    add("training loss by data file", "losses/", smooth=True)
    add("validation loss", "eval/", "/loss", dots=True)
    for score in dict.fromkeys(k.rpartition("/")[2] for k in keys if k.startswith("eval/")):
        if score != "loss":
            add(score.replace("_", " "), "eval/", f"/{score}", dots=True, zero=True)
    many = sum(k.startswith("lrs/") for k in keys) > 1
    add("learning rate", "lrs/" if many else "lr", zero=True)
    add("gradient norm, before clipping", "grad_norm", smooth=True)
    if many:
        add("gradient norm by group", "grad_norms/", smooth=True)
    add("norm of the update by group", "update_norms/", smooth=True)
    add("tokens a second, without padding", "system/tokens_per_second", zero=True)
    add("MFU", "system/mfu", zero=True)
    add("padding, share of positions", "padding", smooth=True, zero=True)
    add("waiting for data, share of the steps", "system/data", zero=True)
    add("goodput, share of the time that trained", "system/goodput", zero=True)
    add("memory of the main process, GB", "system/host_memory", zero=True)
    add("memory of the fullest device, GB", "system/device_memory", zero=True)
    return found


# Sections ------------------------------------------------------------------------------------------


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>\n{body}" if body else ""


def _of(runs: Sequence[Run], run: Run, title: str) -> str:
    return f"{title}: {run.name}" if len(runs) > 1 else title


def _settings(runs: Sequence[Run]) -> str:
    header, rows = difference(runs)
    note = "What differs from the recipe or from the defaults."
    if len(runs) > 1:
        note = "What differs between the runs, from their recipes or from the defaults."
    return f'<p class="soft">{note}</p>{table(header, rows)}' if rows else ""


def _samples(run: Run) -> str:
    answers: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in run.samples:
        key = str(row.get("set")), str(row.get("id")), str(row.get("question"))
        answers.setdefault(key, []).append(row)
    cards = [_sample(run, key, rows) for key, rows in answers.items()]
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def _sample(run: Run, key: tuple[str, str, str], rows: list[dict[str, Any]]) -> str:
    name, identity, question = key
    truth = str(rows[-1].get("truth", ""))
    lines = [_answer(row, truth) for row in reversed(rows)]
    older = "".join(lines[LAST:])
    more = f"<details><summary>earlier answers</summary><dl>{older}</dl></details>" if older else ""
    return (
        f'<div class="sample">{_picture(run, rows[-1].get("picture"))}'
        f'<p class="soft">{escape(name)} · {escape(identity)}</p><p><b>{escape(question)}</b></p>'
        f'<p class="soft">in the data: {escape(truth)}</p><dl>{"".join(lines[:LAST])}</dl>{more}</div>'
    )


def _answer(row: dict[str, Any], truth: str) -> str:
    said = row.get("answer")
    right = " class=right" if said == truth.strip() else ""
    words = "(not asked)" if said is None else str(said) or "(nothing)"
    return f"<dt>step {escape(str(row.get('step')))}</dt><dd{right}>{escape(words)}</dd>"


def _picture(run: Run, name: Any) -> str:
    """The picture of a sample, inside the page; nothing where its file is gone or outside of the run."""
    path = run.folder / str(name or "")
    try:
        inside = path.resolve().is_relative_to((run.folder / "samples").resolve())
        if not name or not inside or not path.is_file():
            return ""
        data = base64.b64encode(path.read_bytes()).decode()
    except (OSError, ValueError):  # cannot be read, or is no name of a file
        return ""
    return f'<img alt="the picture asked about" src="data:image/jpeg;base64,{data}">'


def _skipped(run: Run) -> str:
    rows = []
    for bad in run.bad[:SHOWN]:
        rows.append((f"sample {bad.get('id')}", str(bad.get("reason") or bad.get("error") or bad)))
    if len(run.bad) > SHOWN:
        rows.append((f"{len(run.bad) - SHOWN:,} more", "in bad.jsonl of the work directory"))
    for row in run.skipped[:SHOWN]:
        why = f"the loss was {row.get('loss')}, the norm of the gradient {row.get('grad_norm')}"
        of = f"; its samples: {', '.join(map(str, row['ids'][:8]))}" if row["ids"] else ""
        rows.append((f"step {row['step']:,}", f"{why}: nothing was changed{of}"))
    if len(run.skipped) > SHOWN:
        rows.append(
            (f"{len(run.skipped) - SHOWN:,} more steps", "in skipped.jsonl of the work directory")
        )
    counts = {"replaced": "samples replaced by others", "cut": "samples cut to data.max_length",
              "empty": "places left empty", "held_out": "samples held out"}  # fmt: skip
    rows += [(words, f"{run.data[n]:,}") for n, words in counts.items()
             if isinstance(run.data.get(n), int) and run.data[n]]  # fmt: skip
    rows += [("this report", problem) for problem in run.problems]
    return table((), rows)
