"""The loss on the part of the data that data.holdout holds out, after training."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import jax

from llava_jax.data.check import HELD_SIDE
from llava_jax.errors import LlavaError
from llava_jax.sharding import make_mesh, put_batch, replicated, row_parts
from llava_jax.text.constants import IGNORE
from llava_jax.train.distributed import is_main, on_main, together
from llava_jax.train.model_io import compute_of, open_model, read_params, split_params
from llava_jax.train.resume import read_record
from llava_jax.train.step import make_loss
from llava_jax.train.steps import Feed, open_loader
from llava_jax.util import write_json

log = logging.getLogger(__name__)

HELDOUT = "heldout.json"


def heldout_loss(config: Any, export: Path) -> dict[str, Any]:
    """{"loss", "samples", "left_out", "cut", "tokens"}: mean loss per supervised token over the held-out samples.

    config: the stage that made the model folder `export`. Each sample is seen once, whole and
    unaugmented, with the loss function, dtype and mesh of training and no dropout; none replaces those
    that are left out, as their image is missing or refused, or nothing of them can be trained.
    Raises SampleError if no sample was held out.
    """
    stage = config.copy_and_resolve_references()
    stage.model.update(init=str(export), base="", vision_tower="")
    stage.lora_rank = 0  # the adapters are in the model
    mesh, micro = make_mesh(**stage.mesh), stage.grad_accum
    opened = open_model(stage)
    parts = math.lcm(row_parts(mesh, micro), jax.process_count())
    rows = -(-stage.batch_size // parts) * parts  # packed batches of any size are trained
    loader = together(
        # Where a run begins, it said which held-out images are missing.
        lambda: open_loader(stage, opened, mesh, say=False, **_PLAIN, batch_size=rows)
    )
    compute = compute_of(stage, opened.config, mesh, loader.turns)
    params = read_params(opened, stage.seed, mesh)
    _, params = split_params(params, set(), compute.dtype)
    feed = Feed(loader)
    score = jax.jit(_scorer(make_loss(opened.config, compute)), out_shardings=replicated(mesh))
    total, tokens = 0.0, 0
    try:
        with jax.set_mesh(mesh):
            for _ in range(loader.steps_per_epoch):
                batch, _ = feed.next()
                loss, count = jax.device_get(score(params, put_batch(batch, mesh, micro)))
                total, tokens = total + float(loss), tokens + int(count)
        feed.stop()
        report = feed.report()
    finally:
        loader.close()
    return {
        "loss": total / max(tokens, 1),
        "samples": report["given"] - report["empty"],
        "left_out": report["empty"],
        "cut": report["cut"],
        "tokens": tokens,
    }


_PLAIN = {
    **HELD_SIDE,
    "pack": "",
    "pack_length": 0,
    "group_by_modality": False,
    "shuffle": False,
    "augment": "",
    "turns_per_sample": 0,
    "cache_images": False,
}
"""Data settings that show every held-out sample once, as it is stored."""


def _scorer(loss):
    """score(params, batch) -> (summed loss, number of supervised tokens), over all micro-batches."""

    def score(params, batch):
        def micro(rows):
            count = (rows["targets"] != IGNORE).sum()
            return loss({}, params, rows) * count, count

        losses, counts = jax.lax.map(micro, batch)
        return losses.sum(), counts.sum()

    return score


def report_heldout(config: Any, export: Path, workdir: Path, steps: int) -> None:
    """Prints `heldout_loss` and writes it to heldout.json, with the number of steps trained.

    A file with the same number of steps is not computed again.
    """
    path = workdir / HELDOUT
    found = read_record(path) if path.exists() else {}
    if found.get("steps") != steps:
        try:
            found = {**heldout_loss(config, export), "steps": steps}
        except LlavaError as error:  # in another process it may be of another kind
            log.warning("no loss on held-out samples: %s", error)
            return
        on_main(lambda: write_json(path, found))
    if is_main():
        less = {"left_out": "left out", "cut": "cut to data.max_length"}
        less = "".join(f"; {found[n]:,} {words}" for n, words in less.items() if found.get(n))
        print(
            f"held-out loss    {found['loss']:.4f} (mean over {found['tokens']:,} tokens of "
            f"{found['samples']:,} held-out samples{less})"
        )
