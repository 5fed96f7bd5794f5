"""What the model said about some pictures, as one PNG and as one self-contained HTML page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava_jax.quickstart import cards as look
from llava_jax.quickstart.cards import Card, Curve, Sheet
from llava_jax.quickstart.sheet_html import html_sheet

_COLUMNS, _CARD_WIDTH, _PICTURE, _GAP, _PAD = 2, 760, 220, 28, 24
_WIDTH = _COLUMNS * _CARD_WIDTH + (_COLUMNS + 1) * _GAP


def write_sheet(sheet: Sheet, folder: Path) -> tuple[Path, Path]:
    """Writes sheet.png and sheet.html into `folder`; returns their paths."""
    png, page = folder / "sheet.png", folder / "sheet.html"
    draw_sheet(sheet).save(png)
    page.write_text(html_sheet(sheet), encoding="utf-8", errors="replace")
    return png, page


# PNG ------------------------------------------------------------------------------------------------


def font(size: int) -> ImageFont.FreeTypeFont:
    """The bundled font: ASCII and the Chinese characters of the questions."""
    data = resources.files("llava_jax").joinpath("assets/sheet-font.otf").read_bytes()
    # BASIC: raqm, where it is there, refuses some of what an untrained model says.
    return ImageFont.truetype(io.BytesIO(data), size, layout_engine=ImageFont.Layout.BASIC)


def draw_sheet(sheet: Sheet) -> Image.Image:
    """The sheet as a picture: head, curves, then the cards in two columns, wrong answers last."""
    parts = [_draw_head(sheet)]
    if sheet.curves:
        parts.append(_draw_curves(sheet.curves))
    parts.append(_draw_cards(sheet.cards))
    if sheet.wrong_note:
        parts.append(_draw_words("What it got wrong", sheet.wrong_note))
        parts.append(_draw_cards(sheet.wrong))
    whole = Image.new("RGB", (_WIDTH, sum(part.height for part in parts)), look.PAPER)
    y = 0
    for part in parts:
        whole.paste(part, (0, y))
        y += part.height
    return whole


def _draw_cards(cards: Sequence[Card]) -> Image.Image:
    drawn = [_draw_card(card) for card in cards]
    rows = [drawn[i : i + _COLUMNS] for i in range(0, len(drawn), _COLUMNS)]
    tallest = [max(card.height for card in row) for row in rows]
    canvas = Image.new("RGB", (_WIDTH, sum(tallest) + _GAP * len(rows)), look.PAPER)
    y = 0
    for row, height in zip(rows, tallest):
        for i, card in enumerate(row):
            x = _GAP + i * (_CARD_WIDTH + _GAP)
            box = (x, y, x + _CARD_WIDTH, y + height)
            ImageDraw.Draw(canvas).rounded_rectangle(box, 14, look.CARD, look.LINE, 2)
            canvas.paste(card, (x, y), _rounded_mask(card.size))
        y += height + _GAP
    return canvas


def _rounded_mask(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    box = (2, 2, size[0] - 3, size[1] - 3)
    ImageDraw.Draw(mask).rounded_rectangle(box, 12, fill=255)
    return mask


def _draw_words(title: str, note: str) -> Image.Image:
    lines = _wrap(note, font(19), _WIDTH - 2 * _GAP) if note else []
    canvas = Image.new("RGB", (_WIDTH, 46 + 25 * len(lines) + 8 * bool(lines)), look.PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP, 4), title, look.INK, font(26))
    for i, line in enumerate(lines):
        draw.text((_GAP, 42 + 25 * i), line, look.SOFT, font(19))
    return canvas


def _draw_head(sheet: Sheet) -> Image.Image:
    words = [f"{name}: {value}" for name, value in sheet.facts]
    words += [f"talk with it: {sheet.command}"] if sheet.command else []
    lines = [line for text in (sheet.note, *words) for line in _wrap(text, font(19), _WIDTH - 56)]
    top = 84 + 25 * len(lines)
    head = Image.new("RGB", (_WIDTH, top + 90), look.PAPER)
    draw = ImageDraw.Draw(head)
    draw.text((_GAP, 22), look.TITLE, look.INK, font(34))
    for i, line in enumerate(lines):
        draw.text((_GAP, 72 + 25 * i), line, look.SOFT, font(19))
    column = (_WIDTH - 2 * _GAP) / max(len(sheet.scores), 1)
    for i, (kind, score) in enumerate(sheet.scores.items()):
        x = _GAP + i * column
        draw.text((x, top + 6), kind, look.SOFT, font(17))
        draw.text((x, top + 28), f"{score:.1%}", look.INK, font(22))
        draw.rectangle((x, top + 62, x + column - 18, top + 68), look.LINE)
        if score:
            draw.rectangle((x, top + 62, x + (column - 18) * score, top + 68), look.ACCENT)
    return head


def _draw_curves(curves: Sequence[Curve]) -> Image.Image:
    """The losses side by side, each on a log scale of its own."""
    canvas = Image.new("RGB", (_WIDTH, 220 + _GAP), look.PAPER)
    draw = ImageDraw.Draw(canvas)
    step = (_WIDTH - _GAP) / len(curves)
    width = step - _GAP
    for i, curve in enumerate(curves):
        x = _GAP + i * step
        draw.rounded_rectangle((x, 0, x + width, 220), 14, look.CARD, look.LINE, 2)
        inner = width - 2 * _PAD
        for text, y in ((curve.title, 14), (curve.words, 188)):
            draw.text((x + _PAD, y), _wrap(text, font(16), inner)[0], look.SOFT, font(16))
        points = [(x + _PAD + inner * a, 176 - 130 * b) for a, b in curve.points()]
        draw.line(points, look.ACCENT, 3, joint="curve")
    return canvas


def _draw_card(card: Card) -> Image.Image:
    left, right = _PAD + _PICTURE + _PAD, _CARD_WIDTH - _PAD
    small, large = font(17), font(20)
    head = _wrap(card.title, small, right - _PAD) if card.title else []
    top = _PAD + 26 * len(head)
    blocks, y = [], top
    for item in card.results:
        question = _wrap(item.question, small, right - left)
        answer = _wrap(item.answer or "(nothing)", large, right - left - 30)
        truth = [] if item.right else _wrap(f"should be: {item.truth}", small, right - left - 30)
        blocks.append((y, question, answer, truth))
        y += 23 * len(question + truth) + 27 * len(answer) + 13
    canvas = Image.new("RGB", (_CARD_WIDTH, max(y + 8, top + _PICTURE + _PAD)), look.CARD)
    draw = ImageDraw.Draw(canvas)
    for i, line in enumerate(head):
        draw.text((_PAD, _PAD - 8 + 26 * i), line, look.SOFT, small)
    canvas.paste(card.picture.resize((_PICTURE, _PICTURE), Image.Resampling.LANCZOS), (_PAD, top))
    for y, question, answer, truth in blocks:
        for line in question:
            draw.text((left, y), line, look.SOFT, small)
            y += 23
        _draw_mark(draw, left, y + 5, not truth)
        for line in answer:
            draw.text((left + 30, y), line, look.WRONG if truth else look.INK, large)
            y += 27
        for line in truth:
            draw.text((left + 30, y), line, look.INK, small)
            y += 23
    return canvas


def _draw_mark(draw: ImageDraw.ImageDraw, x: int, y: int, good: bool) -> None:
    if good:
        draw.line([(x + 2, y + 9), (x + 8, y + 15), (x + 19, y + 3)], look.RIGHT, 3, joint="curve")
    else:
        draw.line([(x + 3, y + 3), (x + 17, y + 17)], look.WRONG, 3)
        draw.line([(x + 17, y + 3), (x + 3, y + 17)], look.WRONG, 3)


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
