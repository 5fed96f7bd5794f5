"""`llava-jax report`: one offline page, and a picture of the curves, from work directories."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `llava-jax report`."""
    parser.add_argument(
        "workdir", nargs="+", type=Path, help="of a run, running or not; several are compared"
    )
    parser.add_argument(
        "--out", type=Path, help="the page (default: report.html in the first work directory)"
    )
    parser.add_argument("--png", type=Path, help="also draw the losses into this file, for a paper")
    parser.add_argument("--title", help="heading of the page (default: names of the runs)")


def run(args: argparse.Namespace) -> int:
    """Writes the page and says where it is."""
    from llava_jax.errors import ConfigError
    from llava_jax.report.figure import plot_losses
    from llava_jax.report.files import METRICS
    from llava_jax.report.page import report_page
    from llava_jax.report.runs import find_runs
    from llava_jax.util import write_text

    if args.png and args.png.suffix.lower() != ".png":
        fix = f"--png {args.png.with_suffix('.png')}"
        raise ConfigError(f"--png {args.png}: the name of a PNG ends in .png", fix=fix)
    runs = find_runs(args.workdir)
    out = args.out or args.workdir[0] / "report.html"
    write_text(out, report_page(runs, args.title or ", ".join(run.name for run in runs)))
    print(f"the report       {out}")
    if args.png:
        plot_losses({run.name: run.folder / METRICS for run in runs}, args.png, dpi=200)
        print(f"the curves       {args.png}")
    return 0
