"""Typed look-ups in somebody's JSON file, and errors that name it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llava_jax.errors import ConfigError, WeightError


class Reader:
    """Typed look-ups in a JSON file. Raises WeightError naming file and key when a value is wrong.

    A key that is absent or null has the default.
    """

    def __init__(self, data: Mapping[str, Any], where: str):
        if not isinstance(data, Mapping):
            raise WeightError(f"{where} is not a JSON object")
        self.data, self.where = data, where

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
        if not found or not all(type(v) is int and 0 <= v < 10**7 for v in found):
            raise self.error(key, value, "token ids")
        return tuple(dict.fromkeys(found))

    def number(self, key: str, default: float | None = None) -> float:
        if default is None and not self.has(key):
            raise WeightError(f"{self.where}: {key} is missing")
        number = self._get(
            key, default, "a number", lambda v: type(v) in (int, float) and math.isfinite(v)
        )
        return float(number)

    def flag(self, key: str, default: bool = False) -> bool:
        return self._get(key, default, "true or false", lambda v: isinstance(v, bool))

    def word(self, key: str, default: str) -> str:
        return self._get(key, default, "a string", lambda v: isinstance(v, str))

    def _get(self, key: str, default: Any, kind: str, fits: Callable[[Any], bool]) -> Any:
        value = self.data[key] if self.has(key) else default
        if not fits(value):
            raise self.error(key, value, kind)
        return value

    def error(self, key: str, value: Any, kind: str) -> WeightError:
        """That the value of `key` is not of this kind."""
        return WeightError(f"{self.where}: {key} is {shown(value)}, not {kind}")


def shown(value: Any) -> str:
    """A value of the file, for a message: one line of ASCII, cut at 60 characters."""
    return ascii(value)[:60]


@contextmanager
def config_of(where: object) -> Iterator[None]:
    """Turns a ConfigError about the values of a file into a WeightError that names the file."""
    try:
        yield
    except ConfigError as error:
        raise WeightError(f"{where}: {error.message}", fix=error.fix) from None
