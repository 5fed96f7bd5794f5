"""`llava-jax train`: a config file, overrides on the command line, one or more stages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.train.heap import keep_freed_memory
from llava_jax.train.settings import check_name, flat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `llava-jax train`. Settings are changed with --config.NAME=VALUE."""
    parser.add_argument("--config", required=True, help="a file of configs/, or its bare name")
    parser.add_argument(
        "--workdir", type=Path, help="results and checkpoints (default: runs/<config name>)"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--show", action="store_true", help="print the settings as they would be used, and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Trains every stage of the config, then scores it where the config asks for that."""
    config = load_config(args.config, getattr(args, "overrides", []))
    if args.show:
        for setting, value in flat(config):
            print(f"{setting} = {value!r}")
        return 0
    keep_freed_memory()
    workdir = args.workdir or Path("runs") / config.name
    from llava_jax.train.stages import run_stages

    export = run_stages(config, workdir, quiet=args.quiet)
    print(f"the model        {export}\nthe loss         {workdir / 'loss.png'}")
    return 0


def load_config(name: str, overrides: list[str]) -> Any:
    """The ConfigDict of a config file with `--config.x=y` overrides applied.

    Raises ConfigError for a missing file, a value of the wrong type, and a mistyped name with the
    nearest one.
    """
    path, _, argument = name.partition(":")
    spec = f"{find_config(path)}:{argument}" if argument else str(find_config(path))
    defaults = _parse(path, spec, [])
    for override in overrides:
        check_name(override.removeprefix("--config.").partition("=")[0], defaults)
    return _parse(path, spec, overrides)


def _parse(path: str, spec: str, overrides: list[str]) -> Any:
    from absl import flags
    from ml_collections import config_flags

    argv = ["llava-jax", f"--config={spec}", *overrides]
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        return values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise ConfigError(f"{path}: {text}", fix="--show prints every setting") from error


def find_config(name: str) -> Path:
    """The file called `name`: a path, or a file of the installed configs with or without .py."""
    import llava_jax.configs

    bare = Path(name).with_suffix(".py")
    folder = Path(str(llava_jax.configs.__file__)).parent
    for candidate in (Path(name), bare, folder / bare.name):
        if candidate.is_file():
            return candidate
    import difflib

    known = sorted(p.stem for p in folder.glob("*.py") if p.stem not in ("__init__", "common"))
    near = difflib.get_close_matches(bare.stem, known, n=1)
    raise ConfigError(
        f"no config file {name!r}",
        fix=f"did you mean {near[0]!r}?" if near else f"one of {', '.join(known)}",
    )
