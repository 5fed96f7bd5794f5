"""The sheet shows every answer, and needs no other file."""

from html.parser import HTMLParser

import numpy as np
from PIL import Image

from llava_jax.quickstart import questions
from llava_jax.quickstart.scenes import sample
from llava_jax.quickstart.sheet import Answered, Card, font, write_sheet

RIGHT = Answered("Chinese", "左上角的图形是什么颜色？", "红色", "红色")
WRONG = Answered("color", "What color is <it> & why?", "red", "blue")


def card(answers):
    return Card(Image.new("RGB", (64, 64), "navy"), answers)


def test_png_shows_the_picture(tmp_path):
    png, _ = write_sheet([card([RIGHT] * 4)] * 3, {"color": 0.5}, tmp_path, "note")
    assert png == tmp_path / "sheet.png"
    with Image.open(png) as sheet:
        pixels = np.asarray(sheet)
    assert (pixels == (0, 0, 128)).all(axis=-1).sum() >= 3 * 200 * 200


def test_any_answer_can_be_drawn(tmp_path):
    odd = Answered("color", "?", "a\nb\x00\u202e\ud800 " + "x" * 300 + " \U0001f642", "b")
    png, page = write_sheet([card([odd])], {"color": 0.0}, tmp_path, "note")
    assert png.exists()
    assert "xxx" in page.read_text("utf-8")


def test_html_is_whole_and_escaped(tmp_path):
    _, page = write_sheet([card([RIGHT, WRONG])], {"yes/no": 0.987}, tmp_path, "a note")
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
