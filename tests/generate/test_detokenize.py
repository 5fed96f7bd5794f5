"""Ids to text: stop strings, pieces, half characters."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_jax.generate.detokenize import Detokenizer, StreamDecoder
from llava_jax.text.tokenizer import Tokenizer
from tests.conftest import json_lines
from tests.generate.tiny import tokenizer

TEXT = "  a red disc ### on a table; 猫 and ü, then\n### the end  "


def pieces(tokenizer: Tokenizer, text: str, stop=(), sizes=(1,)) -> tuple[list[str], Detokenizer]:
    """The answer as it comes when `sizes` ids arrive at a time."""
    ids, answer, shown = tokenizer.encode(text, add_bos=False), Detokenizer(tokenizer, stop), []
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
    answer = Detokenizer(tokenizer(), ("###",))
    ids = tokenizer().encode("a ##", add_bos=False)
    assert answer.push(ids) == "a"
    assert answer.push(tokenizer().encode("#", add_bos=False)[-1:]) == ""
    assert answer.stopped
    assert answer.text == "a"


def test_the_ids_that_count_end_with_the_stop_string():
    ids = tokenizer().encode("a red disc on a table", add_bos=False)
    answer = Detokenizer(tokenizer(), ("disc",))
    answer.push(ids)
    assert "disc" in tokenizer().decode(ids[: answer.count])
    assert "disc" not in tokenizer().decode(ids[: answer.count - 1])


def test_a_stop_string_that_is_a_token_ends_the_answer_as_that_token():
    chat = tokenizer().with_tokens(["<|im_end|>"])
    ids = [*chat.encode("a table", add_bos=False), chat.special_tokens["<|im_end|>"]]
    answer = Detokenizer(chat, ("<|im_end|>",))
    assert answer.push([*ids, *ids]) + answer.finish() == "a table"
    assert answer.stopped
    assert answer.count == len(ids)


def test_the_letters_of_a_token_are_only_letters():
    shown, answer = pieces(tokenizer(), "a </s> table", ("</s>",))
    assert "".join(shown) == "a </s> table"
    assert not answer.stopped


# Half characters ---------------------------------------------------------------------------------


def stream(tokenizer, ids):
    decoder = StreamDecoder(tokenizer)
    return [decoder.push(i) for i in ids] + [decoder.flush()]


def test_half_characters_are_held_back(tok):
    ids = tok.encode("a鬻🌤b", add_bos=False)
    shown = stream(tok, ids)
    assert "".join(shown) == "a鬻🌤b"
    assert not any("\ufffd" in piece for piece in shown)
    assert "鬻" in shown


def test_broken_characters_show_at_the_end(tok):
    ids = tok.encode("鬻", add_bos=False)[:-1]
    *early, last = stream(tok, ids)
    assert "".join(early) == ""
    assert last == "\ufffd\ufffd"


def test_special_tokens_between_bytes(tok):
    lead, *rest = tok.encode("é", add_bos=False)[1:]
    ids = [lead, tok.eos_id, *rest]
    assert "".join(stream(tok, ids)) == tok.decode(ids, skip_special=True)


def test_long_answers_are_not_decoded_from_the_start_each_time(tok):
    ids = tok.encode("the cat is on the mat. " * 100, add_bos=False)
    decoder = StreamDecoder(tok)
    assert "".join(decoder.push(i) for i in ids) == tok.decode(ids)
    assert len(decoder._ids) < 100


@pytest.mark.parametrize("name", ["tok", "legacy_tok", "im_tok"])
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_streamed_text_equals_decoded_text(name, request, data):
    tokenizer = request.getfixturevalue(name)
    byte = st.integers(3, 258)
    ids = data.draw(st.lists(st.one_of(byte, st.integers(0, len(tokenizer) + 1)), max_size=120))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids, skip_special=True)


def test_golden(golden):
    folder = golden / "model" / "fullvocab" / "llava"
    for legacy in (False, True):
        tokenizer = Tokenizer.load(folder, legacy=legacy)
        for row in json_lines(golden / "tokenization" / "strings.jsonl"):
            want = row[f"legacy_{legacy}".lower()]
            assert "".join(stream(tokenizer, want["ids"])) == want["decode_skip"]
