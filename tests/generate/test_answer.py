"""Ids to text: stop strings and pieces."""

import random

import pytest

from llava_jax.generate import Answer
from llava_jax.text.tokenizer import Tokenizer
from tests.generate.tiny import tokenizer

TEXT = "  a red disc ### on a table; 猫 and ü, then\n### the end  "


def pieces(tokenizer: Tokenizer, text: str, stop=(), sizes=(1,)) -> tuple[list[str], Answer]:
    """The answer as it comes when `sizes` ids arrive at a time."""
    ids, answer, shown = tokenizer.encode(text, add_bos=False), Answer(tokenizer, stop), []
    rng = random.Random(0)
    while ids and not answer.stopped:
        n = rng.choice(sizes)
        shown.append(answer.push(ids[:n]))
        del ids[:n]
    return [*shown, answer.finish()], answer


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 2, 7), (99,)])
@pytest.mark.parametrize(
    ("stop", "want"),
    [
        ((), TEXT.strip()),
        (("###",), "a red disc"),
        (("\n###",), "a red disc ### on a table; 猫 and ü, then"),
        (("table", "disc #"), "a red"),
        (("猫",), "a red disc ### on a table;"),
        (("####", "the ende", ""), TEXT.strip()),
    ],
)
def test_pieces_join_to_the_text_before_the_stop_string(stop, want, sizes):
    shown, answer = pieces(tokenizer(), TEXT, stop, sizes)
    assert "".join(shown) == want
    assert answer.text == want
    assert answer.stopped == (want != TEXT.strip())


def test_nothing_is_shown_that_may_turn_out_to_be_a_stop_string():
    answer = Answer(tokenizer(), ("###",))
    ids = tokenizer().encode("a ##", add_bos=False)
    assert answer.push(ids) == "a"
    assert answer.push(tokenizer().encode("#", add_bos=False)[-1:]) == ""
    assert answer.stopped
    assert answer.text == "a"


def test_the_ids_that_count_end_with_the_stop_string():
    ids = tokenizer().encode("a red disc on a table", add_bos=False)
    answer = Answer(tokenizer(), ("disc",))
    answer.push(ids)
    assert "disc" in tokenizer().decode(ids[: answer.count])
    assert "disc" not in tokenizer().decode(ids[: answer.count - 1])


def test_a_stop_string_that_is_a_token_ends_the_answer_as_that_token():
    chat = tokenizer().with_tokens(["<|im_end|>"])
    ids = [*chat.encode("a table", add_bos=False), chat.special_tokens["<|im_end|>"]]
    answer = Answer(chat, ("<|im_end|>",))
    assert answer.push([*ids, *ids]) + answer.finish() == "a table"
    assert answer.stopped
    assert answer.count == len(ids)


def test_the_letters_of_a_token_are_only_letters():
    shown, answer = pieces(tokenizer(), "a </s> table", ("</s>",))
    assert "".join(shown) == "a </s> table"
    assert not answer.stopped
