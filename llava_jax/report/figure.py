"""The curves of runs as one PNG, for a paper: training loss, raw and smoothed, and validation loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from llava_jax.report.files import EVAL, read_rows
from llava_jax.report.runs import number, sets_of


def plot_losses(curves: Mapping[str, Path], target: Path, *, dpi: int = 120) -> None:
    """Draws the loss of each metrics.jsonl, and of the eval.jsonl beside it, into `target`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss (mean over supervised tokens)")
    for i, (name, path) in enumerate(curves.items()):
        rows = [r for r in read_rows(path) if number(r.get("step")) and number(r.get("loss"))]
        steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
        axes.plot(steps, losses, alpha=0.3, lw=0.8, color=f"C{i}")
        axes.plot(steps, smooth(losses), lw=1.8, color=f"C{i}", label=name)
        found = [r for r in read_rows(path.with_name(EVAL)) if number(r.get("step"))]
        for n, held in enumerate(dict.fromkeys(s for row in found for s in sets_of(row))):
            points = [(r["step"], numbers["loss"]) for r in found
                      if number((numbers := sets_of(r).get(held, {})).get("loss"))]  # fmt: skip
            if points:
                style = {"ls": "--", "marker": "os^Dv"[n % 5], "ms": 4, "color": f"C{i}"}
                title = f"{name}, {held}" if len(curves) > 1 else held
                axes.plot(*zip(*points), lw=1.2, label=title, **style)
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    figure.savefig(target, dpi=dpi)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean around each value, over about a twentieth of them all, as many before as after it.

    Of 40 values it takes 3 at a time, of 5,000 it takes 251; near the ends fewer, so that the curve
    begins and ends where the values do and a straight line stays one.
    """
    total = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    reach = np.minimum(round(len(values) / 40), np.minimum(i, i[::-1]))
    return ((total[i + reach + 1] - total[i - reach]) / (2 * reach + 1)).tolist()
