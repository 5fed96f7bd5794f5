import io

import pytest

from llava_jax.text.sample import ExampleMaker
from llava_jax.text.show import show_example, wants_colour

RECORD = {
    "id": "r1",
    "image": "a.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?"},
        {"from": "gpt", "value": "A 鬻 cat"},
        {"from": "human", "value": "Where\x1b[2J?"},
        {"from": "gpt", "value": "A mat"},
    ],
}


@pytest.fixture(scope="module")
def example(tok):
    return ExampleMaker(tok, image_tokens=9)(RECORD)


def test_without_colours(example, tok):
    shown = show_example(example, tok, image_tokens=9, colour=False)
    assert shown.startswith(f"sample r1: {len(example.ids)} tokens, ")
    assert "image 0: a.jpg" in shown
    assert "USER: <image a.jpg> \nWhat? ASSISTANT:⟦ A 鬻 cat</s>⟧USER: Where" in shown
    assert shown.endswith("ASSISTANT:⟦ A mat</s>⟧")
    assert "\033" not in shown
    assert "Where\\x1b[2J?" in shown


def test_with_colours(example, tok):
    shown = show_example(example, tok, colour=True)
    assert "ASSISTANT:\033[1;32m A 鬻 cat</s>\033[0mUSER:" in shown
    assert "⟦" not in shown


def test_table(example, tok):
    shown = show_example(example, tok, image_tokens=9, colour=False, table=True)
    rows = shown.split("\n\n")[-1].splitlines()
    assert len(rows) == 1 + len(example.ids)
    assert sum(" yes " in row for row in rows) == (example.labels >= 0).sum()
    assert int(rows[-1].split()[0]) == example.length(9) - 1
    assert any(row.endswith("<image> x 9") for row in rows)


def test_independent_turns(tok):
    shown = show_example(ExampleMaker(tok, turns="independent")(RECORD), tok, colour=False)
    assert "-- turn 1 --" in shown
    assert "-- turn 2 --" in shown


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
