"""Validation while a run trains: the loss on each set, answers, the best model, and when to stop early.

What is best and how long none was better follow from the rows of eval.jsonl alone, which a resumed run
cuts off where it goes on: so it decides as the run that was never stopped. Each row says by what and on
which data it was judged; rows that were judged otherwise are not compared with.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llava_jax.data.loader import Loader
from llava_jax.errors import LlavaError, counted
from llava_jax.report.files import EVAL, read_rows
from llava_jax.sharding import put_batch, replicated, row_parts
from llava_jax.text.constants import IGNORE
from llava_jax.train.answer import Asker
from llava_jax.train.control import Flags, put_flags
from llava_jax.train.distributed import check_alike, gather, is_main, together
from llava_jax.train.evalsets import EvalSet, eval_sets
from llava_jax.train.model_io import Opened, compute_of, save_model
from llava_jax.train.optim import exported_params
from llava_jax.train.step import Params, TrainState, make_loss
from llava_jax.train.steps import Feed, open_loader
from llava_jax.train.supervise import alive

log = logging.getLogger(__name__)

BEST = "best"
"""The folder of the best model."""


class Validation:
    """The validation of a run. All processes call its methods alike.

    over: whether early_stop ends the run. best: {"step", "value"} of the model in best/, or None.
    Raises ConfigError and SampleError for sets that cannot be read, before any weights are.
    """

    def __init__(self, config: Any, opened: Opened, mesh: Mesh, workdir: Path):
        self._config, self._opened, self._mesh, self._workdir = config, opened, mesh, workdir
        self.sets = eval_sets(config)
        self._rows: list[dict[str, Any]] = []
        self._losses: dict[str, SetLoss] = {}
        scorers: dict[Any, Any] = {}
        for s in self.sets:
            if s.path or s.held:
                self._losses[s.name] = SetLoss(s, config, opened, mesh, scorers)
        asked = [s for s in self.sets if s.scores or (s.path or s.held)]
        self._asker = Asker(config, opened, mesh, workdir, asked) if asked else None
        self._measure = {"by": config.best_by, "on": gather(self._digest())[0]}
        self._compiled = False

    def _digest(self) -> str:
        """Of the data that `best_by` is measured on; the same where they were only moved."""
        name = self._config.best_by.rpartition(".")[0]
        parts = []
        for s in self.sets:
            if s.name == name or (not name and s.name in self._losses):
                loss = self._losses.get(s.name)
                files = sorted(Path(s.data).iterdir()) if s.benchmark and is_main() else []
                sizes = [(f.name, f.stat().st_size) for f in files if f.is_file()]
                parts.append(
                    [loss and loss.loader.identity()["content"], s.ask, s.benchmark, sizes]
                )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def resume(self, step: int, steps: int, run_log: Any) -> None:
        """Takes up the validations until `step` of `steps` that are in eval.jsonl. run_log: of this process.

        Where they were judged by something else, or on other data, best/ is set aside and begins anew.
        """
        rows = read_rows(self._workdir / EVAL) if self.sets and is_main() else []
        ours = [row for row in rows if row.keys() >= {"step", "best", "waited"}]
        self._rows = gather([row for row in ours if row["step"] <= step])[0]
        self._log, self._steps = run_log, steps
        if self._rows and self._last is None:
            best = self._rows[-1]["best"]
            aside = together(lambda: self._set_aside(best) if is_main() else None)
            kept = f"; the best until now is in {aside}" if aside else ""
            log.info("best_by or its data changed: best/ and early_stop begin anew%s", kept)
        elif self.over:
            log.info("%s", stopped_early(step, steps, self._config.early_stop))

    def _set_aside(self, best: dict[str, Any] | None) -> Path | None:
        """Renames best/ to best.STEP, and says so."""
        folder, number = self._workdir / BEST, 1
        if not (best and folder.exists()):
            return None
        aside = folder.with_name(f"{BEST}.{best['step']}")
        while aside.exists():
            number += 1
            aside = folder.with_name(f"{BEST}.{best['step']}.{number}")
        return folder.rename(aside)

    def due(self, step: int, steps: int) -> bool:
        """Whether the state after `step` of `steps` is to be validated, and was not yet."""
        every = self._config.eval_every
        wanted = step == steps or (every and step % every == 0)
        return bool(self.sets and step and wanted and step not in {r["step"] for r in self._rows})

    @property
    def _last(self) -> dict[str, Any] | None:
        """The last row, if it was judged as this run judges."""
        row = self._rows[-1] if self._rows else {}
        same = all(row.get(key, value) == value for key, value in self._measure.items())
        return row if row and same else None

    @property
    def best(self) -> dict[str, Any] | None:
        return self._last["best"] if self._last else None

    @property
    def waited(self) -> int:
        """How many validations in a row were not better; from 0 again where a run that had stopped early
        was given more steps."""
        row = self._last
        return row["waited"] if row and row.get("stops", self._steps) == self._steps else 0

    @property
    def over(self) -> bool:
        return 0 < self._config.early_stop <= self.waited

    def run(self, step: int, state: TrainState, frozen: Params, stop: threading.Event) -> bool:
        """Validates what a run would export of `state` with the frozen rest, records it, and saves the
        model if it is the best so far. False, and left undone, where a process was asked to stop."""
        alive(steps=False)
        if not self._compiled:
            self._log.note(f"validating at step {step:,}; the first time compiles")
            self._compiled = True
        params = exported_params(state.params, state.opt_state)
        with self._log.aside("eval"):
            found: dict[str, dict[str, Any]] = {s.name: {} for s in self.sets}
            for name, loss in self._losses.items():
                numbers = loss.of(params, frozen, stop)
                if numbers is None:
                    return False
                found[name] |= numbers
            if self._asker and not self._asker.ask(step, params, frozen, found, self._log, stop):
                return False
            row = {"step": step, "sets": found, **self._measure, **self._judged(step, found)}
            if row["best"] and row["best"]["step"] == step and not self._keep(params):
                row |= {"best": self.best, "unsaved": row["best"]}
            if step < self._steps and 0 < self._config.early_stop <= row["waited"]:
                row["stops"] = self._steps
            self._rows.append(row)
            self._log.validation(row)
        alive()
        self._log.note(validation_line(row))
        if self.over and step < self._steps:
            best = row["best"]
            of = f" than at step {best['step']:,}" if best else ""
            times = self._config.early_stop
            log.info(
                "stopping at step %d: the last %d validations were not better%s", step, times, of
            )
        return True

    def finish(self) -> None:
        """Says which model best/ holds, and whether a better one could not be saved."""
        best, sign = self.best, _sign(self._config.best_by)
        if best:
            log.info("best/ holds the model of step %d (%.4f)", best["step"], best["value"])
        lost = [
            r["unsaved"] for r in self._rows if "unsaved" in r and r["by"] == self._measure["by"]
        ]
        top = min(lost, key=lambda row: sign * row["value"], default=None)
        if top and (not best or sign * top["value"] < sign * best["value"]):
            words = "step %d was better (%.4f), but its model could not be saved in best/"
            log.warning(words, top["step"], top["value"])

    def _keep(self, params: Params) -> bool:
        """Saves the best model, if it can be: a full disk ends no training. Every process sees the error."""
        try:
            save_model(self._workdir / BEST, self._opened, params)
        except (OSError, LlavaError) as error:
            log.error("the best model is not saved: %s", error)
            return False
        return True

    def _judged(self, step: int, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """{"value", "best", "waited"}: the number that best_by names, and what follows from it."""
        by = self._config.best_by
        name, _, key = by.rpartition(".")
        losses = [numbers["loss"] for numbers in found.values() if "loss" in numbers]
        value = (
            found[name].get(key) if name else sum(losses) / len(losses) if losses and by else None
        )
        sign = _sign(by)
        best, waited = self.best, self.waited
        if value is None or math.isnan(value):
            return {"value": None, "best": best, "waited": waited + 1}
        if best is None or sign * value < sign * best["value"]:
            return {"value": value, "best": {"step": step, "value": value}, "waited": 0}
        return {"value": value, "best": best, "waited": waited + 1}

    def close(self) -> None:
        """Stops reading."""
        for loss in self._losses.values():
            loss.close()


def _sign(best_by: str) -> int:
    """Times which a value is the smaller, the better."""
    return 1 if best_by.rpartition(".")[2] == "loss" else -1


def stopped_early(step: int, steps: int, patience: int) -> str:
    """Why a run stays where it stopped early, and how it goes on."""
    return (
        f"early_stop={patience} ended this run at step {step:,} of {steps:,}; --config.early_stop=0, "
        "or a larger one, goes on"
    )


def validation_line(row: dict[str, Any]) -> str:
    """A validation in words."""
    parts = []
    for name, numbers in row["sets"].items():
        scores = {k: v for k, v in numbers.items() if isinstance(v, float)}
        shown = (f"{k.replace('_', ' ')} {v:.4f}" for k, v in scores.items())
        parts.append(f"{name}: {', '.join(shown)}")
    best = row["best"]
    words = (
        " (better than before, but not saved)"
        if "unsaved" in row
        else ""
        if not best
        else " (best)"
        if best["step"] == row["step"]
        else f" (best: {best['step']:,})"
    )
    return f"step {row['step']:,} validated: {'; '.join(parts)}{words}"


# The loss on a set ---------------------------------------------------------------------------------


class SetLoss:
    """The loss on one set. Each sample is seen once, whole and unaugmented, without dropout; none
    replaces those that are bad.

    scorers: compiled functions that sets share.
    """

    def __init__(
        self,
        s: EvalSet,
        config: Any,
        opened: Opened,
        mesh: Mesh,
        scorers: dict[Any, Any] | None = None,
    ):
        stage = config.copy_and_resolve_references()
        with stage.unlocked():
            stage.data.update(s.settings())
        self._mesh, self._micro = mesh, stage.grad_accum
        parts = math.lcm(row_parts(mesh, stage.grad_accum), jax.process_count())
        rows = -(-stage.batch_size // parts) * parts  # packed batches of any size are trained
        few = {"threads": min(2, stage.data.threads), "prefetch": min(2, stage.data.prefetch)}
        # Of what is held out, the start of a run says what is missing.
        self.loader: Loader = together(
            lambda: open_loader(stage, opened, mesh, say=not s.held, batch_size=rows, **few)
        )
        if left := 0 if s.held else self.loader.report()["bad_count"]:
            log.warning(
                "data.eval %s: %s left out; sets are read as the training data are (data.version %s)",
                s.name, counted(left, "sample"), stage.data.version,
            )  # fmt: skip
        check_alike({f"data.eval {s.name}: {k}": v for k, v in self.loader.identity().items()})
        self.compute = compute_of(stage, opened.config, mesh, self.loader.turns)
        scorers = {} if scorers is None else scorers
        if self.compute not in scorers:
            score = make_scorer(make_loss(opened.config, self.compute))
            scorers[self.compute] = jax.jit(score, out_shardings=replicated(mesh))
        self._score = scorers[self.compute]

    def of(
        self, trained: Params, frozen: Params, stop: threading.Event | None = None
    ) -> dict[str, Any] | None:
        """{"loss", "samples", "tokens"}: the mean per supervised token. None where it was stopped.

        To be called under jax.set_mesh. The loader is endless and its epochs are alike: each call takes
        one of them, so that after None no other may follow. Raises what the loader does.
        """
        feed, total, tokens, samples = Feed(self.loader), 0.0, 0, 0
        for _ in range(self.loader.steps_per_epoch):
            batch, _ = feed.next()
            alive(steps=False)
            asked = Flags(bool(stop and stop.is_set()), False, feed.error is not None)
            placed = put_batch(batch, self._mesh, self._micro), put_flags(asked, self._mesh)
            loss, count, seen, flags = jax.device_get(self._score(trained, frozen, *placed))
            total, tokens = total + float(loss), tokens + int(count)
            samples += int(seen)
            if flags[2]:
                feed.stop()
            if flags[0]:
                return None
        return {"loss": total / max(tokens, 1), "samples": samples, "tokens": tokens}

    def close(self) -> None:
        self.loader.close()


def make_scorer(loss: Any) -> Any:
    """score(trained, frozen, batch, flags) -> (summed loss, supervised tokens, samples with any, flags),
    over all micro-batches of unpacked rows; flags: joined over all processes."""

    def score(trained: Params, frozen: Params, batch: Any, flags: jax.Array):
        def micro(rows):
            held = rows["targets"] != IGNORE  # [G, P]
            count = held.sum()
            value = loss(trained, frozen, rows)
            return jnp.where(count, value * count, 0.0), count, held.any(-1).sum()

        losses, counts, samples = jax.lax.map(micro, batch)
        return losses.sum(), counts.sum(), samples.sum(), flags.max(0)

    return score
