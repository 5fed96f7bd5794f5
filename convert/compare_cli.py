"""llava-jax compare A B."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from llava_jax.convert.cli import add_source_arguments, given_files
from llava_jax.util import refuse_input, write_json

if TYPE_CHECKING:
    from llava_jax.convert import Options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `llava-jax compare`."""
    parser.add_argument("a", help="checkpoint: folder, projector file, or hub id")
    parser.add_argument("b", help="the other one")
    add_source_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the report to FILE")
    parser.add_argument("--all", action="store_true", help="list every tensor, not only mismatches")
    parser.add_argument(
        "--logits",
        choices=("auto", "yes", "no"),
        default="auto",
        help="run both on a probe image and prompt (auto: unless they are large)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 if the checkpoints differ."""
    from llava_jax.convert.compare import compare, table
    from llava_jax.convert.source import Options

    if args.json:
        refuse_input(args.json, given_files(args, args.a, args.b))
    options = Options(args.base, args.vision_tower, args.allow_pickle)
    one, other = _options(args.a, args.b, options), _options(args.b, args.a, options)
    report = compare(args.a, args.b, one, other, logits=args.logits)
    print(table(report, everything=args.all))
    if args.json:
        write_json(args.json, report, indent=2, ensure_ascii=False)
    return 0 if report["equal"] else 1


def _options(path: str, other: str, options: Options) -> Options:
    """`options` for `path`. Base and tower go to the one of the two that needs them."""
    from llava_jax.convert.checkpoint import holds_tower
    from llava_jax.convert.io import hub
    from llava_jax.convert.source import identify

    part, other_part = (
        identify(hub.resolve(p, options.allow_pickle)) in ("lora", "projector")
        for p in (path, other)
    )
    if other_part and not part:
        options = replace(options, base=None)
    whole, other_whole = (holds_tower(p, options.allow_pickle) for p in (path, other))
    return replace(options, vision_tower=None) if whole and not other_whole else options
