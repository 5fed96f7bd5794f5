"""Typed look-ups: what is of another type is an error with file and key."""

import pytest

from llava_jax.errors import ConfigError, WeightError
from llava_jax.reader import TINY, Reader, config_of, is_id, is_number, is_text, shown

WRONG = ("x", [], {}, True, 10**400, -(10**400), float("nan"), float("inf"), 1e300)


def test_defaults_stand_for_absent_and_null():
    r = Reader({"a": None}, "f.json")
    for key in ("a", "b"):
        assert (r.integer(key, 3), r.number(key, 0.5), r.word(key, "x")) == (3, 0.5, "x")
        assert (r.flag(key), r.object(key), r.list(key), r.numbers(key, 3)) == (False, {}, [], None)
        assert r.integers(key, (2,)) == (2,)
        assert not r.has(key)


@pytest.mark.parametrize("value", WRONG)
def test_what_is_no_number_is_named(value):
    r = Reader({"a": value, "b": [1, 2, value]}, "f.json", ConfigError)
    looks = [lambda: r.number("a"), lambda: r.integer("a"), lambda: r.numbers("b", 3)]
    for look in looks:
        with pytest.raises(ConfigError, match=r"^f\.json: [ab] is .*, not ") as error:
            look()
        assert len(str(error.value)) < 200
    assert not is_number(value)
    assert not is_id(value)


def test_bounds_are_part_of_the_kind():
    r = Reader({"a": -1, "b": 7}, "f.json")
    with pytest.raises(WeightError, match="a is -1, not a number above 0"):
        r.number("a", low=TINY)
    with pytest.raises(WeightError, match="b is 7, not a number from 0 to 1"):
        r.number("b", low=0.0, high=1.0)
    assert r.number("b") == 7.0


def test_other_kinds():
    r = Reader({"a": 5}, "f.json")
    for look in (r.flag, r.object, r.list, lambda key: r.word(key, "")):
        with pytest.raises(WeightError, match=r"f\.json: a is 5, not "):
            look("a")
    with pytest.raises(WeightError, match=r"f\.json is \[\], not a JSON object"):
        Reader([], "f.json")
    assert is_text("é")
    assert not is_text("\ud800")
    assert shown(10**5000) == "a huge number"
    with pytest.raises(WeightError, match="here: no such"), config_of("here"):
        raise ConfigError("no such")
