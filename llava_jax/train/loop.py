"""A training run, to be read from top to bottom: model, mesh, optimizer, data, restore, loop.

The same function runs stage 1, stage 2, LoRA and the quickstart; configs/ says which.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import signal
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError, LlavaError, Stopped
from llava_jax.layers import Compute
from llava_jax.llava import abstract_params, init_sharded, param_shardings
from llava_jax.sharding import make_mesh, put_batch, replicated
from llava_jax.text.vocabulary import load_fitting
from llava_jax.train.checkpoint import Checkpointer
from llava_jax.train.groups import trainable_names
from llava_jax.train.log import RunLog
from llava_jax.train.optim import make_optimizer
from llava_jax.train.settings import changed_settings, fit_model, keep_settings
from llava_jax.train.step import Params, TrainState, make_loss, make_step

log = logging.getLogger(__name__)

DONE, SETTINGS = "done.json", "config.json"

MAX_BAD_STEPS = 20
"""Non-finite steps in a row after which a run stops instead of skipping on."""


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves: the model folder, the last loss, and the number of steps."""

    export: Path
    loss: float
    steps: int


def train(config: Any, workdir: Path, *, quiet: bool = False) -> TrainResult:
    """Trains as `config` (see configs/common.py) says, in `workdir`; resumes what is found there.

    Raises ConfigError, WeightError or SampleError for what cannot be trained, and Stopped after a
    SIGTERM or Ctrl-C, once the state is saved.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    changed = ", ".join(changed_settings(config, workdir / SETTINGS))
    if (workdir / DONE).exists():
        return _finished(workdir, changed)

    # Model: every parameter straight onto its shards; trained ones in float32.
    mesh = make_mesh(**config.mesh)
    compute = Compute(
        jnp.dtype(config.dtype), config.remat, config.unroll_layers, config.attention or None
    )
    model_config, params, source = load_model(config, mesh)
    names = trainable_names(params, config.trainable)
    trained = {k: v.astype(jnp.float32) for k, v in params.items() if k in names}
    frozen = {k: v.astype(compute.dtype) for k, v in params.items() if k not in names}
    del params

    # Data: this process's rows of every global batch.
    from llava_jax.data.loader import make_loader

    loader = make_loader(
        {**config.data, "batch_size": config.batch_size, "bad_report": str(workdir / "bad.jsonl")},
        model_config,
        load_fitting(source.tokenizer, model_config.language.vocab_size, config.model.init),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        seed=config.seed,
    )
    cleanup = contextlib.ExitStack()
    cleanup.callback(loader.close)
    steps = config.steps or math.ceil(config.epochs * loader.steps_per_epoch)
    log.info("%s", _summary(config, loader, steps, trained, frozen, mesh))

    # Optimizer and one compiled step.
    optimizer, peaks = make_optimizer(config, sorted(names), steps)
    shardings: Any = {name: value.sharding for name, value in trained.items()}
    opt_shardings = _like_params(jax.eval_shape(optimizer.init, trained), shardings, mesh)
    state = TrainState(
        jax.device_put(jnp.int32(0), replicated(mesh)),
        trained,
        jax.jit(optimizer.init, out_shardings=opt_shardings)(trained),
    )
    loss = make_loss(model_config, compute, config.loss_groups)
    lora_seed = config.seed if model_config.lora and model_config.lora.dropout else None
    step_fn = jax.jit(
        make_step(loss, optimizer, average=config.loss_average, seed=lora_seed),
        donate_argnums=0,
        out_shardings=(_layout(mesh, shardings, opt_shardings), replicated(mesh)),
    )

    # Resume.
    checkpoints = Checkpointer(workdir / "checkpoints", keep=config.keep_checkpoints)
    cleanup.callback(checkpoints.close)  # waits for the write under way
    start = 0
    if checkpoints.latest() is not None:
        state, data_state, meta = checkpoints.restore(state)
        loader.set_state(data_state)
        start = meta["step"]
        log.info("resumed at step %d of %d", start, steps)
        if changed:
            log.warning("%s was started with other settings: %s", workdir, changed)
    keep_settings(config, workdir / SETTINGS)

    # The loop.
    stop = _StopFlag()
    run_log = RunLog(workdir, start=start, total=steps, name=config.name, quiet=quiet)
    cleanup.callback(run_log.close)
    lr = _schedule_of(config, peaks, steps)
    pending: tuple[int, Any, Any] | None = None
    bad, last_loss = 0, math.nan
    with cleanup, jax.set_mesh(mesh), stop:
        for number in range(start + 1, steps + 1):
            batch, info = next(loader)
            state, metrics = step_fn(state, frozen, put_batch(batch, mesh, config.grad_accum))
            # One step behind: reading a value waits for it, and the device must not wait for us.
            if pending is not None:
                last_loss, bad = _record(run_log, *pending, lr, bad)
            pending = (number, metrics, info)
            due = number % config.save_every == 0 or stop.asked
            if due and number < steps:
                last_loss, bad = _record(run_log, *pending, lr, bad)
                pending = None
                run_log.sync()
                checkpoints.save(number, state, loader.get_state(), {"step": number})
            if stop.asked and number < steps:
                raise Stopped(
                    f"stopped at step {number} of {steps}, state saved", fix="run it again to go on"
                )
        if pending is not None:
            last_loss, bad = _record(run_log, *pending, lr, bad)

    # What the run was for.
    save_model(workdir / "export", model_config, {**frozen, **state.params}, source)
    (workdir / "data_report.json").write_text(json.dumps(loader.report(), indent=1))
    (workdir / DONE).write_text(json.dumps({"loss": last_loss, "steps": steps}))
    return TrainResult(workdir / "export", last_loss, steps)


# Model in and out ----------------------------------------------------------------------------------


def load_model(config: Any, mesh: jax.sharding.Mesh) -> tuple[LlavaConfig, Params, Any]:
    """(model config, sharded flat parameters, the Checkpoint they came from) of config.model."""
    from llava_jax.convert import load_checkpoint

    m = config.model
    if not m.init:
        raise ConfigError("config.model.init is empty", fix="name a checkpoint folder or hub id")
    source = load_checkpoint(
        m.init,
        base=m.base or None,
        vision_tower=m.vision_tower or None,
        allow_pickle=m.allow_pickle,
        mesh=mesh,
        need_tokenizer=True,
    )
    model_config, params = fit_model(config, source.config), dict(source.params)
    missing = set(abstract_params(model_config)) - set(params)
    if missing:  # adapters of a fresh LoRA run; load_checkpoint vouches for everything else
        shardings = param_shardings(model_config, mesh)
        params |= init_sharded(
            model_config, config.seed, {name: shardings[name] for name in sorted(missing)}
        )
    return model_config, params, source


def save_model(folder: Path, model_config: LlavaConfig, params: Params, source: Any) -> None:
    """Writes the trained model as a folder of this project's format (whole or not at all)."""
    from llava_jax.convert import save_checkpoint

    trained = dataclasses.replace(source, config=model_config, params=params)
    save_checkpoint(trained, folder, to="jax", overwrite=True)


# Helpers -------------------------------------------------------------------------------------------


def _finished(workdir: Path, changed: str) -> TrainResult:
    """What an earlier run left. `changed` names settings that came too late for it."""
    done = json.loads((workdir / DONE).read_text())
    log.info("%s: finished before, %d steps", workdir, done["steps"])
    if changed:
        log.warning("%s: changed settings are not used: %s", workdir, changed)
        log.warning("name another --workdir to train with them")
    return TrainResult(workdir / "export", done["loss"], done["steps"])


def _summary(config, loader, steps: int, trained: Params, frozen: Params, mesh) -> str:
    """One line: how much data, how many steps, what is trained, on what."""
    moving, still = (sum(v.size for v in part.values()) for part in (trained, frozen))
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
    return (
        f"{loader.samples:,} samples, {steps:,} steps of {config.batch_size}; "
        f"{moving:,} of {moving + still:,} parameters trained; "
        f"{mesh.size} {mesh.devices.flat[0].platform} device(s)" + (f" ({axes})" if axes else "")
    )


def _layout(mesh, shardings: Any, opt_shardings: Any) -> Any:
    return TrainState(cast(Any, replicated(mesh)), shardings, opt_shardings)


def _like_params(opt_state: Any, shardings: dict[str, NamedSharding], mesh) -> Any:
    """Moments lie where their parameter lies, counters everywhere."""

    def place(path, leaf):
        for key in reversed(path):
            name = getattr(key, "key", None)
            if name in shardings and leaf.ndim:
                return shardings[name]
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, opt_state)


def _record(run_log: RunLog, number: int, metrics, info, lr, bad: int) -> tuple[float, int]:
    """Logs a finished step; returns its loss and the count of bad steps in a row."""
    values = jax.device_get(metrics)
    ok = bool(values["ok"])
    bad = 0 if ok else bad + 1
    run_log.step(
        {
            "step": number,
            "loss": float(values["loss"]),
            "micro_loss": [float(x) for x in values["micro_loss"]],
            "grad_norm": float(values["grad_norm"]),
            "lr": lr(number - 1),
            "samples": info["samples"],
            "tokens": info["tokens"],
            "ok": ok,
        }
    )
    if not ok:
        run_log.note(f"step {number}: loss or gradient is not finite, update skipped")
    if bad >= MAX_BAD_STEPS:
        raise LlavaError(
            f"{bad} steps in a row had a non-finite loss or gradient (last: step {number})",
            fix="lower config.lr, or look for broken samples with llava-jax inspect",
        )
    return float(values["loss"]), bad


def _schedule_of(config: Any, peaks: dict[str, float], steps: int):
    from llava_jax.train.optim import warmup_cosine

    schedule = warmup_cosine(max(peaks.values()), steps, config.warmup_ratio, config.lr_end_ratio)
    return lambda count: float(schedule(count))


class _StopFlag:
    """Within the context, SIGTERM and SIGINT only set `asked`: the loop saves and leaves."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._ask)
            except ValueError:  # not the main thread: the caller keeps its own handlers
                break
        return self

    def _ask(self, number, frame):
        self.asked = True
        signal.signal(number, self._before[number])  # a second signal acts at once

    def __exit__(self, *exc):
        for number, handler in self._before.items():
            signal.signal(number, handler)
