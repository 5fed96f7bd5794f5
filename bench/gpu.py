"""What bench/gpu.sh found, beside the limits that a GPU is held to: python -m bench.gpu OUT."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _share(found: dict[str, Any]) -> float:
    """Of the bandwidth's limit that a token reaches."""
    return float(found["limits"][0][2].rstrip("%")) / 100


def _prefill(found: dict[str, Any]) -> float:
    return 1e3 * found["times"]["1"]["llava_jax"]["seconds"]["median"]


def _requests(found: dict[str, Any]) -> float:
    return next(row[2] for row in found["limits"] if row[1] == "llava_jax")


def _matmul(found: dict[str, Any]) -> float:
    """MFU of the matmul peak measured in the same run."""
    return found["results"][0]["mfu_of_measured_matmul"]


def _copy(found: dict[str, Any]) -> float:
    return found["rates"]["jax"]["copy, GB/s"]["best"]


def _token(found: dict[str, Any]) -> float:
    return 1e3 * next(iter(found["times"].values()))["llava_jax"]["seconds"]["min"]


LIMITS: list[tuple[str, str, Callable[[dict[str, Any]], float], float | None, float | None]] = [
    ("machine", "copy bandwidth, GB/s", _copy, None, None),
    ("decode", "decode B=1, share of the copy bandwidth", _share, 0.70, 0.80),
    ("decode", "decode B=1, ms a token", _token, None, 4.0),
    ("decode_int8", "decode int8, share of its floor", _share, 0.65, None),
    ("decode_nf4", "decode nf4, share of its floor", _share, 0.49, None),
    ("decode_many", "decode B=64, share of the copy bandwidth", _share, 0.60, 0.75),
    ("prefill", "prefill of 636 tokens with the tower, ms", _prefill, 22, 16),
    ("stage1", "stage 1, MFU of the measured matmul", _matmul, 0.62, 0.75),
    ("stage2", "stage 2, MFU of the measured matmul", _matmul, 0.62, 0.72),
    ("requests", "requests/s, 636 in and 100 out", _requests, 20, 32),
]
"""(part of gpu.sh, what, its value, floor, aim)."""


def ratio(found: dict[str, Any]) -> str:
    """How many times as long transformers takes, median, in the same run; "" where it did not run."""
    if "results" in found:
        seconds = [result["seconds"]["median"] for result in found["results"]]
        return f"{seconds[1] / seconds[0]:.2f}" if len(seconds) > 1 else ""
    of = next(iter(found.get("times", {}).values()), {})
    if "torch" not in of:
        return ""
    return f"{of['torch']['seconds']['median'] / of['llava_jax']['seconds']['median']:.2f}"


def table(folder: Path) -> list[list[str]]:
    """Rows: what, found, floor, aim, whether the floor is met, transformers' time over ours."""
    rows = []
    for part, what, value, floor, aim in LIMITS:
        file = folder / f"{part}.json"
        limits = ["" if x is None else f"{x:g}" for x in (floor, aim)]
        if not file.exists():
            rows.append([what, "not measured", *limits, "", ""])
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        reached = value(found)
        met = "" if floor is None else ("yes", "no")[(reached > floor) == (part == "prefill")]
        rows.append([what, f"{reached:.3g}", *limits, met, ratio(found)])
    return rows


if __name__ == "__main__":
    from bench.frame import show

    show(["", "found", "floor", "aim", "met", "transformers / ours"], table(Path(sys.argv[1])))
