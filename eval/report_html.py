"""The report as one self-contained HTML page: no script, no network, pictures inside."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from llava_jax.eval.charts import bars, radar
from llava_jax.eval.entries import (
    LEGEND,
    SUMMARY_HEADER,
    Comparison,
    Entry,
    failures,
    hallucinated,
    summary_rows,
)
from llava_jax.eval.paper import ROWS
from llava_jax.eval.pictures import Pictures
from llava_jax.eval.report_md import COMPARISON_HEADER, comparison_rows
from llava_jax.eval.show import grid, number

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; --bad: #c62828; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { margin: 0 0 1rem; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
.summary td:last-child { white-space: normal; min-width: 5rem; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
tr:hover td { background: var(--soft); } .wide { overflow-x: auto; }
.flag { color: var(--bad); font-weight: 600; } .soft { opacity: .75; }
.warn { color: var(--bad); } svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem; overflow-wrap: anywhere; }
.card img { max-width: 100%; max-height: 11rem; display: block; margin-bottom: .4rem; }
.card p { margin: .2rem 0; white-space: pre-wrap; } summary { cursor: pointer; margin: .6rem 0; }
dt { font-weight: 600; } .figures { display: flex; flex-wrap: wrap; gap: 2rem; }
"""


def page(
    entries: Sequence[Entry],
    comparisons: Sequence[Comparison],
    title: str,
    pictures: Pictures | None,
) -> str:
    """The whole page as HTML text.

    Args:
      pictures: finds the pictures that samples name, if they are to be shown.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="summary">{_table(SUMMARY_HEADER, summary_rows(entries))}</div>',
        f'<p class="soft">{escape(LEGEND)}</p>',
        _radar(entries),
    ]
    if comparisons:
        parts.append(_comparison(comparisons))
    parts += [_section(e, pictures) for e in entries]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str) -> str:
    flag = ' class="flag"' if text.endswith(" !") else ""
    return f"<td{flag}>{escape(text)}</td>"


def _radar(entries: Sequence[Entry]) -> str:
    """All runs beside the paper's 7B and 13B, on the benchmarks that the paper has."""
    axes = list(dict.fromkeys(e.title for e in entries if e.paper))
    if len(axes) < 3:
        return ""
    paper = {e.title: e.paper for e in entries if e.paper}
    series: dict[str, list[float | None]] = {
        f"LLaVA-1.5 {row}": [paper[a][row] for a in axes] for row in ROWS[:2]
    }
    runs = list(dict.fromkeys(e.run for e in entries))
    # One result a benchmark, each in a file of its own name, is one run.
    single = len({e.title for e in entries}) == len(entries)
    for run in ["ours"] if single else runs:
        chosen = {e.title: e.interval.value for e in entries if single or e.run == run}
        series[run] = [chosen.get(a) for a in axes]
    return radar(axes, series)


def _section(e: Entry, pictures: Pictures | None) -> str:
    coverage = e.result["coverage"]
    parts = [f"<h2>{escape(e.title)}: {escape(e.run)}</h2>"]
    parts.append(f"<p>answered {coverage['answered']:,} of {coverage['expected']:,}</p>")
    parts += [f'<p class="warn">{escape(line)}</p>' for line in coverage["details"]]
    parts += [f'<p class="soft">{escape(line)}</p>' for line in e.result.get("notes", ())]
    totals = [[k, number(v)] for k, v in e.result["totals"].items()]
    parts.append(_table(["", "value"], totals))
    for name, rows in e.result.get("tables", {}).items():
        open_ = " open" if len(rows) <= 20 else ""
        parts.append(
            f"<details{open_}><summary>{escape(name)}</summary>{_table(*grid(rows))}</details>"
        )
    parts.append(_figures(e))
    parts.append(_gallery(e, pictures))
    return "".join(parts)


def _figures(e: Entry) -> str:
    """What a model sees that is not there (POPE, CHAIR)."""
    if e.task not in ("pope", "chair"):
        return ""
    parts = []
    if e.task == "pope":
        ratios = {k: float(v["Yes ratio"]) for k, v in e.result["tables"]["per split"].items()}
        truth = [s["truth"] == "yes" for s in e.result["per_sample"].values()]
        parts.append(
            f"<div><p>share of “yes”; line: truth</p>{bars(ratios, 1.0, sum(truth) / len(truth))}</div>"
        )
    if seen := hallucinated(e):
        parts.append(f"<div><p>seen where it is not</p>{bars(dict(seen))}</div>")
    return f'<div class="figures">{"".join(parts)}</div>'


def _gallery(e: Entry, pictures: Pictures | None) -> str:
    cards = "".join(_card(key, s, pictures) for key, s in failures(e))
    if not cards:
        return ""
    return f'<details><summary>failures</summary><div class="gallery">{cards}</div></details>'


def _card(key: str, s: dict[str, Any], pictures: Pictures | None) -> str:
    picture = pictures.thumbnail(s["image"]) if pictures and s.get("image") else ""
    shown = f'<img alt="{escape(s["image"])}" src="{picture}">' if picture else ""
    truth = s["truth"] if isinstance(s["truth"], str) else json.dumps(s["truth"])
    lines = [("question", s.get("prompt", "")), ("answer", s["answer"]), ("truth", truth)]
    if s.get("parsed") not in (None, s["answer"]):
        lines.insert(2, ("read as", str(s["parsed"])))
    text = "".join(f"<p><b>{k}</b> {escape(_short(str(v)))}</p>" for k, v in lines if v != "")
    return f'<div class="card">{shown}<p class="soft">{escape(key)}</p>{text}</div>'


def _short(text: str, limit: int = 400) -> str:
    return text if len(text) <= limit else text[:limit] + " …"


def _comparison(comparisons: Sequence[Comparison]) -> str:
    parts = ["<h2>Comparison</h2>", _table(COMPARISON_HEADER, comparison_rows(comparisons))]
    parts.append('<p class="soft">p: exact McNemar test; ! below 0.05.</p>')
    for c in comparisons:
        if c.flips.only_one:
            note = f"{c.title}: {c.flips.only_one} questions are in one run only and not compared"
            parts.append(f'<p class="warn">{escape(note)}</p>')
        cards = []
        for name, keys in (("gained", c.flips.gained), ("lost", c.flips.lost)):
            for key in keys[:8]:
                one, two = (x.result["per_sample"][key] for x in (c.first, c.second))
                lines = [
                    (name, key),
                    ("question", one.get("prompt", "")),
                    (c.first.run, one["answer"]),
                    (c.second.run, two["answer"]),
                    ("truth", one["truth"]),
                ]
                text = "".join(
                    f"<p><b>{escape(k)}</b> {escape(_short(str(v)))}</p>" for k, v in lines
                )
                cards.append(f'<div class="card">{text}</div>')
        if cards:
            parts.append(
                f"<details><summary>flips of {escape(c.title)}: {escape(c.second.run)}</summary>"
                f'<div class="gallery">{"".join(cards)}</div></details>'
            )
    return "".join(parts)
