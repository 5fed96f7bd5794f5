"""A training run, to be read from top to bottom: checks, model, mesh, optimizer, restore, loop.

The same function runs stage 1, stage 2, LoRA and the quickstart; configs/ says which. All processes
of a run go through it alike; the main one writes the files.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any

import jax

from llava_jax.errors import Diverged, LlavaError, Stopped
from llava_jax.sharding import make_mesh, put_batch
from llava_jax.train.checkpoint import Checkpointer, clear
from llava_jax.train.control import put_flags, stop_flag
from llava_jax.train.distributed import check_alike, gather, is_main, on_main, together
from llava_jax.train.log import open_log
from llava_jax.train.model_io import compute_of, open_model, read_params, save_model, split_params
from llava_jax.train.optim import exported_params
from llava_jax.train.overview import overview, write_facts
from llava_jax.train.placement import placement
from llava_jax.train.profiling import Profile
from llava_jax.train.program import make_program
from llava_jax.train.resume import begin, check_same, finish, finished, goes_on
from llava_jax.train.skips import LAST_GOOD, Skips
from llava_jax.train.steps import Feed, Saver, kept_rows, make_metrics, open_loader, room_for
from llava_jax.train.supervise import alive
from llava_jax.train.validate import Validation, stopped_early

log = logging.getLogger(__name__)


def train(
    config: Any, workdir: Path, *, quiet: bool = False, recipe: Any = None, profile: str = ""
) -> int:
    """Trains as `config` (see configs/common.py) says; resumes what is found in `workdir`.

    config: one stage, checked; workdir: held by this run (llava_jax.train.stages.run_stages does both).
    recipe: the settings that `config` was made from, for the report. profile: "FROM:TO", steps to trace.
    Returns the number of steps; the model is in `workdir`/export.
    Raises ConfigError, WeightError or SampleError for what cannot be trained, and Stopped after a
    SIGTERM or Ctrl-C, once the state is saved.
    """
    began = time.perf_counter()
    with contextlib.ExitStack() as cleanup:
        changed = together(lambda: check_same(config, workdir))
        if (steps := _finished(config, workdir, changed)) is not None:
            return steps

        # Everything that needs no weights comes first: mesh, headers, tokenizer, data.
        mesh = make_mesh(**config.mesh)
        opened = together(lambda: open_model(config))
        bad = str(workdir / "bad.jsonl")
        rows = together(lambda: kept_rows(config, workdir / "checkpoints"))
        loader = together(lambda: open_loader(config, opened, mesh, bad_report=bad, **rows))
        cleanup.callback(loader.close)
        check_alike({f"data.{name}": value for name, value in loader.identity().items()})
        steps = config.steps or loader.steps(config.epochs)
        validation = Validation(config, opened, mesh, workdir)
        cleanup.callback(validation.close)
        compute = compute_of(config, opened.config, mesh, loader.turns)

        # Model: every parameter straight onto its shards; trained ones in float32.
        params = together(lambda: read_params(opened, config.seed, mesh, config.dtype))
        files = loader.files
        program = make_program(config, opened.config, params, mesh, steps, compute, len(files))
        trained, frozen = split_params(params, set(program.state.params), program.compute.dtype)
        log.info("the run:\n%s", overview(config, workdir, program, loader, steps))

        # Resume.
        checkpoints = Checkpointer(workdir / "checkpoints", keep=config.keep_checkpoints)
        cleanup.callback(checkpoints.close)
        done, meta, checkpoints.ends = 0, {}, steps
        found = checkpoints.restore(program.state)
        if found is None:
            state = program.start(trained)
        else:
            trained.clear()
            state, meta = found
            loader.set_state(meta["data"])
            done = meta["step"]
            log.info("resumed at step %d of %d", done, steps)
            if changed:
                log.info("settings that changed since: %s", ", ".join(changed))
        del trained
        on_main(lambda: begin(config, workdir))
        what: Any = config, workdir, program, loader, steps, recipe, opened.name
        on_main(lambda: write_facts(*what))

        # The loop.
        run_log = open_log(config, workdir, done, steps, mesh.size, began, quiet=quiet)
        cleanup.callback(run_log.close)
        validation.resume(done, steps, run_log)
        profiler = Profile(profile if is_main() else "", workdir / "profile", done, steps)
        cleanup.callback(profiler.close)
        feed = Feed(loader)
        skips = Skips(workdir, config.max_skipped, done, meta)
        watch = make_metrics(config, program, opened.config, steps, run_log, skips, meta, files)
        saver = Saver(checkpoints, run_log, config.save_minutes, done)
        metrics: Any = None
        stop = cleanup.enter_context(stop_flag())
        with jax.set_mesh(mesh):
            try:
                skips.check()  # a run that diverged goes no step further by itself
                while True:
                    if validation.due(done, steps):
                        watch.drain()
                        if not (watch.failed or validation.run(done, state, frozen, stop)):
                            raise _stopped(f"at step {done} of {steps}, before its validation")
                    if done == steps or validation.over:
                        break
                    profiler.between(done, metrics)
                    batch, info = feed.next()
                    own = saver.flags(stop=stop.is_set(), failed=feed.error is not None)
                    placed = put_batch(batch, mesh, config.grad_accum), put_flags(own, mesh)
                    if not metrics and is_main():
                        log.info("what lies where:\n%s", placement(state, frozen, placed[0]))
                    with jax.transfer_guard("disallow"):  # all that a step needs is placed already
                        state, metrics = program.step(state, frozen, *placed)
                    done += 1
                    flags = watch.after(done, metrics, info, own)
                    saver.after(flags)
                    alive()
                    due = flags.save or done % config.save_every == 0 or done == steps
                    if due or flags.stop:
                        watch.drain()
                    if watch.failed:
                        done = watch.failed - 1
                        feed.stop()
                    skips.check()
                    if flags.stop and done < steps:
                        raise _stopped(f"at step {done} of {steps}")
                    if due:
                        saver.save(done, state, feed, {"loss": watch.loss, **skips.meta()})
            except LlavaError as error:  # Stopped is one
                watch.drain()
                saver.save(done, state, feed, {"loss": watch.loss, **skips.meta()}, last=True)
                if isinstance(error, Diverged):
                    _keep_last_good(workdir / LAST_GOOD, opened, state)
                saver.finish(error)
                raise
            saver.save(done, state, feed, {"loss": watch.loss, **skips.meta()}, last=True)
        alive(steps=False)

        facts: dict[str, Any] = {"loss": watch.loss, "steps": done, "skipped": skips.total}
        if done < steps:
            facts["early"] = {"of": steps, "waited": validation.waited}
        _export(workdir, opened, state, feed, saver, stop, facts)
        validation.finish()
        return done


def _finished(config: Any, workdir: Path, changed: list[str]) -> int | None:
    """The steps of a run that is done, and says so; None where there is something to train."""
    done = finished(workdir)
    if done is None or goes_on(done, config, changed):
        return None
    if is_main():
        clear(workdir / "checkpoints")
    log.info("%s: finished before, %d steps", workdir, done["steps"])
    if early := done.get("early"):
        log.info("%s", stopped_early(done["steps"], early["of"], config.early_stop))
    return done["steps"]


def _export(
    workdir: Path,
    opened: Any,
    state: Any,
    feed: Feed,
    saver: Saver,
    stop: threading.Event,
    facts: dict[str, Any],
) -> None:
    """What the run was for, and the record that it is done. A disk without room for a checkpoint may have
    some for the model. Raises Stopped as `train` does; a stop while it writes waits for the model."""
    saver.settle()  # the export may take long: the last step is to be on the disk before it begins
    if any(gather(stop.is_set())):
        saver.finish()
        raise _stopped(f"after the last step, {facts['steps']}, before the export")
    with room_for(workdir):
        save_model(workdir / "export", opened, exported_params(state.params, state.opt_state))
        report = feed.report()
        for line in feed.loader.cut_lines(report) if is_main() else ():
            log.warning("%s", line)
        on_main(lambda: finish(workdir, report, **facts))
    saver.finish()
    if any(gather(stop.is_set())):
        where = (
            f"stopped after the last step, {facts['steps']}; the model is in {workdir / 'export'}"
        )
        raise Stopped(where, fix="run the same command again for what follows")


def _stopped(where: str) -> Stopped:
    return Stopped(f"stopped {where}, state saved", fix="run the same command again to resume")


def _keep_last_good(folder: Path, opened: Any, state: Any) -> None:
    """Saves the model before the steps that were skipped. A full disk hides no divergence."""
    try:
        save_model(folder, opened, exported_params(state.params, state.opt_state))
    except (OSError, LlavaError) as error:
        log.error("the model before the skipped steps is not saved: %s", error)
