"""The loss of every part of the quickstart, side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llava_jax.train.log import METRICS, read_metrics

TITLES = {
    "tower": "vision tower: naming what is where",
    "language": "language model: text alone",
    "stage1": "stage 1: projector, captions",
    "stage2": "stage 2: everything, conversations",
}
_WINDOW = 15  # steps averaged for the dark line


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
        axes.plot(steps, moving_average(losses, _WINDOW), color="C0", lw=1.8)
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    figure.supylabel("loss", fontsize=10)
    path = out / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """float[n]: the mean around each value, over up to `window` of them (an odd number)."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    at, half = np.arange(len(values)), window // 2
    starts, ends = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[ends] - total[starts]) / (ends - starts)
