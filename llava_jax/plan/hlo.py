"""Reads the text of an optimized HLO module: what its computations hold and how often each runs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "s2", "u2"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64", "c64"), 8),
    "c128": 16,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_NAME = re.compile(r"^(ROOT )?%?([\w.\-]+) = ")


@dataclass(frozen=True)
class Array:
    """dims: per device. fast: whether it lies in on-chip memory (S(1) of a TPU) and not in HBM."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> int:
        """Without the padding of tiles; types of less than a byte count as one. Tokens have none."""
        return math.prod(self.dims) * BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0)


@dataclass(frozen=True)
class Instruction:
    """%name = shape op(operands), rest. arrays: the leaves of its shape."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool = False
    argument: str = ""

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def called(self, key: str) -> list[str]:
        """Names of the computations that the attribute `key` lists."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", found[1]) if found else []


@dataclass
class Module:
    """computations: {name: {instruction name: instruction}}, in the text's order."""

    entry: str = ""
    computations: dict[str, dict[str, Instruction]] = field(default_factory=dict)


def parse(text: str) -> Module:
    """The module of an optimized program's text (`compiled.as_text()`)."""
    module, current = Module(), None
    for line in _whole_lines(text):
        if head := _HEAD.match(line):
            current = module.computations.setdefault(head[2], {})
            module.entry = head[2] if head[1] else module.entry
        elif _END.match(line):
            current = None
        elif current is not None and (one := _instruction(line)):
            current[one.name] = one
    return module


def _whole_lines(text: str) -> Iterator[str]:
    """A line for each instruction: kernels of TPUs have attributes with line breaks."""
    parts: list[str] = []
    for line in text.splitlines():
        if _HEAD.match(line) or _END.match(line) or _NAME.match(line.strip()):
            yield " ".join(parts)
            parts = []
        parts.append(line.strip())
    yield " ".join(parts)


def _instruction(line: str) -> Instruction | None:
    named = _NAME.match(line)
    if not named:
        return None
    rest = line[named.end() :]
    end = _close(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    op, _, _ = rest.partition("(")
    inside = rest[len(op) :]
    end = _close(inside)
    arguments, attributes = inside[1 : end - 1], inside[end:]
    return Instruction(
        named[2],
        op,
        tuple(_arrays(shape)),
        tuple(re.findall(r"%([\w.\-]+)", arguments)),
        attributes,
        bool(named[1]),
        arguments,
    )


def _close(text: str) -> int:
    """Where the parenthesis that opens `text` has been closed."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    return len(text)


def _arrays(shape: str) -> Iterator[Array]:
    for dtype, dims, layout in _ARRAY.findall(shape):
        yield Array(dtype, tuple(int(d) for d in dims.split(",") if d), "S(1)" in layout)


# How often ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runs:
    """times: how often a computation runs in one run of the module. fused: within one kernel."""

    times: int
    fused: bool


def runs(module: Module) -> dict[str, Runs]:
    """{computation: how often it runs}; scan bodies times their trip count. Reducers are left out."""
    found: dict[str, Runs] = {}

    def visit(name: str, times: int, fused: bool) -> None:
        before = found.get(name, Runs(0, fused))
        found[name] = Runs(before.times + times, fused and before.fused)
        for one in module.computations[name].values():
            if one.op == "while":
                for body in one.called("body"):
                    visit(body, times * trip_count(module, one), fused)
            elif one.op == "conditional":
                for key in ("branch_computations", "true_computation", "false_computation"):
                    for branch in one.called(key):
                        visit(branch, times, fused)
            elif one.op == "call":
                for called in one.called("to_apply"):
                    visit(called, times, fused)
            else:
                for called in one.called("calls"):
                    visit(called, times, fused or one.op == "fusion")

    visit(module.entry, 1, False)
    return found


def trip_count(module: Module, loop: Instruction) -> int:
    """How often a while loop runs: what XLA found, else as its counter says."""
    if found := re.search(r'"?known_trip_count"?:?=?\{"?n"?:"?(\d+)"?\}', loop.rest):
        return int(found[1])
    numbers, places = [0], []
    for name in loop.called("condition"):
        for one in _reach(module, name):
            numbers += _number(one)
            if one.op == "get-tuple-element" and (at := re.search(r"index=(\d+)", one.rest)):
                places.append(int(at[1]))
    # TPU programs carry the bound through the loop, beside the counter.
    within = next(c for c in module.computations.values() if c.get(loop.name) is loop)
    start = within.get(loop.operands[0]) if loop.operands else None
    for place in places:
        numbers += _number(_element(within, start, place))
    return math.ceil(max(numbers) / _step(module, loop, places)) or 1


def _step(module: Module, loop: Instruction, places: list[int]) -> int:
    """By how much a turn raises the counter, which is at one of `places`: 2 in unrolled loops of TPUs."""
    for name in loop.called("body"):
        body = module.computations[name]
        root = next((one for one in body.values() if one.root), None)
        for place in places:
            after = _element(body, root, place)
            if after is None or after.op != "add":
                continue
            steps = [n for o in after.operands for n in _number(body.get(o))]
            if len(steps) == 1 and steps[0] > 0:
                return steps[0]
    return 1


def _element(
    computation: dict[str, Instruction], tuple_: Instruction | None, place: int
) -> Instruction | None:
    """What is at a place of a tuple; None where that cannot be told."""
    if tuple_ is None or tuple_.op != "tuple" or place >= len(tuple_.operands):
        return None
    return computation.get(tuple_.operands[place])


def _number(one: Instruction | None) -> list[int]:
    """The number that it is, if it is one."""
    known = one is not None and one.op == "constant" and one.argument.isdigit()
    return [int(one.argument)] if one is not None and known else []


def _reach(module: Module, name: str) -> Iterator[Instruction]:
    """The instructions of a computation and of what it calls."""
    for one in module.computations[name].values():
        yield one
        for called in one.called("calls"):
            yield from _reach(module, called)
