"""The report as Markdown."""

from collections.abc import Sequence

from llava_jax.eval.entries import (
    LEGEND,
    SUMMARY_HEADER,
    Comparison,
    Entry,
    hallucinated,
    summary_rows,
)
from llava_jax.eval.show import grid, number


def markdown(entries: Sequence[Entry], comparisons: Sequence[Comparison], title: str) -> str:
    """The page as Markdown text."""
    parts = [f"# {_cell(title)}", table(SUMMARY_HEADER, summary_rows(entries)), LEGEND]
    if comparisons:
        parts += ["## Comparison", comparison_table(comparisons)]
    for e in entries:
        parts.append(f"## {_cell(e.title)}: {_cell(e.run)}")
        totals = [[name, number(value)] for name, value in e.result["totals"].items()]
        parts.append(table(["", "value"], totals))
        notes = [*e.result["coverage"]["details"], *e.result.get("notes", ())]
        parts += [f"- {_cell(note)}" for note in notes]
        for name, rows in e.result.get("tables", {}).items():
            parts += [f"### {_cell(name)}", table(*grid(rows))]
        if e.task in ("pope", "chair") and (seen := hallucinated(e)):
            words = ", ".join(f"{k} {n}" for k, n in seen.items())
            parts.append(f"Most often seen where it is not: {_cell(words)}")
    return "\n\n".join(parts) + "\n"


COMPARISON_HEADER = ["benchmark", "from", "to", "right in both", "gained", "lost", "neither", "p"]


def comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Cells of the table of flips."""
    return [
        [
            c.title,
            f"{c.first.run} {number(c.first.interval.value)}",
            f"{c.second.run} {number(c.second.interval.value)}",
            str(c.flips.both),
            str(len(c.flips.gained)),
            str(len(c.flips.lost)),
            str(c.flips.neither),
            f"{c.flips.p:.2g}" + (" !" if c.flips.p < 0.05 else ""),
        ]
        for c in comparisons
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """The table of flips, and what it leaves out."""
    text = table(COMPARISON_HEADER, comparison_rows(comparisons))
    alone = sum(c.flips.only_one for c in comparisons)
    return text + (f"\n\n{alone} questions are in one run only and not compared." if alone else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(map(_cell, header)) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(header))) + "|")
    lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    return "\n".join(lines)


def _cell(text: object) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
