"""What the model said about some pictures, as one PNG and as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_PAPER, _CARD, _INK, _SOFT, _LINE = "#f4f5f7", "#ffffff", "#1c2430", "#6b7686", "#e3e7ec"
_RIGHT, _WRONG, _ACCENT = "#1f8a4c", "#c9302c", "#2f5fd0"
_COLUMNS, _CARD_WIDTH, _PICTURE, _GAP, _PAD = 2, 760, 220, 28, 24


@dataclass(frozen=True)
class Answered:
    """One question, what the model said, and what is true. `question` is without prompt suffixes."""

    kind: str
    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        return self.answer == self.truth


@dataclass(frozen=True)
class Card:
    """A picture and everything that was asked about it."""

    picture: Image.Image
    answers: Sequence[Answered]


def write_sheet(
    cards: Sequence[Card], scores: dict[str, float], folder: Path, note: str
) -> tuple[Path, Path]:
    """Writes sheet.png and sheet.html into `folder`; returns their paths.

    scores: exact match by kind, 0 to 1. note: the line under the title.
    """
    png, page = folder / "sheet.png", folder / "sheet.html"
    draw_sheet(cards, scores, note).save(png)
    page.write_text(html_sheet(cards, scores, note), encoding="utf-8", errors="replace")
    return png, page


# PNG ------------------------------------------------------------------------------------------------


def font(size: int) -> ImageFont.FreeTypeFont:
    """The bundled font: ASCII and the Chinese characters of the questions."""
    data = resources.files("llava_jax").joinpath("assets/sheet-font.otf").read_bytes()
    # BASIC: raqm, where it is there, refuses some of what an untrained model says.
    return ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)


def draw_sheet(cards: Sequence[Card], scores: dict[str, float], note: str) -> Image.Image:
    """The sheet as a picture: title, scores, then the cards in two columns."""
    drawn = [_draw_card(card) for card in cards]
    rows = [drawn[i : i + _COLUMNS] for i in range(0, len(drawn), _COLUMNS)]
    width = _COLUMNS * _CARD_WIDTH + (_COLUMNS + 1) * _GAP
    head = _draw_head(scores, note, width)
    height = head.height + sum(max(c.height for c in row) + _GAP for row in rows)
    sheet = Image.new("RGB", (width, height), _PAPER)
    sheet.paste(head, (0, 0))
    y = head.height
    for row in rows:
        tallest = max(card.height for card in row)
        for i, card in enumerate(row):
            x = _GAP + i * (_CARD_WIDTH + _GAP)
            box = (x, y, x + _CARD_WIDTH, y + tallest)
            ImageDraw.Draw(sheet).rounded_rectangle(box, 14, _CARD, _LINE, 2)
            sheet.paste(card, (x, y), _rounded_mask(card.size))
        y += tallest + _GAP
    return sheet


def _rounded_mask(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    box = (2, 2, size[0] - 3, size[1] - 3)
    ImageDraw.Draw(mask).rounded_rectangle(box, 12, fill=255)
    return mask


def _draw_head(scores: dict[str, float], note: str, width: int) -> Image.Image:
    head = Image.new("RGB", (width, 196), _PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((_GAP, 22), "LLaVA quickstart: what the model says", _INK, font(34))
    draw.text((_GAP, 72), note, _SOFT, font(19))
    column = (width - 2 * _GAP) / max(len(scores), 1)
    for i, (kind, score) in enumerate(scores.items()):
        x = _GAP + i * column
        draw.text((x, 112), kind, _SOFT, font(17))
        draw.text((x, 134), f"{score:.1%}", _INK, font(22))
        draw.rectangle((x, 168, x + column - 18, 174), _LINE)
        draw.rectangle((x, 168, x + (column - 18) * score, 174), _ACCENT)
    return head


def _draw_card(card: Card) -> Image.Image:
    left, right = _PAD + _PICTURE + _PAD, _CARD_WIDTH - _PAD
    small, large = font(17), font(20)
    blocks, y = [], _PAD
    for item in card.answers:
        question = _wrap(item.question, small, right - left)
        answer = _wrap(item.answer or "(nothing)", large, right - left - 30)
        if not item.right:
            answer += _wrap(f"should be: {item.truth}", large, right - left - 30)
        blocks.append((y, question, answer, item.right))
        y += 23 * len(question) + 27 * len(answer) + 13
    canvas = Image.new("RGB", (_CARD_WIDTH, max(y + 8, _PICTURE + 2 * _PAD)), _CARD)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(card.picture.resize((_PICTURE, _PICTURE), Image.Resampling.LANCZOS), (_PAD, _PAD))
    for y, question, answer, good in blocks:
        for line in question:
            draw.text((left, y), line, _SOFT, small)
            y += 23
        _draw_mark(draw, left, y + 5, good)
        for line in answer:
            draw.text((left + 30, y), line, _INK if good else _WRONG, large)
            y += 27
    return canvas


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, good: bool) -> None:
    if good:
        draw.line([(x + 2, y + 9), (x + 8, y + 15), (x + 19, y + 3)], _RIGHT, 3, joint="curve")
    else:
        draw.line([(x + 3, y + 3), (x + 17, y + 17)], _WRONG, 3)
        draw.line([(x + 17, y + 3), (x + 3, y + 17)], _WRONG, 3)


def _wrap(text: str, face: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Lines of at most `width` pixels, broken at spaces where there are any."""
    text = "".join(c if c.isprintable() else " " for c in text)
    lines, line = [], ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if face.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while face.getlength(word) > width:
            lengths = range(2, len(word))
            fits = max((n for n in lengths if face.getlength(word[:n]) <= width), default=1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line]


# HTML -----------------------------------------------------------------------------------------------

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>LLaVA quickstart</title>
<style>
body {{ margin: 0 auto; max-width: 1180px; padding: 28px; background: {paper}; color: {ink};
  font: 16px/1.45 system-ui, "Noto Sans", "Noto Sans SC", sans-serif }}
h1 {{ margin: 0 0 4px; font-size: 27px }} .note, .q, .kind {{ color: {soft} }}
.scores {{ display: flex; flex-wrap: wrap; gap: 18px; margin: 20px 0 26px }}
.score {{ flex: 1; min-width: 84px }} .score b {{ font-size: 19px }}
.bar {{ height: 5px; background: {line}; margin-top: 4px }}
.bar i {{ display: block; height: 5px; background: {accent} }}
.cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 22px }}
.card {{ display: flex; gap: 20px; padding: 20px; background: {card}; border: 1px solid {line};
  border-radius: 12px }}
.card img {{ width: 176px; height: 176px; border-radius: 6px }}
dl {{ margin: 0; min-width: 0; overflow-wrap: anywhere }} dt {{ font-size: 14px }}
dd {{ margin: 0 0 9px; font-weight: 600 }} .right::before {{ content: "\\2713\\a0"; color: {right} }}
.wrong {{ color: {wrong} }} .wrong::before {{ content: "\\2717\\a0" }}
</style>
<h1>LLaVA quickstart: what the model says</h1><div class="note">{note}</div>
<div class="scores">{scores}</div><div class="cards">{cards}</div></html>
"""


def html_sheet(cards: Sequence[Card], scores: dict[str, float], note: str) -> str:
    """The sheet as a page that needs no other file."""
    bars = "".join(
        f'<div class="score"><span class="kind">{html.escape(kind)}</span><br><b>{score:.1%}</b>'
        f'<div class="bar"><i style="width:{score:.1%}"></i></div></div>'
        for kind, score in scores.items()
    )
    return _PAGE.format(
        note=html.escape(note),
        scores=bars,
        cards="".join(map(_html_card, cards)),
        paper=_PAPER,
        card=_CARD,
        ink=_INK,
        soft=_SOFT,
        line=_LINE,
        accent=_ACCENT,
        right=_RIGHT,
        wrong=_WRONG,
    )


def _html_card(card: Card) -> str:
    data = io.BytesIO()
    card.picture.save(data, "PNG")
    source = base64.b64encode(data.getvalue()).decode()
    rows = []
    for item in card.answers:
        said = html.escape(item.answer or "(nothing)")
        if not item.right:
            said += f" (should be: {html.escape(item.truth)})"
        mark = "right" if item.right else "wrong"
        rows.append(
            f'<dt class="q">{html.escape(item.question)}</dt><dd class="{mark}">{said}</dd>'
        )
    image = f'<img alt="the picture asked about" src="data:image/png;base64,{source}">'
    return f'<div class="card">{image}<dl>{"".join(rows)}</dl></div>'
