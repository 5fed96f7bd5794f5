"""A training run, to be read from top to bottom: model, mesh, optimizer, data, restore, loop.

The same function runs stage 1, stage 2, LoRA and the quickstart; configs/ says which.
"""

from __future__ import annotations

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

from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.errors import ConfigError, LlavaError
from llava_jax.layers import Compute
from llava_jax.llava import abstract_params, init_sharded, param_shardings
from llava_jax.sharding import make_mesh, put_batch, replicated
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.checkpoint import Checkpointer
from llava_jax.train.log import RunLog
from llava_jax.train.optim import make_optimizer, trainable_names
from llava_jax.train.step import Params, TrainState, make_loss, make_step

log = logging.getLogger(__name__)

DONE = "done.json"

MAX_BAD_STEPS = 20
"""Non-finite steps in a row after which a run stops instead of skipping on."""


class Stopped(LlavaError):
    """The run was asked to stop and saved its state; the same command goes on from there."""


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
    if (workdir / DONE).exists():
        done = json.loads((workdir / DONE).read_text())
        return TrainResult(workdir / "export", done["loss"], done["steps"])
    _record_config(config, workdir)

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
        Tokenizer.load(source.tokenizer),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        seed=config.seed,
    )
    steps = config.steps or math.ceil(config.epochs * loader.steps_per_epoch)

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
    start = 0
    if checkpoints.latest() is not None:
        state, data_state, meta = checkpoints.restore(state)
        loader.set_state(data_state)
        start = meta["step"]
        log.info("resumed at step %d of %d", start, steps)

    # The loop.
    stop = _StopFlag()
    run_log = RunLog(workdir, start=start, total=steps, name=config.name, quiet=quiet)
    lr = _schedule_of(config, peaks, steps)
    pending: tuple[int, Any, Any] | None = None
    bad, last_loss = 0, math.nan
    with jax.set_mesh(mesh), stop:
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
                checkpoints.close()
                run_log.close()
                raise Stopped(
                    f"stopped at step {number} of {steps}, state saved", fix="run it again to go on"
                )
        if pending is not None:
            last_loss, bad = _record(run_log, *pending, lr, bad)
    checkpoints.close()
    run_log.close()

    # What the run was for.
    save_model(workdir / "export", model_config, {**frozen, **state.params}, source)
    (workdir / "data_report.json").write_text(json.dumps(loader.report(), indent=1))
    loader.close()
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
    )
    model_config, params = source.config, dict(source.params)
    if config.lora_rank:
        lora = LoraConfig(config.lora_rank, config.lora_alpha, config.lora_dropout)
        model_config = dataclasses.replace(model_config, lora=lora)
    if config.data.max_length:
        model_config = dataclasses.replace(model_config, max_length=config.data.max_length)
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


def _record_config(config: Any, workdir: Path) -> None:
    """Keeps the settings beside the results; says so when a resumed run changes them."""
    path, text = workdir / "config.json", config.to_json_best_effort(indent=1, sort_keys=True)
    if path.exists() and path.read_text() != text:
        log.warning("settings differ from those %s was started with", path.parent)
    path.write_text(text)


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
