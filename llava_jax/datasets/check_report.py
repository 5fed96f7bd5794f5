"""What `llava-jax data check` found: as text, as JSON and as a page."""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.datasets.findings import BAD, NOTES
from llava_jax.util import printable, write_json, write_text

if TYPE_CHECKING:
    from llava_jax.datasets.check import Checked

REPORTS = ("check.json", "check.html")
SHOWN = 5
"""Examples of a kind in the text."""
ON_PAGE = 200
"""Examples of a kind on the page."""


def kinds(checked: Checked) -> list[tuple[str, str, int]]:
    """(kind, what comes of it, how many) of what was found: what is bad first, most frequent first."""
    rows = [(k, (BAD | NOTES).get(k, ""), n) for k, n in checked.counts.items()]
    return sorted(rows, key=lambda row: (row[0] not in BAD, -row[2], row[0]))


def in_words(checked: Checked) -> str:
    """The counts by kind with the first examples."""
    lines = [f"{checked.file}: {checked.records:,} records, {checked.pictures:,} pictures"]
    counts = {"records": checked.records, "pictures": checked.pictures}
    rates = [f"{counts[k] / s:,.0f} {k} a second" for k, s in checked.seconds.items() if s]
    if checked.peak_mb:
        rates.append(f"at most {checked.peak_mb} MB in a process")
    lines.append(", ".join(rates))
    lines += [f"compared with {told}" for told in checked.against]
    for kind, meaning, count in kinds(checked):
        mark = "BAD " if kind in BAD else "note"
        lines.append(f"{mark} {count:>8,}  {kind}: {meaning}")
        rows = [(i, name, f) for i, name, f in checked.rows if f.kind == kind]
        for index, name, finding in rows[:SHOWN]:
            lines.append(printable(f"                 [{index}] {name}: {finding.detail}", keep=""))
    if not checked.bad:
        lines.append("training takes all of it")
    return "\n".join(lines)


def as_json(checked: Checked) -> dict[str, Any]:
    """Everything, JSON-ready. findings: all that is bad, and the first 1,000 notes of each kind."""
    return {
        "file": checked.file,
        "images": checked.images,
        "records": checked.records,
        "pictures": checked.pictures,
        "bad": checked.bad,
        "worker_peak_mb": checked.peak_mb,
        "against": checked.against,
        "seconds": {k: round(s, 1) for k, s in checked.seconds.items()},
        "kinds": [
            {"kind": kind, "bad": kind in BAD, "count": count, "meaning": meaning}
            for kind, meaning, count in kinds(checked)
        ],
        "findings": [
            {"index": index, "id": name, "kind": finding.kind, "detail": finding.detail}
            for index, name, finding in checked.rows
        ],
    }


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 1100px; padding: 24px; font: 16px/1.5 system-ui, sans-serif }}
table {{ border-collapse: collapse; width: 100% }} td {{ padding: 3px 10px 3px 0; vertical-align: top }}
td {{ border-top: 1px solid #ddd; overflow-wrap: anywhere }} .bad {{ color: #b3261e }}
summary {{ margin: 10px 0; font-weight: 600; cursor: pointer }}
</style>
<h1>{title}</h1><p>{records:,} records, {pictures:,} pictures below {images}: {bad:,} bad</p>
{body}
</html>
"""


def page(checked: Checked) -> str:
    """A page with each kind to unfold."""
    parts = []
    for kind, meaning, count in kinds(checked):
        rows = [row for row in checked.rows if row[2].kind == kind]
        cells = "".join(
            f"<tr><td>{index}</td><td>{_safe(name)}</td><td>{_safe(finding.detail)}</td></tr>"
            for index, name, finding in rows[:ON_PAGE]
        )
        more = f"<p>and {count - ON_PAGE:,} more</p>" if count > ON_PAGE else ""
        mark = ' class="bad"' if kind in BAD else ""
        parts.append(
            f"<details><summary{mark}>{count:,} {_safe(kind)}: {_safe(meaning)}</summary>"
            f"<table>{cells}</table>{more}</details>"
        )
    facts = {"records": checked.records, "pictures": checked.pictures, "bad": checked.bad}
    body = "\n".join(parts) or "<p>Nothing was found.</p>"
    return _PAGE.format(
        title=_safe(checked.file), images=_safe(checked.images or "."), body=body, **facts
    )


def write_report(checked: Checked, folder: Path) -> None:
    """Writes check.json and check.html."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REPORTS[0], as_json(checked), indent=1)
    write_text(folder / REPORTS[1], page(checked))


def _safe(text: str) -> str:
    return html.escape(printable(str(text), keep=""))
