"""`llava-jax train`: a config file, overrides on the command line, one or more stages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.settings import flat
from llava_jax.train.config import load_config, shipped_configs
from llava_jax.train.heap import keep_freed_memory
from llava_jax.train.names import hint, known_settings, split_stage

OF = {
    "processes": (1, "--supervise"),
    "hang_minutes": (30.0, "--supervise"),
    "scaling": ([], "--launcher"),
    "max_failures": (3, "--supervise and --launcher"),
}
"""{option about processes: its default, the options without which it would do nothing}"""
EPILOG = """\
settings:
  --config.NAME=VALUE changes one setting, as often as needed; NAME is dotted (data.path, mesh.fsdp,
  stages.stage1.lr). --show prints every setting with its value and meaning.

configs:
{configs}

example:
  llava-jax train --config finetune_7b --workdir runs/mine \\
      --config.data.path=data.json --config.data.image_folder=images --config.lr=1e-5

A config of your own is a Python file: get_config() of one of these, changed and returned.
The same command again resumes an interrupted run.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `llava-jax train`. Settings are changed with --config.NAME=VALUE."""
    configs = shipped_configs()
    width = max(map(len, configs)) + 2
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "llava-jax train --config CONFIG [--workdir FOLDER] [--config.NAME=VALUE ...]"
    parser.epilog = EPILOG.format(
        configs="\n".join(f"  {name:{width}}{words}" for name, words in configs.items())
    )
    parser.add_argument("--config", help="a config's name, or a file of your own")
    parser.add_argument(
        "--workdir",
        type=Path,
        help="results and checkpoints (default: runs/ and the name of the config)",
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    parser.add_argument(
        "--profile",
        default="",
        metavar="FROM:TO",
        help="trace these steps with jax's profiler, and print the ten operations that took longest",
    )
    parser.add_argument(
        "--show", action="store_true", help="print the settings as they would be used, and stop"
    )
    _add_processes(parser)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)  # to answer them with a hint


def _add_processes(parser: argparse.ArgumentParser) -> None:
    """Options about the processes of a run."""
    group = parser.add_argument_group("a run that is left alone, on one machine")
    group.add_argument(
        "--supervise",
        action="store_true",
        help="start again what dies or hangs (docs/reliability.md)",
    )
    group.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes of this machine, which share its GPUs equally (default: 1)",
    )
    group.add_argument(
        "--hang-minutes",
        type=float,
        metavar="M",
        help="how long no step may end before that is a hang; four times as long before the first, and "
        "while it validates or exports (default: 30)",
    )
    group = parser.add_argument_group("several hosts (schedulers need none of these)")
    group.add_argument(
        "--launcher",
        choices=["ray"],
        help="start the workers of a Ray cluster, and again if one is lost",
    )
    group.add_argument(
        "--scaling",
        action="append",
        metavar="NAME=VALUE",
        help="a field of ray.train.ScalingConfig, such as num_workers=4 (default: a worker a host)",
    )
    group.add_argument(
        "--max-failures",
        type=int,
        metavar="N",
        help="how often to start again, with --supervise without a newer checkpoint (default: 3)",
    )


def option_hint(option: str, value: str | None) -> str | None:
    """What an unknown `--option` of the command line means as a setting: --lr is --config.lr."""
    name = option.lstrip("-").replace("-", "_")
    return hint(name, known_settings(), "--config.{}" + (f"={value}" if value else ""))


def run(args: argparse.Namespace) -> int:
    """Trains every stage of the config, then scores it where the config asks for that."""
    if args.words:
        word = args.words[0]
        fix = f"--config {word}" if args.config is None else "settings are --config.NAME=VALUE"
        raise ConfigError(f"{word!r} is not an option", fix=fix)
    if args.config is None:
        names = ", ".join(shipped_configs())
        raise ConfigError("no --config is given", fix=f"a file of your own, or one of {names}")
    config = load_config(args.config, args.overrides)
    if args.show:
        show(config)
        return 0
    workdir = args.workdir or Path("runs") / config.name
    _fill_in(args)
    from llava_jax.train.supervise import follow, supervise

    if args.supervise:
        return supervise(args, _unsupervised(args), workdir)
    if args.launcher:
        from llava_jax.train.ray_launch import launch

        launch(args, workdir)
        return 0
    follow()
    keep_freed_memory()
    from llava_jax.generate.compile_cache import use_compile_cache
    from llava_jax.train.distributed import initialize, is_main, leaving_lost_run

    initialize()
    use_compile_cache()
    from llava_jax.train.stages import run_stages

    if args.profile:
        from llava_jax.train.profiling import parse_steps

        parse_steps(args.profile)
    recipe = load_config(args.config, [])
    with leaving_lost_run():
        export = run_stages(config, workdir, quiet=args.quiet, recipe=recipe, profile=args.profile)
    if is_main():
        print(f"the model        {export}")
        if (best := export.with_name("best")).is_dir():
            print(f"the best one     {best}")
        print(f"the loss         {workdir / 'loss.png'}")
        print(f"the report       llava-jax report {workdir}")
    return 0


def _fill_in(args: argparse.Namespace) -> None:
    """Gives the options about processes their defaults. Raises ConfigError for one that would do nothing."""
    if args.supervise and args.launcher:
        raise ConfigError(
            "--supervise and --launcher exclude each other",
            fix="--supervise is for one machine, --launcher for several",
        )
    given = {"--supervise": args.supervise, "--launcher": args.launcher}
    for option, (default, owners) in OF.items():
        if getattr(args, option) is None:
            setattr(args, option, default)
        elif not any(given[owner] for owner in owners.split(" and ")):
            name = f"--{option.replace('_', '-')}"
            fix = owners.replace("--launcher", "--launcher ray").replace(" and ", ", or ")
            raise ConfigError(f"{name} is of {owners}, not given here", fix=fix)


def _unsupervised(args: argparse.Namespace) -> list[str]:
    """The command line of a process that is supervised."""
    words = ["train", "--config", str(args.config), *args.overrides]
    words += ["--workdir", str(args.workdir)] if args.workdir else []
    words += [f"--profile={args.profile}"] if args.profile else []
    return words + (["--quiet"] if args.quiet else []) + (["--debug"] if args.debug else [])


def show(config: Any) -> None:
    """Prints every setting, group by group, with its meaning and, where it differs, its default."""
    for name, value in sorted(flat(config), key=lambda item: item[0].rpartition(".")):
        row = known_settings().get(split_stage(name)[1])
        words = row.meaning if row else ""
        if row and value != row.default:
            words = f"{words} [default: {row.default!r}]".strip()
        print(f"{f'{name} = {value!r}':40}  # {words}" if words else f"{name} = {value!r}")
