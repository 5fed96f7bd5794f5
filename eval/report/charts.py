"""Charts as inline SVG, drawn by matplotlib: a radar of all benchmarks, and bars.

The same input gives the same bytes (no date, ids from a fixed salt), and nothing is fetched.
"""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")
_GREY = "#888888"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text as text, in the reader's font
    "svg.hashsalt": "llava_jax",
    "text.parse_math": False,  # a name may hold "$"
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans"],
    "savefig.transparent": True,
}


def radar(axes: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """A radar plot.

    Args:
      axes: name of each axis, at least three.
      series: name -> value per axis (None leaves the axis out). An axis runs from 85 % of its
        smallest to its largest value, so that differences show.
    """
    columns = [[v for v in column if v is not None] for column in zip(*series.values())]
    lows = [0.85 * min(c) for c in columns]
    spans = [(low, max(c) if max(c) > low else low + 1) for low, c in zip(lows, columns)]
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]

    def draw(figure: Any) -> None:
        plot = figure.add_subplot(projection="polar")
        plot.set(theta_offset=math.pi / 2, theta_direction=-1, ylim=(0, 1))
        lines, shown = [], []
        for n, (name, values) in enumerate(series.items()):
            known = [
                (angle, 0.1 + 0.9 * max(0.0, (v - low) / (high - low)))
                for angle, v, (low, high) in zip(angles, values, spans)
                if v is not None
            ]
            if known:
                points = list(zip(*known, known[0]))  # closed
                lines += plot.plot(*points, color=COLORS[n % len(COLORS)])
                shown.append(name)
                plot.fill(*points, color=COLORS[n % len(COLORS)], alpha=0.08)
        names = [f"{a} ({low:.1f}–{max(c):.1f})" for a, c, low in zip(axes, columns, lows)]
        plot.set_xticks(angles, names)
        for label, angle in zip(plot.get_xticklabels(), angles):  # beside the circle, not over it
            side = round(math.sin(angle), 3)
            label.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
        plot.tick_params(pad=12)
        plot.set_yticks((0.25, 0.5, 0.75, 1.0), labels=[])
        plot.grid(color=_GREY, alpha=0.4)
        plot.spines["polar"].set_visible(False)
        figure.legend(lines, shown, loc="outside lower center", ncols=4, frameon=False)

    return _svg(draw, 8.0, 5.2)


def bars(rows: Mapping[str, float], largest: float | None = None, mark: float | None = None) -> str:
    """Horizontal bars with their values.

    Args:
      rows: name -> value, not negative.
      largest: value of a full bar; the greatest by default.
      mark: draws a line at this value over all bars.
    """

    def draw(figure: Any) -> None:
        plot = figure.add_subplot()
        drawn = plot.barh(range(len(rows)), list(rows.values()), color=COLORS[0])
        shown = [f"{v:.1f}" if isinstance(v, float) else str(v) for v in rows.values()]
        plot.bar_label(drawn, shown, padding=4)
        plot.set_yticks(range(len(rows)), list(rows))
        plot.invert_yaxis()
        plot.set(xlim=(0, largest or max(rows.values(), default=0) or 1.0), xticks=[])
        plot.tick_params(length=0)
        plot.spines[:].set_visible(False)
        if mark is not None:
            plot.axvline(mark, color=COLORS[1], linestyle="--")

    return _svg(draw, 5.0, 0.4 + 0.25 * len(rows))


def _svg(draw: Any, width: float, height: float) -> str:
    """What `draw` puts into a figure of so many inches, as an <svg> element."""
    import matplotlib
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph its own font lacks: the reader's may have it
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=none, bbox_inches="tight")
    return out.getvalue()[out.getvalue().index("<svg") :]
