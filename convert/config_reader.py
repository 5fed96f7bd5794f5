"""Typed look-ups in somebody's JSON file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llava_jax.errors import WeightError


class Reader:
    """Typed look-ups in a config.json that name the file and key when a value is off."""

    def __init__(self, data: Mapping[str, Any], where: str):
        if not isinstance(data, Mapping):
            raise WeightError(f"{where}: is no JSON object")
        self.data, self.where = data, where

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = 10**7) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if type(value) is not int or not low <= value <= high:
            raise WeightError(f"{self.where}: {key} is {shown(value)}, not a whole number")
        return value

    def integers(self, key: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A token id or a list of them, each once, in the file's order."""
        value = self.data.get(key)
        if value is None:
            return default
        found = value if isinstance(value, list) else [value]
        if not found or not all(type(v) is int and 0 <= v < 10**7 for v in found):
            raise WeightError(f"{self.where}: {key} is {shown(value)}, not token ids")
        return tuple(dict.fromkeys(found))

    def has(self, key: str) -> bool:
        """Whether the file has the key with a value other than null."""
        return self.data.get(key) is not None

    def number(self, key: str, default: float | None = None) -> float:
        value = self.data.get(key)
        if value is None and default is None:
            raise WeightError(f"{self.where}: {key} is missing")
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise WeightError(f"{self.where}: {key} is {shown(value)}, not a number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise WeightError(f"{self.where}: {key} is {shown(value)}, not true or false")
        return value

    def word(self, key: str, default: str) -> str:
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise WeightError(f"{self.where}: {key} is {shown(value)}, not a string")
        return value


def shown(value: Any) -> str:
    return ascii(value)[:60]
