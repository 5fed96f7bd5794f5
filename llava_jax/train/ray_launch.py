"""`llava-jax train --launcher ray`: Ray Train starts a worker a host, and all again after one is lost.

Each worker trains as a process that a scheduler started; a new group of workers continues from the
newest checkpoint. ray.train.v2.jax.JaxTrainer is alpha; tried with Ray 2.60.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError, Diverged, LlavaError, NotSaved, Stopped, passes
from llava_jax.train import cli
from llava_jax.util import need

_ENDS = {kind.__name__: kind for kind in (Diverged, Stopped)}
"""Errors with an exit code of their own, by name; all others are bad input."""
_ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}


def launch(args: argparse.Namespace, workdir: Path) -> None:
    """Runs `llava-jax train` with `args`, of llava_jax.train.cli, in every worker of a Ray cluster.

    Joins the cluster of RAY_ADDRESS or of this machine, else starts one. Raises what ended the run of the
    workers, as `llava-jax train` without Ray would; and, once workers were lost or a disk failed more often
    than args.max_failures, the error of that disk, or what Ray raises.
    """
    ray, train, v2 = (
        need(module, "for --launcher ray", "llava_jax[ray]")
        for module in ("ray", "ray.train", "ray.train.v2.jax")
    )
    ray.init(ignore_reinit_error=True, log_to_driver=True)
    scaling = {**_every_host(ray.nodes()), **_given(args.scaling)}
    tpu, gpu = (bool(scaling.get(name)) for name in ("use_tpu", "use_gpu"))
    workdir = workdir.absolute()
    options = {**vars(args), "workdir": workdir, "folder": os.getcwd()}
    options |= dict.fromkeys(("launcher", *cli.OF))  # a worker starts no others
    try:
        scaling_config = train.ScalingConfig(**scaling)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"--scaling: {' '.join(str(error).split())}") from error
    trainer = v2.JaxTrainer(
        _work,
        train_loop_config=options,
        # Without either, JaxTrainer joins no workers; it takes the platform from JAX_PLATFORMS.
        jax_config=v2.JaxConfig(use_tpu=tpu or not gpu, use_gpu=gpu),
        scaling_config=scaling_config,
        run_config=train.RunConfig(
            storage_path=str(workdir / "ray"),
            failure_config=train.FailureConfig(max_failures=args.max_failures),
            worker_runtime_env={"env_vars": {} if tpu or gpu else _ON_CPU},
        ),
    )
    try:
        ended = trainer.fit().return_value
    except train.TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            if isinstance(failure, LlavaError | OSError):
                raise failure from error
        raise
    if ended:
        raise _ENDS.get(ended["kind"], LlavaError)(ended["message"], fix=ended["fix"])


def _work(options: dict[str, Any]) -> dict[str, Any] | None:
    """What a worker does. Returns the error that ended its run where no new worker would mend that: not
    one of a disk or network, which Ray tries again."""
    logging.getLogger().setLevel(logging.WARNING)  # Ray's own is INFO, for all libraries
    logging.getLogger("llava_jax").setLevel(logging.INFO)
    if os.path.isdir(options["folder"]):
        os.chdir(options["folder"])
    try:
        cli.run(argparse.Namespace(**options))
    except LlavaError as error:
        if isinstance(error, NotSaved) or passes(error):  # Ray passes on no cause
            raise NotSaved(error.message, fix=error.fix) from error
        return {"kind": type(error).__name__, "message": error.message, "fix": error.fix}


def _every_host(nodes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A worker on each host that has GPUs, with all of them; without GPUs, a worker on each host."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [int(r["GPU"]) for r in resources if r.get("GPU")]
    if not gpus:
        return {"num_workers": len(resources)}
    return {"num_workers": len(gpus), "use_gpu": True, "resources_per_worker": {"GPU": min(gpus)}}


def _given(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE as a command line has it -> {name: value}. Raises ConfigError for another form."""
    found = {}
    for word in words:
        name, is_pair, text = word.partition("=")
        if not is_pair:
            raise ConfigError(f"--scaling {word!r} is not NAME=VALUE", fix="num_workers=4, say")
        found[name] = {"true": True, "false": False}.get(text.lower(), text)
        with contextlib.suppress(ValueError, SyntaxError):
            found[name] = ast.literal_eval(text)
    return found
