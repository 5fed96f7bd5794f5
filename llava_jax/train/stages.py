"""Stages: runs one after another, each starting from the model that the one before it made."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llava_jax.errors import ConfigError
from llava_jax.report.figure import plot_losses
from llava_jax.report.files import METRICS
from llava_jax.settings import flat
from llava_jax.train.checks import (
    Stages,
    check_data_files,
    check_devices,
    check_model,
    check_stages,
)
from llava_jax.train.resume import check_begun_from, shared_settings


def run_stages(
    config: Any, workdir: Path, *, quiet: bool = False, recipe: Any = None, profile: str = ""
) -> Path:
    """Runs `config` (once, or once per entry of config.stages) in `workdir`; returns the model's folder.

    recipe: the config before settings were changed on the command line, for the report. profile: "FROM:TO",
    steps of each stage to trace.
    Finished stages are not run again; an interrupted one is resumed. With several processes (see
    llava_jax.train.distributed.initialize) all of them call it with the same arguments.
    Raises ConfigError or SampleError for a setting or file of any stage before the first begins and
    before anything is written; else as `train`.
    """
    from llava_jax.train.distributed import check_alike, check_joined, on_main, together
    from llava_jax.train.evaluate import report_exact_match
    from llava_jax.train.heldout import report_heldout
    from llava_jax.train.lock import hold
    from llava_jax.train.loop import train

    check_joined()
    check_alike(shared_settings(config))
    stages = together(lambda: _checked_stages(config))
    folders = [workdir / name for name, _ in stages]
    exports = [folder / "export" for folder in folders]
    for (_, stage), before in zip(stages[1:], exports):
        stage.model.init = str(before)
    recipes = dict(split_stages(recipe)) if recipe is not None else {}
    with hold(workdir):
        for (name, stage), folder in zip(stages, folders):
            with hold(folder) if name else contextlib.nullcontext():
                on_main(functools.partial(check_begun_from, stage, folder))
                steps = train(stage, folder, quiet=quiet, recipe=recipes.get(name), profile=profile)
        curves = {n or config.name: f / METRICS for (n, _), f in zip(stages, folders)}
        on_main(lambda: plot_losses(curves, workdir / "loss.png"))
        if not exports[-1].exists():
            raise ConfigError(
                f"{folders[-1]} holds a finished run, but its export and checkpoints are gone",
                fix="name another --workdir to train again",
            )
        if stage.data.holdout:
            report_heldout(stage, exports[-1], workdir, steps)
        if stage.exact_match:
            report_exact_match(stage, exports[-1], workdir, quiet=quiet)
    return exports[-1]


def split_stages(config: Any) -> Stages:
    """(name, settings) of each run; ("", config) when there are no stages.

    Raises ConfigError for what the entry of a stage sets in vain.
    """
    if not config.stages:
        return [("", config.copy_and_resolve_references())]
    runs = []
    for name, changes in config.stages.items():
        stage = config.copy_and_resolve_references()
        stage.name, stage.stages = name, ConfigDict()
        changed = dict(flat(changes))
        if runs and "model.init" in changed:
            raise ConfigError(
                f"stages.{name}.model.init is set, but this stage begins with the model of {runs[-1][0]}",
                fix="only the first stage has one",
            )
        if changed.get("exact_match") and len(runs) < len(config.stages) - 1:
            raise ConfigError(
                f"stages.{name}.exact_match is set, but only the last stage's model is asked",
                fix=f"stages.{list(config.stages)[-1]}.exact_match",
            )
        stage.update_from_flattened_dict(changed)
        runs.append((name, stage))
    return runs


def _checked_stages(config: Any) -> Stages:
    """`split_stages`, once everything that needs no weights is known to be right."""
    stages = split_stages(config)
    check_stages(stages)
    check_devices(stages)
    # The first stage looks at its data itself, but after a model was downloaded.
    late = not Path(stages[0][1].model.init).exists()
    check_data_files(stages if late else stages[1:])
    if len(stages) > 1:
        check_model(stages)
    return stages
