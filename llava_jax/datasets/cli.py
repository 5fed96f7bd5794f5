"""`llava-jax data build | check | stats | show`."""

from __future__ import annotations

import argparse
from importlib import import_module

ACTIONS = {
    "build": ("llava_jax.datasets.build_cli", "make a training set from its owners' files"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the four."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (module, summary) in ACTIONS.items():
        action = actions.add_parser(name, help=summary, description=summary.capitalize() + ".")
        import_module(module).add_arguments(action)


def run(args: argparse.Namespace) -> int:
    """Runs the one that was named."""
    return import_module(ACTIONS[args.action][0]).run(args)
