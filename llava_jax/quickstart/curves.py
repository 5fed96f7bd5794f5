"""The loss of every part of the quickstart, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava_jax.quickstart.cards import WINDOW, Curve, moving_average
from llava_jax.train.log import METRICS, read_metrics

TITLES = {
    "tower": "vision tower: naming what is where",
    "language": "language model: text alone",
    "stage1": "stage 1: projector, captions",
    "stage2": "stage 2: everything, conversations",
}


def draw_curves(out: Path) -> Path:
    """Draws out/loss.png from out/<part>/metrics.jsonl: a panel a part, the loss on a log scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, title) in zip(figure.subplots(1, len(TITLES)), TITLES.items()):
        rows = read_metrics(out / name / METRICS)
        steps = np.array([row["step"] for row in rows])
        losses = np.array([row["loss"] for row in rows], float)
        axes.plot(steps, losses, color="C0", alpha=0.3, lw=0.8)
        axes.plot(steps, moving_average(losses, WINDOW), color="C0", lw=1.8)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.supylabel("loss", fontsize=10)
    path = out / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def read_curves(out: Path) -> list[Curve]:
    """The same losses, for the sheet."""
    return [
        Curve(title, [row["loss"] for row in read_metrics(out / name / METRICS)])
        for name, title in TITLES.items()
    ]
