"""Small inline SVG charts: a radar of all benchmarks, and bars. No script, no font, no network."""

import math
from collections.abc import Mapping, Sequence
from html import escape

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def radar(axes: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """A radar plot.

    Args:
      axes: name of each axis, at least three.
      series: name -> value per axis (None leaves the axis out). An axis runs from 85 % of its
        smallest to its largest value, so that differences show.
    """
    width, height, radius = 780, 440, 170
    across, down = width / 2, height / 2
    spans = []
    for i in range(len(axes)):
        known = [v for values in series.values() if (v := values[i]) is not None]
        low, high = 0.85 * min(known), max(known)
        spans.append((low, high if high > low else low + 1))

    def point(i: int, fraction: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(axes) - math.pi / 2
        return (
            across + radius * fraction * math.cos(angle),
            down + radius * fraction * math.sin(angle),
        )

    parts = [
        f'<svg viewBox="0 0 {width} {height + 30}" role="img" aria-label="radar plot" width="{width}">'
    ]
    for ring in (0.25, 0.5, 0.75, 1.0):
        parts.append(_polygon([point(i, ring) for i in range(len(axes))], "#8884", "none"))
    for i, name in enumerate(axes):
        x, y = point(i, 1.0)
        parts.append(f'<line x1="{across}" y1="{down}" x2="{x:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        tx, ty = point(i, 1.12)
        anchor = "middle" if abs(tx - across) < 20 else "start" if tx > across else "end"
        label = f"{escape(name)} ({spans[i][1]:.1f})"
        parts.append(f'<text x="{tx:.1f}" y="{ty + 4:.1f}" text-anchor="{anchor}">{label}</text>')
    for n, (name, values) in enumerate(series.items()):
        color = COLORS[n % len(COLORS)]
        points = []
        for i, v in enumerate(values):
            if v is not None:
                low, high = spans[i]
                points.append(point(i, 0.1 + 0.9 * max(0.0, (v - low) / (high - low))))
        parts.append(_polygon(points, color, color))
        x = 60 + n * (width - 80) / max(len(series), 1)
        parts.append(f'<rect x="{x:.0f}" y="{height + 8}" width="12" height="12" fill="{color}"/>')
        parts.append(f'<text x="{x + 17:.0f}" y="{height + 18}">{escape(name)}</text>')
    return "".join(parts) + "</svg>"


def _polygon(points: Sequence[tuple[float, float]], stroke: str, fill: str) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polygon points="{places}" stroke="{stroke}" fill="{fill}" fill-opacity="0.08" '
        f'stroke-width="1.5"/>'
    )


def bars(rows: Mapping[str, float], largest: float | None = None, mark: float | None = None) -> str:
    """Horizontal bars with their values.

    Args:
      rows: name -> value, not negative.
      largest: value of a full bar; the greatest by default.
      mark: draws a line at this value over all bars.
    """
    top = largest or max(rows.values(), default=0) or 1.0
    height, left, width = 22, 170, 320
    parts = [
        f'<svg viewBox="0 0 {left + width + 70} {height * len(rows) + 4}" role="img" '
        f'aria-label="bars" width="{left + width + 70}">'
    ]
    for n, (name, value) in enumerate(rows.items()):
        y = n * height + 3
        long = width * min(value / top, 1.0)
        shown = f"{value:.3f}" if isinstance(value, float) else str(value)
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(name)}</text>')
        parts.append(
            f'<rect x="{left}" y="{y}" width="{long:.1f}" height="{height - 6}" fill="{COLORS[0]}"/>'
        )
        parts.append(f'<text x="{left + long + 6:.1f}" y="{y + 13}">{shown}</text>')
    if mark is not None:
        x = left + width * mark / top
        parts.append(
            f'<line x1="{x:.1f}" y1="0" x2="{x:.1f}" y2="{height * len(rows)}" '
            f'stroke="{COLORS[1]}" stroke-dasharray="4 3"/>'
        )
    return "".join(parts) + "</svg>"
