"""`llava-jax data pack FILE`."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("file", help="a LLaVA JSON")
    parser.add_argument(
        "--images", default="", metavar="DIR", help="what its image paths are below"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the folder to make: a data.path"
    )
    parser.add_argument(
        "--per-shard", type=int, default=1000, metavar="N", help="records of a shard"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes that pack")
    parser.add_argument(
        "--beam",
        metavar="NAME=VALUE",
        nargs="+",
        help="make the shards by Apache Beam, with these of its options: runner=DirectRunner",
    )


def run(args: argparse.Namespace) -> int:
    """Packs, or goes on where an earlier call was stopped, and prints what there is."""
    from llava_jax.store.write import pack

    runner = None
    if args.beam is not None:
        from llava_jax.store.beam import beam_run

        runner = beam_run([f"--{option}" for option in args.beam])
    made = pack(
        args.file, args.images, args.out, per_shard=args.per_shard, workers=args.workers, run=runner
    )
    print(
        f"{args.out}: {made['records']:,} records and {made['pictures']:,} pictures in "
        f"{len(made['shards']):,} shards"
    )
    if missing := len(made["missing"]):
        print(f"{missing:,} records lack a picture: training leaves them out")
    for why in list(made.get("refused", {}).values())[:5]:
        print(f"  {why}")
    return 0
