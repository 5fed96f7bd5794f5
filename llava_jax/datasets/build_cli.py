"""`llava-jax data build RECIPE`."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("json",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "recipe", help="stage1, stage2, mix665k, scienceqa, or a .toml file (docs/data.md)"
    )
    parser.add_argument(
        "--raw", required=True, metavar="DIR", help="what the owners' files are below"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the training file to make")
    parser.add_argument("--format", choices=FORMATS, default="json", help="of the training file")
    parser.add_argument(
        "--only", metavar="SET", nargs="+", default=(), help="some sets of the recipe"
    )


def run(args: argparse.Namespace) -> int:
    """Builds, and prints how many records of each set there are beside how many LLaVA-1.5 had."""
    from llava_jax.datasets.build import build, report
    from llava_jax.datasets.recipe import read_recipe

    recipe = read_recipe(args.recipe, Path(args.raw).expanduser(), tuple(args.only))
    print(report(build(recipe, Path(args.out).expanduser(), format=args.format)))
    return 0
