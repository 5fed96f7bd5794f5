"""The quickstart's sheet as one HTML page that needs no other file, on a screen or a phone."""

from __future__ import annotations

import base64
import html
import io

from llava_jax.quickstart import cards
from llava_jax.quickstart.cards import Card, Curve, Result, Sheet

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>LLaVA quickstart</title>
<style>
* {{ box-sizing: border-box }}
body {{ margin: 0 auto; max-width: 1180px; padding: clamp(14px, 3vw, 28px); background: {PAPER};
  color: {INK}; font: 16px/1.45 system-ui, "Noto Sans", "Noto Sans SC", sans-serif;
  overflow-wrap: anywhere }}
h1 {{ margin: 0 0 4px; font-size: 27px; line-height: 1.2 }} h2 {{ margin: 34px 0 6px; font-size: 20px }}
.note, .q, .kind {{ color: {SOFT} }} .kind {{ font-size: 14px }}
.grid {{ display: grid; gap: 22px; margin-top: 18px;
  grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)) }}
.small {{ grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)) }}
.scores {{ gap: 14px 18px; grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)) }}
.score b {{ font-size: 19px }}
.bar {{ height: 5px; background: {LINE}; margin-top: 4px }}
.bar i {{ display: block; height: 5px; background: {ACCENT} }}
.card {{ display: flex; flex-wrap: wrap; align-items: flex-start; align-content: flex-start;
  gap: 6px 20px; padding: 18px; background: {CARD}; border: 1px solid {LINE}; border-radius: 12px }}
.card img {{ width: 176px; max-width: 100%; border-radius: 6px; margin-bottom: 8px }}
.card h3 {{ flex: 1 0 100%; margin: 0 0 6px; font-size: 15px; color: {SOFT} }}
.card svg {{ display: block; width: 100%; height: 110px }} .card p {{ margin: 0; width: 100% }}
dl {{ flex: 1 1 200px; margin: 0; min-width: 0 }} dt {{ font-size: 14px }}
dd {{ margin: 0 0 9px; font-weight: 600 }} .right::before {{ content: "\\2713\\a0"; color: {RIGHT} }}
.wrong {{ color: {WRONG} }} .wrong::before {{ content: "\\2717\\a0" }}
.truth {{ color: {INK}; font-weight: 400 }}
pre {{ margin: 8px 0 0; padding: 12px; white-space: pre-wrap; background: {CARD};
  border: 1px solid {LINE}; border-radius: 8px }}
</style>
<h1>{TITLE}</h1><div class="note">{note}</div>
{body}</html>
"""
_COLORS = {name: getattr(cards, name) for name in ("PAPER", "CARD", "INK", "SOFT", "LINE")}
_COLORS |= {name: getattr(cards, name) for name in ("RIGHT", "WRONG", "ACCENT", "TITLE")}


def html_sheet(sheet: Sheet) -> str:
    """The page."""
    facts = "".join(f"<div>{_e(name)}: <b>{_e(value)}</b></div>" for name, value in sheet.facts)
    parts = [facts, _grid("scores", [_score(*pair) for pair in sheet.scores.items()])]
    if sheet.command:
        parts.append(f"<h2>Talk with it</h2><pre>{_e(sheet.command)}</pre>")
    if sheet.curves:
        parts.append("<h2>How it learned</h2>" + _grid("small", map(_curve, sheet.curves)))
    parts.append("<h2>Pictures it never saw</h2>" + _grid("", map(_card, sheet.cards)))
    if sheet.wrong_note:
        parts.append(f'<h2>What it got wrong</h2><div class="note">{_e(sheet.wrong_note)}</div>')
        parts.append(_grid("", map(_card, sheet.wrong)))
    return _PAGE.format(note=_e(sheet.note), body="\n".join(filter(None, parts)), **_COLORS)


def _e(text: str) -> str:
    return html.escape(text)


def _grid(kind: str, cells) -> str:
    inner = "".join(cells)
    return f'<div class="grid {kind}">{inner}</div>' if inner else ""


def _score(kind: str, score: float) -> str:
    return (
        f'<div class="score"><span class="kind">{_e(kind)}</span><br><b>{score:.1%}</b>'
        f'<div class="bar"><i style="width:{score:.1%}"></i></div></div>'
    )


def _curve(curve: Curve) -> str:
    points = " ".join(f"{300 * x:.1f},{100 - 96 * y:.1f}" for x, y in curve.points())
    return (
        f'<div class="card"><h3>{_e(curve.title)}</h3><svg viewBox="0 0 300 104" role="img" '
        f'preserveAspectRatio="none"><polyline points="{points}" fill="none" '
        f'stroke="{cards.ACCENT}" stroke-width="2" vector-effect="non-scaling-stroke"/></svg>'
        f'<p class="note">{_e(curve.words)}</p></div>'
    )


def _card(card: Card) -> str:
    data = io.BytesIO()
    card.picture.save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode()
    title = f"<h3>{_e(card.title)}</h3>" if card.title else ""
    image = f'<img alt="the picture asked about" src="data:image/png;base64,{source}">'
    return f'<div class="card">{title}{image}<dl>{"".join(map(_answer, card.results))}</dl></div>'


def _answer(item: Result) -> str:
    said, mark = _e(item.answer or "(nothing)"), "right" if item.right else "wrong"
    if not item.right:
        said += f' <span class="truth">(should be: {_e(item.truth)})</span>'
    return f'<dt class="q">{_e(item.question)}</dt><dd class="{mark}">{said}</dd>'
