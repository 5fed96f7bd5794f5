import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_jax.text.stream import StreamDecoder
from llava_jax.text.tokenizer import Tokenizer
from tests.conftest import json_lines


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
