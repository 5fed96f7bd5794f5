"""Follow-up questions are asked as a conversation asks them, and scored by their turn's answer."""

import PIL.Image
import pytest

from llava_jax.train.evaluate import (
    Question,
    answers,
    conversation_match,
    score,
)
from tests.generate.tiny import model


@pytest.fixture
def picture(tmp_path):
    PIL.Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 50).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def test_follow_ups_see_what_the_model_said_before(picture):
    texts = ["what?", "where?", "why?"]
    limit = 8 + len(model().tokenizer.encode(""))
    talk = model().chat(max_new_tokens=limit)
    first, *rest = [
        talk.say(text, picture if text == "what?" else None).text.strip() for text in texts
    ]
    asked = [Question(picture, text, "") for text in texts]
    got = conversation_match(model(), [asked, asked[:1]], quiet=True)
    assert got["n"] == 2
    assert [row["text"] for row in got["wrong"]] == texts[1:]
    assert [row["said"] for row in got["wrong"]] == rest
    assert got["wrong"][1]["before"] == (("what?", first), ("where?", rest[0]))


def test_alone_a_question_is_alone(picture):
    question = Question(picture, "what?", "x")
    want = model().generate("what?", picture, max_new_tokens=40).text.strip()
    (row,) = score([question], answers(model(), [question], quiet=True))["wrong"]
    assert want.startswith(row["said"][:5])
    assert row["before"] == ()


def test_a_question_of_a_bad_picture_is_not_asked(picture, tmp_path, caplog):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    images = [picture, str(bad), None, [picture, str(bad)], [picture, picture], str(bad)]
    asked = [Question(image, "what?", "x") for image in images]
    found = answers(model(), asked, quiet=True)
    assert [reply is None for reply in found] == [False, True, False, True, False, True]
    assert score(asked, found)["n"] == 3
    assert sum("bad.png" in line for line in caplog.messages) == 1


def test_scores():
    asked = [Question("a", "?", answer, kind) for answer, kind in zip("xyz ", ("b", "b", "c", "c"))]
    got = score(asked, ["x", "n", "z", ""])
    assert (got["mean"], got["n"], got["right"]) == (0.75, 4, 3)
    assert got["kinds"] == {"b": 0.5, "c": 1.0}
    assert [row["said"] for row in got["wrong"]] == ["n"]
    assert score([], [])["n"] == conversation_match(None, [])["n"] == 0
