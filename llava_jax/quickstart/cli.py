"""`llava-jax quickstart`: the options; the work is in llava_jax.quickstart.run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `llava-jax quickstart`."""
    parser.description = (
        "Draws pictures of shapes with questions about them, trains a tiny LLaVA on them through both "
        "stages, starting from a tiny CLIP and a tiny Vicuna that ship, scores it on pictures it never "
        "saw, and shows what it says. No network, no download, a few minutes on two processor cores. "
        "Run again to resume."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="work directory (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of pictures, weights and order")
    parser.add_argument(
        "--fast", action="store_true", help="a third of stage 2: quicker, and wrong more often"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bars")


def run(args: argparse.Namespace) -> int:
    """Runs the quickstart and prints what came out."""
    from llava_jax.train.heap import keep_freed_memory

    keep_freed_memory()
    from llava_jax.generate.compile_cache import use_compile_cache

    use_compile_cache()
    from llava_jax.quickstart.run import quickstart

    quickstart(args.out, seed=args.seed, fast=args.fast, quiet=args.quiet)
    return 0
