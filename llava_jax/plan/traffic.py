"""Bytes that a compiled step moves, per device: over links by collective and mesh axis, and in HBM."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llava_jax.plan.hlo import Instruction, Module, runs

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Flow:
    """bytes: what a device sends in a step. axes: the mesh axes between whose devices, "data", say.

    dcn: whether it crosses slices or hosts.
    """

    collective: str
    axes: str
    dcn: bool
    bytes: float


def flows(module: Module, mesh: dict[str, int], slices: int = 1) -> list[Flow]:
    """What each kind of collective sends over each link, largest first.

    mesh: {axis: size}. slices: equal parts of the devices, one after the other, that DCN joins.
    Ring algorithms: of B bytes that a device holds, with n devices, an all-gather sends (n - 1) B, a
    reduce-scatter and an all-to-all (n - 1) / n B, an all-reduce twice that; across slices, each
    device sends its part alone. A collective that TPU kernels repeat (one channel) counts once, as often
    as the rarest: it goes on in the background of kernels that a loop may run several times.
    """
    sizes: dict[tuple[str, str], tuple[int, int, int, str, str]] = {}
    how_often = runs(module)
    for name, times in how_often.items():
        computation = module.computations[name]
        for one in computation.values():
            kind = one.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            held = sum(computation[o].bytes for o in one.operands if o in computation)
            if times.fused and kind == "all-reduce" and _is_scattered(computation, one):
                kind = "reduce-scatter"
            count, across, axes = _groups(one, mesh, slices)
            channel = re.search(r"channel_id=(\d+)", one.rest)
            key = (kind, channel[1] if channel else f"{name}.{one.name}")
            total = held * times.times
            before = sizes.get(key)
            if before is None or total < before[0]:
                sizes[key] = (total, count, across, kind, axes)
    sums: dict[tuple[str, str, bool], float] = defaultdict(float)
    for held, count, across, kind, axes in sizes.values():
        inside = count // across
        if across > 1:
            part = held if kind in ("all-gather", "collective-permute") else held / inside
            sums[kind, axes, True] += part * _sent(kind, across)
        if inside > 1 or (kind == "collective-permute" and across == 1):
            held = held * across if kind == "all-gather" else held
            sums[kind, axes, False] += held * _sent(kind, inside)
    found = [Flow(*key, sent) for key, sent in sums.items() if sent]
    return sorted(found, key=lambda flow: -flow.bytes)


def _is_scattered(computation: dict[str, Instruction], one: Instruction) -> bool:
    """Whether a kernel keeps only this device's part of a sum: how TPU programs write reduce-scatter."""
    users = [user.op for user in computation.values() if one.name in user.operands]
    return bool(users) and all(op == "dynamic-slice" for op in users)


def _sent(kind: str, count: int) -> float:
    """Bytes sent per byte held."""
    if kind == "all-gather":
        return count - 1
    if kind == "collective-permute":
        return 1
    return (2 if kind == "all-reduce" else 1) * (count - 1) / count


def _groups(one: Instruction, mesh: dict[str, int], slices: int) -> tuple[int, int, str]:
    """(devices of a group, slices it lies on, mesh axes along which it lies)."""
    total = int(np.prod(list(mesh.values())))
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", one.rest):
        groups = [[int(n) for n in re.findall(r"\d+", p)] for p in pairs[1].split("},")]
        groups = [g for g in groups if len(set(g)) > 1] or [[0]]
        # A ring visits more than two: its links are the axes along which any pair differs.
        names = sorted({a for g in groups for a in _axes(g, mesh)}, key=list(mesh).index)
        across = max(_slices(g, total, slices) for g in groups)
        return 2, across, ",".join(names)
    group = replica_groups(one.rest, total)[0]
    return len(group), _slices(group, total, slices), ",".join(_axes(group, mesh))


def _slices(group: Sequence[int], total: int, slices: int) -> int:
    return len({device * slices // total for device in group})


def _axes(group: Sequence[int], mesh: dict[str, int]) -> list[str]:
    places = np.array(np.unravel_index(list(group), tuple(mesh.values())))  # [axes, devices]
    return [name for name, row in zip(mesh, places) if len(set(row.tolist())) > 1]


def replica_groups(attributes: str, total: int) -> np.ndarray:
    """int[groups, devices]: {{0,1},{2,3}}, [2,2]<=[4], [2,2]<=[2,2]T(1,0) and mesh['a'=2,..] {'a'}."""
    found = re.search(r"replica_groups=(\S+(?: \{'[^}]*\})?)", attributes)
    text = found[1].rstrip(",") if found else ""
    if listed := re.findall(r"\{([\d,]+)\}", text):
        return np.array([[int(n) for n in group.split(",")] for group in listed])
    if iota := re.search(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, dims, order = (
            [int(n) for n in (part or "").split(",") if n] for part in iota.groups()
        )
        ids = np.arange(int(np.prod(dims))).reshape(dims)
        if "mesh" not in text:
            return (ids.transpose(order) if order else ids).reshape(shape)
    if named := re.search(r"mesh\[([^\]]*)\].*\{([^}]*)\}", text):
        axes = {n: int(size) for n, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        over = re.findall(r"'([^']+)'", named[2])
        ids = np.arange(total).reshape(tuple(axes.values()))
        kept = [i for i, name in enumerate(axes) if name not in over]
        moved = [list(axes).index(name) for name in over]
        return ids.transpose(kept + moved).reshape(-1, int(np.prod([axes[n] for n in over])))
    return np.arange(total)[None]


# HBM -----------------------------------------------------------------------------------------------

FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"),
    *("call", "after-all", "iota", "partition-id", "opt-barrier", "copy-done", "async-done"),
}
"""Operations that move no bytes of their own."""
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""{what writes a part of its first operand in place: which operand is that part}"""


def hbm_bytes(module: Module) -> float:
    """Bytes read from and written to device memory in a step: operands and results of every kernel.

    A kernel that slices an operand, such as one layer of a stack, reads the slice; one that updates a
    part of its result in place writes that part. On-chip memory (TPU's S(1)) is not counted, nor what
    caches save.
    """
    total = 0.0
    for name, times in runs(module).items():
        if times.fused:
            continue
        computation = module.computations[name]
        for one in computation.values():
            if one.op in FREE or one.op.endswith("-done"):
                continue
            total += times.times * moved_by(module, computation, one)
    return total


def moved_by(module: Module, computation: dict[str, Instruction], one: Instruction) -> float:
    operands = [computation[name] for name in one.operands if name in computation]
    if one.op in ("copy-start", "slice-start", "collective-permute-start", "all-gather-start"):
        # Its shape holds the operand too; a slice is moved alone.
        moved = [a for a in one.arrays[:2] if not a.fast]
        return float(
            len(moved) * one.arrays[1].bytes if "slice" in one.op else sum(a.bytes for a in moved)
        )
    if one.op in _SLICES:
        return 2 * _slow(one)
    if one.op in _UPDATES:
        return 2 * _slow(operands[_UPDATES[one.op]])
    if one.op == "fusion" and (called := one.called("calls")):
        inner = module.computations[called[0]]
        if any('"AsyncCollectiveDone"' in part.rest for part in inner.values()):
            return 0.0
        return _read(module, inner, operands) + _written(inner, one)
    return sum(map(_slow, operands)) + _slow(one)


def _slow(one: Instruction) -> float:
    """Bytes of it that lie in HBM."""
    return float(sum(array.bytes for array in one.arrays if not array.fast))


def _read(module: Module, inner: dict[str, Instruction], operands: list[Instruction]) -> float:
    """What a fused kernel reads of its operands."""
    total, users = 0.0, _users(inner)
    for one in inner.values():
        if (
            one.op != "parameter"
            or not one.argument.isdigit()
            or int(one.argument) >= len(operands)
        ):
            continue
        whole = _slow(operands[int(one.argument)])
        parts = sum(_part(module, one, user, users, whole) for user in users[one.name])
        total += min(whole, parts)
    return total


def _users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = defaultdict(list)
    for one in computation.values():
        for name in one.operands:
            users[name].append(one)
    return users


def _part(
    module: Module,
    one: Instruction,
    user: Instruction,
    users: dict[str, list[Instruction]],
    whole: float,
) -> float:
    """What `user` reads of `one`."""
    if user.op == "tuple":  # handed on
        return 0.0
    if user.op == "bitcast":
        return sum(_part(module, user, after, users, whole) for after in users[user.name])
    if user.op == "fusion" and (called := user.called("calls")):  # kernels of TPUs have such within
        inner = module.computations[called[0]]
        taken = [at for at, name in enumerate(user.operands) if name == one.name]
        own = [p for p in inner.values() if p.op == "parameter" and p.argument.isdigit()]
        places, within = [p for p in own if int(p.argument) in taken], _users(inner)
        parts = (_part(module, p, after, within, whole) for p in places for after in within[p.name])
        return min(whole, sum(parts) or whole)  # 0: a bitcast alone, for what comes after
    if user.op in _SLICES and user.operands[0] == one.name:
        return float(user.bytes)
    if user.op in _UPDATES and user.operands[0] == one.name:
        return 0.0
    return whole


def _written(inner: dict[str, Instruction], fusion: Instruction) -> float:
    """What a fused kernel writes."""
    root = next((one for one in inner.values() if one.root), None)
    while root is not None and root.op == "bitcast":
        root = inner.get(root.operands[0])
    if root is None:
        return _slow(fusion)
    parts = [root]
    if root.op == "tuple":
        parts = [inner[name] for name in root.operands if name in inner]
    total, whole = 0.0, _slow(fusion)
    for part in parts:
        if part.op == "parameter":  # handed on
            continue
        new = inner.get(part.operands[_UPDATES[part.op]]) if part.op in _UPDATES else part
        total += (new or part).bytes
    return min(whole, total)
