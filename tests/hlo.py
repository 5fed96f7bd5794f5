"""Reads compiled programs: their matrix products, loops multiplied by their length, and what is aliased."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple


class Dot(NamedTuple):
    """A matrix product: out [..], and the sizes that are summed over; how often it runs."""

    out: tuple[int, ...]
    summed: tuple[int, ...]
    times: int

    @property
    def flops(self) -> int:
        """Of all its runs; a multiplication and an addition are two."""
        return 2 * math.prod(self.out) * math.prod(self.summed) * self.times

    @property
    def sizes(self) -> set[int]:
        """Every size that it has."""
        return {*self.out, *self.summed}


_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(?:\w+)\[([\d,]*)\]\S* ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")


def dots(compiled: Any) -> list[Dot]:
    """The matrix products that a compiled program (jax.stages.Compiled) runs."""
    computations, entry = _computations(compiled.as_text())
    return list(_run(computations, entry, 1))


def flops(compiled: Any) -> int:
    """Operations of all matrix products."""
    return sum(dot.flops for dot in dots(compiled))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """({name: lines}, the entry's name)."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and " = " not in line:
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def _run(computations: dict[str, list[str]], name: str, times: int) -> Iterator[Dot]:
    shapes = {}
    for line in computations[name]:
        if not (match := _LINE.match(line)):
            match = re.match(
                r"^\s*(?:ROOT )?%?([\w.\-]+) = (\().* (while|call|fusion|conditional)\((.*)$", line
            )
            if not match:
                continue
        result, sizes, kind, rest = match.groups()
        shapes[result] = _sizes(sizes)
        if kind == "dot":
            first = re.match(r"(?:\w+\[([\d,]*)\]\S* )?%?([\w.\-]+)", rest)
            assert first, line
            left = shapes[first[2]] if first[1] is None else _sizes(first[1])
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest)
            summed = tuple(left[i] for i in _sizes(axes[1])) if axes else ()
            yield Dot(shapes[result], summed, times)
            continue
        often = times
        if kind == "while":
            length = re.search(r'known_trip_count":\{"n":"(\d+)"', rest)
            assert length, f"a loop of unknown length: {line[:200]}"
            often *= int(length[1])
        for called in _CALLED.findall(rest):
            yield from _run(computations, called, often)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(x) for x in text.split(",") if x.isdigit())
