"""`llava-jax data build | pack | check | stats | show`: their arguments, and which module runs them."""

from __future__ import annotations

import argparse
from importlib import import_module

from llava_jax.store.cli import add_arguments as pack_arguments
from llava_jax.util import sentence

FORMATS = ("json", "arrayrecord")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of all actions; imports nothing heavy."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (_, summary, add) in ACTIONS.items():
        add(actions.add_parser(name, help=summary, description=sentence(summary)))


def run(args: argparse.Namespace) -> int:
    """Runs the action that was named."""
    return import_module(ACTIONS[args.action][0]).run(args)


def _build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", help="stage1, stage2, mix665k, scienceqa, or a .toml file (docs/datasets.md)"
    )
    parser.add_argument(
        "--raw", required=True, metavar="DIR", help="what the owners' files are below"
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="the training file to make")
    parser.add_argument(
        "--format", choices=FORMATS, default="json", help="arrayrecord: OUT.json, packed as OUT"
    )
    parser.add_argument(
        "--images", default="", metavar="DIR", help="what pictures are below, for arrayrecord"
    )
    parser.add_argument(
        "--only", metavar="SET", nargs="+", default=(), help="some sets of the recipe"
    )


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a training data file")
    parser.add_argument("--images", default="", metavar="DIR", help="what its images are below")
    parser.add_argument(
        "--against",
        nargs="+",
        default=(),
        metavar="PATH",
        help="folders of pictures and JSON files of questions of evaluations, to find what is in both",
    )
    parser.add_argument("--report", metavar="DIR", help="write check.json and check.html there")
    parser.add_argument(
        "--clean", metavar="FILE", help="write the records that training would take"
    )
    parser.add_argument(
        "--unique",
        action="store_true",
        help="--clean leaves out records that are there twice or in --against, too",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
    _prompt(parser)


def _stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a training data file")
    parser.add_argument("--report", metavar="DIR", help="write stats.json and stats.png there")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the cores)")
    _prompt(parser)


def _show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a training data file")
    parser.add_argument(
        "samples", nargs="*", default=["0"], metavar="N", help="index or id (default: the first)"
    )
    parser.add_argument(
        "--images",
        metavar="DIR",
        help="what its images are below, which are then opened as training would; without it they "
        "are looked for beside the file and in the current folder",
    )
    parser.add_argument("--html", metavar="OUT", help="write a page, with pictures")
    parser.add_argument("--tokens", action="store_true", help="list every token")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    _prompt(parser)


def _prompt(parser: argparse.ArgumentParser) -> None:
    """The options that say how a record becomes a prompt (`llava_jax.datasets.prompt`)."""
    from llava_jax.convert.cli import add_source_arguments

    group = parser.add_argument_group("the prompt")
    group.add_argument(
        "--model",
        help="checkpoint that gives tokenizer and template, or a tokenizer.model (default: tiny)",
    )
    group.add_argument(
        "--version", help="conversation template: v1, plain, ... (default: the model's)"
    )
    group.add_argument(
        "--max-length", type=int, metavar="N", help="positions of a sample (default: the model's)"
    )
    group.add_argument(
        "--turns",
        choices=("conversation", "independent"),
        default="conversation",
        help="independent: questions about an image do not see each other",
    )
    group.add_argument("--compat", action="store_true", help="the original's exact labels")
    add_source_arguments(group)


ACTIONS = {
    "build": ("llava_jax.datasets.build", "make a training set from its owners' files", _build),
    "pack": (
        "llava_jax.store.cli",
        "put a LLaVA JSON and its pictures into ArrayRecord shards",
        pack_arguments,
    ),
    "check": ("llava_jax.datasets.check", "find what is wrong with records and pictures", _check),
    "stats": ("llava_jax.datasets.stats", "count lengths, pictures, answers and padding", _stats),
    "show": ("llava_jax.datasets.show", "show samples as the model sees them", _show),
}
"""Name -> (module with `run`, what it does, what adds its arguments)."""
