"""One setting: its type, limits and meaning; checking and parsing of values. Imports no jax.

The tables of settings, made of these, are in llava_jax/settings.py.
"""

import ast
import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from llava_jax.errors import ConfigError, did_you_mean

PATTERN = "re:"
"""How a word begins that is a regular expression over names, and not a name."""


@dataclass(frozen=True)
class Setting:
    """One row of a table.

    low, high: the closed interval of allowed numbers; above, below: the same, open. They and `choices`
    apply to each element of a tuple; patterns: besides the choices, an element may be `re:` and a
    regular expression. needs: the setting without which this one has no effect, as
    NAME (must be set) or NAME=VALUE (must be, or contain, VALUE). resume: may differ when a run is
    resumed. host: each process of a run may have its own value. aliases: names in other programs.
    old: what the True and False of earlier versions are called now.
    """

    name: str
    type: Any
    default: Any
    meaning: str = ""
    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    choices: tuple[str, ...] = ()
    patterns: bool = False
    needs: str = ""
    resume: bool = False
    host: bool = False
    aliases: str = ""
    old: Mapping[bool, str] = field(default_factory=dict)

    @property
    def limits(self) -> str:
        """The allowed numbers in words: "from 0 to 1", "above 0 and at most 1"; "" for all."""
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"from {self.low:,} to {self.high:,}"
        low = ("at least", self.low), ("above", self.above)
        high = ("at most", self.high), ("below", self.below)
        return " and ".join(f"{word} {n:,}" for word, n in (*low, *high) if math.isfinite(n))

    def allows(self, number: Any) -> bool:
        """Whether a number is within the limits."""
        return self.low <= number <= self.high and self.above < number < self.below


def setting(default: Any, meaning: str, **columns: Any) -> Any:
    """A field of a table; `columns` are those of Setting. aliases: words with spaces between them."""
    return field(default=default, metadata={"meaning": meaning, **columns})


def rows(table: Any, prefix: str = "") -> dict[str, Setting]:
    """{dotted name: row} of a table and of the tables that its fields hold."""
    found, types = {}, get_type_hints(table)
    for f in fields(table):
        name, kind = f"{prefix}{f.name}", types[f.name]
        if is_dataclass(kind):
            found |= rows(kind, f"{name}.")
        else:
            found[name] = Setting(name, kind, f.default, **f.metadata)
    return found


def flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting in nested groups."""
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


# Values --------------------------------------------------------------------------------------------

_ONE = {bool: "True or False", int: "a whole number", float: "a number", str: "a string"}
_MANY = {int: "whole numbers", float: "numbers", str: "strings"}


def current(row: Setting, value: Any) -> Any:
    """`value`, or what a value of an earlier version is called now."""
    return row.old.get(value, value) if isinstance(value, bool) else value


def check(row: Setting, value: Any, shown: str = "") -> None:
    """Raises ConfigError for a value of the wrong type, beyond a limit or not among the choices.

    shown: the setting's name in the message, where it is not the row's.
    """
    name, value = shown or row.name, current(row, value)
    forms = forms_of(row)
    if not any(fits(form, value) for form in forms):
        wanted = " or ".join(in_words(form) for form in forms if form is not NoneType)
        raise ConfigError(f"{name} is {value!r}, not {wanted}", fix=_fix_of_type(forms, value))
    items = value if isinstance(value, (tuple, list)) else (value,)
    for item in items:
        if row.patterns and str(item).startswith(PATTERN):
            _check_pattern(name, item)
        elif row.choices and item not in row.choices:
            allowed = ", ".join(map(repr, row.choices))
            more = f", or {PATTERN} and a regular expression over names" if row.patterns else ""
            raise ConfigError(f"{name} {item!r} is unknown", fix=f"one of {allowed}{more}")
        if isinstance(item, Real) and not row.allows(item):
            raise ConfigError(f"{name} is {value!r}, but must be {row.limits}")
    if tuple[int, ...] in forms and list(items) != sorted(set(items)):
        raise ConfigError(f"{name} {value} must be in rising order")
    if tuple[int, ...] in forms and row.default and not items:
        raise ConfigError(f"{name} is empty")


def _check_pattern(name: str, item: str) -> None:
    try:
        re.compile(item.removeprefix(PATTERN))
    except re.error as error:
        raise ConfigError(f"{name} {item!r} is no regular expression: {error}") from None


def check_all(table: Mapping[str, Setting], values: Mapping[str, Any]) -> None:
    """`check` of each of `values`; raises ConfigError, with the nearest name, for an unknown one."""
    for name, value in values.items():
        if name not in table:
            raise unknown(name, table)
        check(table[name], value)


def unknown(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a setting that is none of `known`, with the nearest one or all of them."""
    known = list(known)
    fix = did_you_mean(name, known, cutoff=0.5) or f"one of {', '.join(known)}"
    return ConfigError(f"no setting {name!r}", fix=fix)


def parse(row: Setting, text: str) -> Any:
    """The value that a text of the command line spells.

    Tuples: (1,2), 1,2 and projector,lora alike. A text that spells no value of the setting's type is
    returned as it is, for `check` to refuse.
    """
    forms = forms_of(row)
    many = any(get_origin(form) is tuple for form in forms)
    if many and (len(forms) == 1 or text.startswith(("(", "["))):
        return _tuple(text)
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str in forms:
        return current(row, words.get(text.lower(), text)) if row.old else text
    if bool in forms:
        return words.get(text.lower(), text)
    if text.lower() == "none":
        return None
    for kind in (int, float) if int in forms else (float,):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _tuple(text: str) -> Any:
    try:
        value = ast.literal_eval(text or "()")
    except (ValueError, SyntaxError):
        text = text.strip()
        # Not stripped of any bracket: a pattern may end with one.
        bare = (text[1:-1] if text[:1] + text[-1:] in ("()", "[]") else text).rstrip(", ")
        value = tuple(part.strip().strip("'\"") for part in bare.split(","))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def forms_of(row: Setting) -> tuple[Any, ...]:
    """str | tuple[str, ...] -> (str, tuple[str, ...])"""
    return get_args(row.type) if isinstance(row.type, UnionType) else (row.type,)


def fits(form: Any, value: Any) -> bool:
    """Whether a value has a setting's type: True is no number, nor is NaN or an infinity."""
    if get_origin(form) is tuple:
        return isinstance(value, (tuple, list)) and all(fits(get_args(form)[0], v) for v in value)
    if form not in (int, float):
        return isinstance(value, form)
    if not isinstance(value, Integral if form is int else Real) or isinstance(value, bool):
        return False
    return isinstance(value, Integral) or math.isfinite(value)


def in_words(form: Any) -> str:
    return f"a tuple of {_MANY[get_args(form)[0]]}" if get_origin(form) is tuple else _ONE[form]


def _fix_of_type(forms: tuple[Any, ...], value: Any) -> str | None:
    """How to write a value so that it has the right type, where that is clear."""
    if any(get_origin(form) is tuple and fits(get_args(form)[0], value) for form in forms):
        return f"a tuple of one ends with a comma: ({value!r},)"
    if int in forms and fits(float, value) and value == int(value):
        return f"write {int(value)}"
    if isinstance(value, str) and {int, float} & {*forms}:
        with contextlib.suppress(ValueError):
            return f"without quotes: {value}" if math.isfinite(float(value)) else None
    return None
