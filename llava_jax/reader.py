"""Typed look-ups in somebody's JSON file, and errors that name it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llava_jax.errors import ConfigError, LlavaError, WeightError

HUGE, TINY = 1e30, 1e-30
"""No number of a file is larger than HUGE, none that must be above zero is smaller than TINY: float32,
in which models compute, still holds them."""


class Reader:
    """Typed look-ups in a JSON file. Raises `error` naming file and key when a value is wrong.

    A key that is absent or null has the default.
    """

    def __init__(self, data: Any, where: str, error: type[LlavaError] = WeightError):
        if not isinstance(data, Mapping):
            raise error(f"{where} is {shown(data)}, not a JSON object")
        self.data, self.where, self._error = data, where, error

    def has(self, key: str) -> bool:
        """Whether the file has the key with a value other than null."""
        return self.data.get(key) is not None

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 10**7) -> int:
        return self._get(
            key, default, "a whole number", lambda v: type(v) is int and low <= v <= high
        )

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A token id or a list of them, each once, in the file's order."""
        if not self.has(key):
            return default
        value = self.data[key]
        found = value if isinstance(value, list) else [value]
        if not found or not all(map(is_id, found)):
            raise self.error(key, value, "token ids")
        return tuple(dict.fromkeys(found))

    def number(
        self, key: str, default: float | None = None, low: float = -HUGE, high: float = HUGE
    ) -> float:
        if default is None and not self.has(key):
            raise self._error(f"{self.where}: {key} is missing")
        kind = "a number above 0" if low == TINY else f"a number from {low:g} to {high:g}"
        kind = "a number" if (low, high) == (-HUGE, HUGE) else kind
        return float(self._get(key, default, kind, lambda v: is_number(v) and low <= v <= high))

    def numbers(self, key: str, count: int) -> tuple[float, ...] | None:
        """`count` numbers; None where the file has none."""
        if not self.has(key):
            return None
        value = self.data[key]
        if not isinstance(value, list) or len(value) != count or not all(map(is_number, value)):
            raise self.error(key, value, f"{count} numbers")
        return tuple(map(float, value))

    def flag(self, key: str, default: bool = False) -> bool:
        return self._get(key, default, "true or false", lambda v: isinstance(v, bool))

    def word(self, key: str, default: str) -> str:
        return self._get(key, default, "a string", lambda v: isinstance(v, str))

    def object(self, key: str) -> dict[str, Any]:
        """A nested object; {} where the file has none."""
        return self._get(key, {}, "a JSON object", lambda v: isinstance(v, dict))

    def list(self, key: str) -> list[Any]:
        """A list; [] where the file has none."""
        return self._get(key, [], "a list", lambda v: isinstance(v, list))

    def _get(self, key: str, default: Any, kind: str, fits: Callable[[Any], bool]) -> Any:
        value = self.data[key] if self.has(key) else default
        if not fits(value):
            raise self.error(key, value, kind)
        return value

    def error(self, key: str, value: Any, kind: str) -> LlavaError:
        """That the value of `key` is not of this kind."""
        return self._error(f"{self.where}: {key} is {shown(value)}, not {kind}")


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number (true is none) that float32 holds."""
    return type(value) in (int, float) and -HUGE <= value <= HUGE  # NaN is neither


def is_id(value: Any) -> bool:
    """Whether a value of a JSON file can be a token's id."""
    return type(value) is int and 0 <= value < 10**7


def is_text(value: Any) -> bool:
    """Whether a value of a JSON file is a string that UTF-8 has a form for: no half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def shown(value: Any) -> str:
    """A value of the file, for a message: one line of ASCII, cut at 60 characters."""
    if type(value) is int and abs(value) > 10**60:  # beyond 4,300 digits Python prints none
        return "a huge number"
    return ascii(value)[:60]


@contextmanager
def config_of(where: object) -> Iterator[None]:
    """Turns a ConfigError about the values of a file into a WeightError that names the file."""
    try:
        yield
    except ConfigError as error:
        raise WeightError(f"{where}: {error.message}", fix=error.fix) from None
