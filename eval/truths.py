"""Truths and options as benchmarks' rows hold them, read in one way for each kind.

A truth is None where the benchmark keeps it to itself: null, NaN, "" or nothing but these, and for a
letter "?", "hidden" and -1 too. What no answer can meet raises ValueError: SimpleTask names the row.
"""

import ast
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from llava_jax.eval.rules import LETTERS, YES_NO
from llava_jax.reader import shown

_LETTER = re.compile(r"\s*\(?([A-Za-z])[).]?\s*")


def hidden(value: Any, marks: Sequence[Any] = ()) -> bool:
    """Whether a truth is not given; marks: what else says so."""
    if isinstance(value, list | tuple):
        return all(hidden(v, marks) for v in value)
    if isinstance(value, str):
        return not value.strip() or value.strip() in marks
    return value is None or value != value or value in marks


def text(value: Any, marks: Sequence[Any] = ()) -> str | None:
    """A text or a number (3.0, as tables hold 3, is "3")."""
    if hidden(value, marks):
        return None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"the truth {shown(value)} is no text")
    return str(value)


def texts(value: Any) -> str | list[str] | None:
    """A text, or a list of texts each of which is right."""
    if not isinstance(value, list | tuple) or hidden(value):
        return text(value)
    if any(v is None or v != v for v in value):
        raise ValueError(f"one of the truths {shown(value)} is missing")
    return [v if isinstance(v, str) else str(text(v)) for v in value]


def letter(value: Any, letters: str = LETTERS) -> str | None:
    """An option's letter, also as "b", "(B)" or "B."."""
    if hidden(value, ("?", "hidden", "-", "-1", -1)):
        return None
    found = _LETTER.fullmatch(value) if isinstance(value, str) else None
    if found is None or found[1].upper() not in letters:
        raise ValueError(f"the truth {shown(value)} is no letter of {letters or 'no options'}")
    return found[1].upper()


def index(value: Any, options: Sequence[str]) -> str | None:
    """The letter of an option's index from 0, which is a number or its text."""
    if (read := text(value, ("?", "-1", -1))) is None:
        return None
    if not (read.strip().isdecimal() and int(read) < len(options)):
        raise ValueError(f"the truth {shown(value)} is no index of {len(options)} options")
    return LETTERS[int(read)]


def option(value: Any, options: Sequence[str]) -> str | None:
    """The letter of an option that is named by its letter, its index or its text, but not by two of
    them that are different options."""
    letters, meant = LETTERS[: len(options)] or "ABCD", set()
    if (read := text(value, ("?", "hidden", "-1", -1))) is None:
        return None
    for kind in (lambda: letter(read, letters), lambda: index(read, options)):
        with suppress(ValueError):
            meant.add(kind())
    meant |= {c for c, o in zip(LETTERS, options) if o == read}
    if len(meant) != 1:
        named = " and ".join(sorted(meant)) or "none of the options"
        raise ValueError(f"the truth {shown(value)} is {named}")
    return meant.pop()


def yes_no(value: Any) -> str | None:
    """ "yes" or "no" of a word, 1 and 0, or true and false."""
    read = str(value) if isinstance(value, bool) else text(value, ("?", "-1", -1))
    if read is None:
        return None
    read = read.strip().rstrip(".").lower()
    if read not in YES_NO:
        raise ValueError(f"the truth {shown(value)} is neither yes nor no")
    return YES_NO[read]


def options(value: Any) -> tuple[str, ...]:
    """The options' texts: a list, or one written as text."""
    read = value
    if isinstance(value, str):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            read = ast.literal_eval(value.strip())
    if not isinstance(read, list | tuple):
        raise ValueError(f"the options {shown(value)} are no list")
    # "['1' '2']", as numpy prints two; one option alone ("['1']") is a list as well
    garbled = isinstance(value, str) and len(read) == 1 and re.search(r"""['"]\s+['"]""", value)
    if garbled or len(read) > len(LETTERS) or any(o is None or o != o for o in read):
        raise ValueError(f"the options {shown(value)} are not several texts")
    return tuple(o if isinstance(o, str) else str(text(o)) for o in read)
