"""`llava-jax plan`: what a recipe needs on a machine, and how long it takes, before one is rented."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from llava_jax.config import PRESETS
from llava_jax.errors import ConfigError
from llava_jax.plan.topology import EXAMPLES, parse_topology
from llava_jax.train.cli import option_hint as option_hint
from llava_jax.train.config import load_config, shipped_configs
from llava_jax.util import write_text

EPILOG = f"""\
machines:
  {EXAMPLES}
  v5p-N counts cores (N/2 chips), v5e-N and v6e-N chips; 2xv5e-256 is two slices; "here" is what is here.

The step of the run is compiled for devices that need not be there, which takes a minute or a few for
each row: for TPUs it needs libtpu (pip install 'llava_jax[tpu]'), for GPUs a CUDA plug-in
(pip install 'llava_jax[cuda12]' or 'llava_jax[cuda13]'). Neither weights nor data have to exist.

  llava-jax plan --config finetune_7b --topology v5e-16 8xA100-40 --out plan.jsonl
"""
ASSUMED = {
    "samples": (int, "samples of an epoch"),
    "tokens": (float, "tokens of a sample, image features counted"),
    "targets": (float, "trained tokens of a sample"),
    "images": (float, "images of a sample"),
}
"""{field of Means: type and meaning}; each is an option --NAME-per-sample, or --samples."""
_LIMITS = {
    "samples": (1, 10**8),
    "tokens": (1, 10**6),
    "targets": (1e-3, 10**6),
    "images": (0, 1000),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `llava-jax plan`. Settings are changed with --config.NAME=VALUE."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = (
        "llava-jax plan --config CONFIG ... --topology MACHINE ... [--config.NAME=VALUE ...]"
    )
    parser.epilog = EPILOG
    parser.add_argument("--config", nargs="+", help="names of configs, or files of your own")
    parser.add_argument("--topology", nargs="+", help=f"machines: {EXAMPLES}")
    parser.add_argument("--model", choices=PRESETS, help="sizes, where config.model.init has none")
    for name, (kind, words) in ASSUMED.items():
        parser.add_argument(_option(name), dest=name, type=kind, metavar="N", help=words)
    parser.add_argument("--json", action="store_true", help="print each row as a line of JSON")
    parser.add_argument("--out", type=Path, help="keep finished rows in this file, and skip them")
    parser.add_argument("--table", type=Path, help="write a table of Markdown to this file")
    parser.add_argument(
        "--as-it-is", action="store_true", help="look for no change where a step does not fit"
    )


def _option(name: str) -> str:
    return f"--{name}" if name == "samples" else f"--{name}-per-sample"


def run(args: argparse.Namespace) -> int:
    """Plans every stage of every config on every machine; 1 if one fits with no change that was tried."""
    if not args.config or not args.topology:
        what = "--config" if not args.config else "--topology"
        known = ", ".join(shipped_configs()) if not args.config else EXAMPLES
        raise ConfigError(f"no {what} is given", fix=f"for example {known}")
    _check(args)
    from llava_jax.plan.compile import devices_of, prepare
    from llava_jax.plan.lengths import Means
    from llava_jax.train.checks import check_stages
    from llava_jax.train.stages import split_stages

    topologies = [parse_topology(name) for name in args.topology]
    configs = [load_config(name, args.overrides) for name in args.config]
    for config in configs:
        check_stages(split_stages(config), files=False)
    prepare(topologies)

    from llava_jax.plan.plan import Question, sizes_of
    from llava_jax.plan.rows import Kept
    from llava_jax.plan.table import describe, table

    kept, shown = Kept(args.out), []
    means = Means(**{name: getattr(args, name) for name in ASSUMED})
    for topology in topologies:
        devices = devices_of(topology)
        for config in configs:
            before = None
            for stage, settings in split_stages(config):
                name = f"{config.name}.{stage}" if stage else config.name
                asked = Question(name, settings, topology, args.model or "", before, means)
                before = sizes_of(asked)
                for row in _rows(asked, devices, kept, search=not args.as_it_is):
                    shown.append(row)
                    print(json.dumps(row) if args.json else describe(row), flush=True)
                if args.table:
                    write_text(args.table, "\n".join(table(shown)) + "\n")
    return int(not all(row["fits"] or row.get("instead") for row in shown))


def _check(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that no data have, and files that cannot be written."""
    for name, (low, high) in _LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{_option(name)} is {value:g}", fix=f"give {low:g} to {high:,}")
    for option, path in (("--out", args.out), ("--table", args.table)):
        if path is None:
            continue
        try:
            special = path.exists() and not path.is_file()
            if special and (option == "--out" or path.is_dir()):
                raise ConfigError(f"{option} {path} is not a file", fix="name a file")
            if special:
                continue  # a pipe or a device
            target = Path(os.path.realpath(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            probe = target.with_name(f".{target.name}.try")
            probe.open("a").close()
            probe.unlink(missing_ok=True)
        except OSError as error:
            why = f"{option} {path} cannot be written ({error.strerror})"
            raise ConfigError(why, fix="name another file") from None
    if args.out and args.table and os.path.realpath(args.out) == os.path.realpath(args.table):
        raise ConfigError("--out and --table are the same file", fix="name two files")


def _rows(question: Any, devices: list[Any], kept: Any, *, search: bool) -> list[dict[str, Any]]:
    """The row of a question, and where it does not fit, that of the change with which it does."""
    from llava_jax.plan.fit import find_change
    from llava_jax.plan.plan import make_row

    row = make_row(question, devices, kept)
    if row["fits"] or not search:
        return [row]
    other = find_change(question, row, devices, kept)
    if other is None:
        return [row]
    instead = {"change": other["change"], "peak": other["memory"]["peak"]}
    return [{**row, "instead": instead}, other]
