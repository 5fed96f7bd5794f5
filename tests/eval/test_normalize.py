"""The normalisers' rules and quirks, each on a literal case."""

import pytest

from llava_jax.eval.normalize import (
    CONTRACTIONS,
    leave_one_out,
    m4c_normalize,
    one_line,
    vqa_normalize,
)


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("Yes.", "yes"),
        ("The man", "man"),
        ("a", ""),
        ("none", "0"),
        ("Zero", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("-1", "1"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("1,000", "1000"),  # comma between digits: every sign goes without a blank
        ("1,000-2", "10002"),
        ("black/white", "black white"),
        ("black / white", "black white"),
        ("black, white", "black white"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("king's cross", "king's cross"),
        ("it's", "it's"),
        ("yes!", "yes"),
        ("no:yes", "no:yes"),  # the colon is no punctuation here
    ],
)
def test_vqa(raw, want):
    assert vqa_normalize(raw) == want


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("King's Cross", "king 's cross"),
        ("What?", "what"),
        ("1,000", "1000"),
        ("a, b", "b"),
        ("line\none\ttab", "line 1 tab"),
        ("  The  two  men ", "2 men"),
    ],
)
def test_m4c(raw, want):
    assert m4c_normalize(raw) == want


def test_commas_between_digits_differ():
    # m4c drops commas first; only vqaEval can meet a run of them, and takes one for a number.
    assert vqa_normalize("1,2-3") == "123"
    assert vqa_normalize("1,,2-3") == "1 2 3"


def test_only_32_periods_go():
    assert vqa_normalize("." * 40) == "." * 8
    assert m4c_normalize("." * 40) == "." * 8


def test_contractions_are_the_owners_table():
    # vqaEval has 120 entries; two map a word to itself, and four in upper case never match.
    assert len(CONTRACTIONS) == 114
    assert CONTRACTIONS["ow's'at"] == CONTRACTIONS["'ows'at"] == "'ow's'at"
    assert "she's" not in CONTRACTIONS
    assert "id've" not in CONTRACTIONS


def test_one_line():
    assert one_line("\ta\nb \n") == "a b"


@pytest.mark.parametrize(
    ("matches", "want"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_leave_one_out(matches, want):
    answers = ["cat"] * matches + ["dog"] * (10 - matches)
    assert leave_one_out("cat", answers) == pytest.approx(want)
