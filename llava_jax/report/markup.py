"""Pieces of HTML: escaped text and tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


class Raw(str):
    """Text that is HTML already."""


def escape(text: object) -> Raw:
    """Text as HTML; what is Raw stays as it is."""
    return text if isinstance(text, Raw) else Raw(html.escape(str(text)))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> Raw:
    """A table that scrolls where it is too wide; the first column names the rows. "" without rows.

    kind: a class of the style sheet.
    """
    lines = [
        f"<tr><th scope=row>{escape(first)}</th>"
        + "".join(f"<td>{escape(text)}</td>" for text in others)
        + "</tr>"
        for first, *others in rows
    ]
    if lines and header:
        names = (f"<th scope=col>{escape(name)}</th>" for name in header)
        lines.insert(0, f"<tr>{''.join(names)}</tr>")
    return Raw(f'<div class="wide {kind}"><table>{"".join(lines)}</table></div>' if lines else "")
