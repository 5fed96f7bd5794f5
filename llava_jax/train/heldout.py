"""The loss on the part of the data that data.holdout holds out, after training."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from llava_jax.errors import LlavaError
from llava_jax.sharding import make_mesh
from llava_jax.train.distributed import is_main, on_main
from llava_jax.train.evalsets import HELD_OUT, EvalSet
from llava_jax.train.model_io import open_model, read_params, split_params
from llava_jax.train.resume import read_record
from llava_jax.train.steps import Feed
from llava_jax.train.validate import SetLoss
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
    mesh, opened = make_mesh(**stage.mesh), open_model(stage)
    held = SetLoss(EvalSet(HELD_OUT, held=True), stage, opened, mesh)
    try:
        params = read_params(opened, stage.seed, mesh)
        _, params = split_params(params, set(), held.compute.dtype)
        with jax.set_mesh(mesh):
            found = held.of({}, params)
        report = Feed(held.loader).report()
    finally:
        held.close()
    return {
        **(found or {}),
        "samples": report["given"] - report["empty"],
        "left_out": report["empty"],
        "cut": report["cut"],
    }


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
