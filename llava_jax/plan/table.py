"""Rows of a plan as text: one in full, and many as a table of Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llava_jax.chips import GIB
from llava_jax.errors import counted

Row = dict[str, Any]


def describe(row: Row) -> str:
    """Everything a row says, in a few lines."""
    lines = [f"{row['name']} on {row['topology']}{_with(row)}: {_verdict(row)}"]
    lines += [f"  {title:11} {text}" for title, text in _lines(row) if text]
    return "\n".join(lines)


def _with(row: Row) -> str:
    return f" with {row['change']}" if row["change"] else ""


def _verdict(row: Row) -> str:
    m = row["memory"]
    if m["device"] is None:
        return f"{gib(m['peak'])} GiB a device"
    return f"{'fits' if row['fits'] else 'does not fit'}, {_peak(row)} of {gib(m['device'])} GiB"


def _peak(row: Row) -> str:
    """GiB; where nothing was compiled, what stays is known and the rest comes on top."""
    return ("" if row["compiled"]["digest"] else "more than ") + gib(row["memory"]["peak"])


def _lines(row: Row) -> Iterable[tuple[str, str]]:
    shape, m, f = row["shape"], row["memory"], row["flops"]
    mesh = " x ".join(f"{axis} {n}" for axis, n in row["mesh"].items()) or "1 device"
    groups = shape["groups"] or shape["rows"]
    yield (
        "mesh",
        f"{mesh}, {counted(row['grad_accum'], 'micro-batch')} a step, remat {row['remat']}, attention {row['attention']}",
    )
    yield (
        "a step",
        f"{shape['rows']} rows of {shape['length']:,}, {groups * shape['images']} images, "
        f"{groups * shape['targets']:,} trained positions; {row['steps']:,} steps for "
        f"{row['samples']:,.0f} samples, {row['real']:.1%} real tokens",
    )
    yield (
        "memory GiB",
        f"parameters {gib(m['trained'])} trained, {gib(m['frozen'] + m['unused'])} frozen; "
        f"optimizer {gib(m['optimizer'])}; batch {gib(m['batch'])}; gradients {gib(m['gradients'])}"
        + (f"; activations and gathered parameters {gib(m['temporary'])}" if m["temporary"] else "")
        + (f"; on the host {gib(m['host'])}" if m["host"] else ""),
    )
    yield (
        "FLOPs",
        f"{few(f['sample'] / 1e12)} T a sample (tower {few(f['tower'] / 1e12)}), {f['stage']:.3g} the "
        f"stage; a step executes {few(f['executed'] / 1e15)} P, recomputing {few(f['recomputed'] / 1e15)}",
    )
    if row["traffic"]:
        sent = ", ".join(
            f"{flow['collective']} {few(flow['bytes'] / 1e9)} over {flow['axes']}"
            + (" (DCN)" if flow["dcn"] else "")
            for flow in row["traffic"]["links"]
        )
        yield "sends GB", f"{sent or 'nothing'}; HBM {few(row['traffic']['hbm'] / 1e9)}"
    if line := row.get("roofline"):
        yield (
            "at least",
            f"{line['seconds']:.2f} s a step (compute {line['compute']:.2f}, HBM {line['hbm']:.2f}, "
            f"links {line['link']:.2f}, DCN {line['dcn']:.2f}), held up by {line['bottleneck']}: "
            f"{line['hours']:.1f} h",
        )
    if hours := row.get("hours"):
        yield "at MFU", ", ".join(f"{float(mfu):.0%} {h:.1f} h" for mfu, h in hours.items())
    if other := row.get("instead"):
        yield "instead", f"{other['change']} fits, {gib(other['peak'])} GiB"


HEAD = (
    "| recipe | machine | rows x length, micro-batches | peak of device, GiB | at least, h (held up by) "
    "| hours at 45 / 55 / 65 % MFU |\n|---|---|---|---|---|---|"
)


def table(rows: Iterable[Row]) -> list[str]:
    """A table of Markdown. What does not fit is followed by the change with which it does."""
    return [HEAD, *(_cells(row) for row in rows)]


def _cells(row: Row) -> str:
    shape, m = row["shape"], row["memory"]
    peak = _peak(row) + (f" of {gib(m['device'])}" if m["device"] else "")
    line = row.get("roofline")
    cells = (
        row["name"] + (f", {row['change']}" if row["change"] else ""),
        row["topology"],
        f"{shape['rows']} x {shape['length']}, {row['grad_accum']}",
        peak if row["fits"] else f"**{peak}**: does not fit",
        f"{line['hours']:.1f} ({line['bottleneck']})" if line else "",
        " / ".join(f"{h:.1f}" for h in row.get("hours", {}).values()) if row["fits"] else "",
    )
    return f"| {' | '.join(cells)} |"


def few(number: float) -> str:
    """12.3, 0.00123 or 1,234: three digits at least."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def gib(size: float) -> str:
    """12.3, of bytes."""
    return f"{size / GIB:.{1 if size >= GIB / 10 else 4}f}"
