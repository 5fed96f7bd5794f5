"""The sheet shows every answer, and needs no other file."""

import re
from html.parser import HTMLParser

import numpy as np
from PIL import Image

from llava_jax.quickstart import questions
from llava_jax.quickstart.cards import (
    Card,
    Curve,
    Result,
    Sheet,
    make_cards,
    number,
    wrong_note,
)
from llava_jax.quickstart.scenes import sample
from llava_jax.quickstart.sheet import font, write_sheet

RIGHT = Result("Chinese", "左上角的图形是什么颜色？", "红色", "红色")
WRONG = Result("color", "What color is <it> & why?", "red", "blue")


def card(answers):
    return Card(Image.new("RGB", (64, 64), "navy"), answers)


def test_png_shows_the_picture(tmp_path):
    png, _ = write_sheet(Sheet([card([RIGHT] * 4)] * 3, {"color": 0.5}, "note"), tmp_path)
    assert png == tmp_path / "sheet.png"
    with Image.open(png) as sheet:
        pixels = np.asarray(sheet)
    assert (pixels == (0, 0, 128)).all(axis=-1).sum() >= 3 * 200 * 200


def test_any_answer_can_be_drawn(tmp_path):
    odd = Result("color", "?", "a\nb\x00\u202e\ud800 " + "x" * 300 + " \U0001f642", "b")
    png, page = write_sheet(Sheet([card([odd])], {"color": 0.0}, "note"), tmp_path)
    assert png.exists()
    assert "xxx" in page.read_text("utf-8")


def test_html_is_whole_and_escaped(tmp_path):
    sheet = Sheet([card([RIGHT, WRONG])], {"yes/no": 0.987}, "a note")
    _, page = write_sheet(sheet, tmp_path)
    text = page.read_text("utf-8")
    assert "98.7%" in text
    assert "红色" in text
    assert "What color is &lt;it&gt; &amp; why?" in text
    assert "should be: blue" in text
    tags = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    Reader().feed(text)
    images = [attrs["src"] for tag, attrs in tags if tag == "img"]
    assert len(images) == 1
    assert images[0].startswith("data:image/png;base64,")
    assert not any(tag in ("script", "link") for tag, _ in tags)


def row(picture, answer="red", before=()):
    asked = {"image": str(picture), "kind": "color", "text": "What color?\nIn a word."}
    return {**asked, "answer": "blue", "said": answer, "before": before}


def test_everything_a_person_wants_to_know_is_on_it(tmp_path):
    (tmp_path / "heldout").mkdir()
    card([]).picture.save(tmp_path / "heldout" / "7.png")
    wrong = [row(tmp_path / "heldout" / "7.png"), row(tmp_path / "heldout" / "7.png", "", (1, 2))]
    sheet = Sheet(
        [card([RIGHT])],
        {"color": 1.0},
        "a note",
        make_cards(wrong, titles=True),
        wrong_note({"n": 9, "right": 8, "wrong": wrong[:1]}, {"n": 0, "right": 0, "wrong": wrong}),
        [Curve("stage 1: projector", [5.0, 3.0, 0.5, 0.25])],
        [("size", "797,376 parameters"), ("time", "7 min 55 s")],
        "llava-jax chat --model runs/export",
    )
    png, page = write_sheet(sheet, tmp_path)
    text = page.read_text("utf-8")
    for words in (
        *("797,376 parameters", "7 min 55 s", "llava-jax chat --model runs/export"),
        *("stage 1: projector", "loss 5.0 to 0.25 in 4 steps", "<polyline", "heldout/7.png"),
        *("1 of 9 questions. The first 50", "What color?", "(question 3 of a conversation)"),
        *("should be: blue", "(nothing)"),
    ):
        assert words in text, words
    assert "of 0" not in text
    assert "In a word" not in text
    with Image.open(png) as drawn:
        short, _ = write_sheet(Sheet(sheet.cards, sheet.scores, sheet.note), tmp_path)
        with Image.open(short) as less:
            assert drawn.height > less.height + 400


def test_no_line_of_the_page_is_wider_than_a_phone(tmp_path):
    """What would be: a fixed width over 340 pixels, columns that cannot shrink, text that cannot break."""
    _, page = write_sheet(Sheet([card([RIGHT, WRONG])], {"color": 1.0}, "note"), tmp_path)
    text = page.read_text("utf-8")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    style = text[text.index("<style>") : text.index("</style>")]
    for rule in re.findall(r"minmax\((.*?), 1fr\)", style):
        assert "100%" in rule or int(re.findall(r"\d+", rule)[0]) < 150, rule
    widths = re.findall(r"(?<![\w-])(?:min-)?width: (\d+)px", style)
    assert all(int(width) < 340 for width in widths)
    for rule in ("overflow-wrap: anywhere", "flex-wrap: wrap", "white-space: pre-wrap"):
        assert rule in style


def test_answers_about_a_picture_share_its_card(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        card([]).picture.save(path)
    cards = make_cards([row(path) for path in paths] * 2)
    assert [len(c.results) for c in cards] == [2] * 3
    assert [c.title for c in cards] == [""] * 3
    assert make_cards([]) == []
    none = {"n": 5, "right": 5, "wrong": []}
    assert wrong_note(none, none) == "0 of 5 questions and 0 of 5 follow-up questions."


def test_curves():
    assert Curve("a", [1.0] * 3).points() == [(0, 0), (0.5, 0), (1, 0)]
    points = Curve("a", [10.0 ** -(i / 100) for i in range(1000)]).points(50)
    assert len(points) == 50
    assert (points[0], points[-1]) == ((0, 1), (1, 0))
    assert Curve("a", [0.5]).points() == [(0, 0)]
    assert [number(x) for x in (6.213, 0.0127, 0.00041, 12.7, 0)] == [
        *("6.2", "0.013", "0.00041", "13", "0"),
    ]


def test_the_font_has_every_character_of_the_questions():
    import random

    face = font(20)
    missing = face.getmask("\U0010fffd").getbbox(), bytes(face.getmask("\U0010fffd"))
    used = set()
    for i, objects in enumerate(sample(300, 0).objects()):
        for ask in questions.KINDS.values():
            used.update("".join(ask(objects, random.Random(i))))
    for character in used - set(" \n"):
        mask = face.getmask(character)
        assert (mask.getbbox(), bytes(mask)) != missing, character
