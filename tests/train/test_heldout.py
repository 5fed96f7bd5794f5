"""The loss on the held-out part: equal to a sample-by-sample sum, written and printed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from llava_jax.convert import load_checkpoint
from llava_jax.data.check import HELD_SIDE, open_data
from llava_jax.data.loader import make_loader
from llava_jax.layers import Compute
from llava_jax.text.constants import IGNORE
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.config import load_config
from llava_jax.train.heldout import HELDOUT, heldout_loss
from llava_jax.train.stages import run_stages
from llava_jax.train.step import make_loss
from tests.train.run import make_data, make_model

WORDS = {"batch_size": 8, "steps": 2, "dtype": "float32", "data.holdout": 0.4, "seed": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heldout")
    data = make_data(folder / "data", count=30)
    words = {
        "model.init": make_model(folder, data),
        "data.path": data,
        "data.image_folder": data.parent,
        "data.max_length": 512,
        "trainable": "projector,lora",
        "lora_rank": 4,
        **WORDS,
    }
    config = load_config("finetune_7b", [f"--config.{k}={v}" for k, v in words.items()])
    export = run_stages(config, folder / "run", quiet=True)
    return config, export, folder / "run"


def test_it_is_the_mean_over_the_tokens_of_the_held_out_samples(trained):
    config, export, workdir = trained
    checkpoint = load_checkpoint(export)
    loss = jax.jit(make_loss(checkpoint.config, Compute(jnp.dtype("float32"), "none")))
    loader = make_loader(
        {**config.data, "holdout_side": "held", "batch_size": 1, "group_by_modality": False},
        checkpoint.config,
        Tokenizer.load(checkpoint.tokenizer),
    )
    total = tokens = 0
    for _ in range(loader.samples):
        batch, _ = next(loader)
        count = int((batch["targets"] != IGNORE).sum())
        total += float(loss({}, checkpoint.params, batch)) * count
        tokens += count
    found = json.loads((workdir / HELDOUT).read_text())
    assert found["samples"] == loader.samples
    assert 0 < loader.samples < 30
    assert found["tokens"] == tokens
    assert found["steps"] == 2
    assert found["loss"] == pytest.approx(total / tokens, rel=1e-5)
    loader.close()


def test_micro_batches_and_packing_give_the_same(trained):
    config, export, workdir = trained
    found = json.loads((workdir / HELDOUT).read_text())
    changed = config.copy_and_resolve_references()
    changed.mesh.fsdp, changed.mesh.data = 2, 1
    changed.mesh.tensor, changed.grad_accum, changed.data.pack = 4, 4, True
    again = heldout_loss(changed, export)
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert (again["samples"], again["tokens"]) == (found["samples"], found["tokens"])


def test_a_packed_batch_of_any_size_gives_the_same(trained):
    """12 samples can be packed to 8 rows, but are not 8 equal parts."""
    config, export, workdir = trained
    found = json.loads((workdir / HELDOUT).read_text())
    changed = config.copy_and_resolve_references()
    changed.batch_size, changed.grad_accum, changed.data.pack = 12, 2, True
    changed.mesh.fsdp, changed.mesh.data, changed.mesh.tensor = 4, 1, 2
    again = heldout_loss(changed, export)
    assert again["loss"] == pytest.approx(found["loss"], rel=1e-5)
    assert again["samples"] == found["samples"]


def test_it_is_printed_again_for_a_finished_run(trained, capsys):
    config, _, workdir = trained
    before = (workdir / HELDOUT).stat().st_mtime_ns
    run_stages(config, workdir, quiet=True)
    assert "held-out loss    " in capsys.readouterr().out
    assert (workdir / HELDOUT).stat().st_mtime_ns == before


def test_a_bad_image_is_left_out_and_not_replaced(trained, caplog):
    """The loss is that of the others, and the number of samples says so."""
    config, export, workdir = trained
    found = json.loads((workdir / HELDOUT).read_text())
    held = open_data({**config.data, **HELD_SIDE})
    image = next(Path(config.data.image_folder) / r["image"] for r in held.records if "image" in r)
    whole = image.read_bytes()
    try:
        image.unlink()
        caplog.clear()
        again = heldout_loss(config, export)
    finally:
        image.write_bytes(whole)
    assert not caplog.messages  # the start of a run names it
    assert (again["samples"], again["left_out"]) == (found["samples"] - 1, 1)
    assert again["tokens"] < found["tokens"]
    rest = heldout_loss(config, export)
    assert rest["left_out"] == 0
    part = again["loss"] * again["tokens"] / found["tokens"]
    assert part < rest["loss"]  # sums of the same losses but for one


def test_cut_samples_are_counted(trained):
    config, export, _ = trained
    short = config.copy_and_resolve_references()
    short.data.max_length = 190  # of 188 to 196
    found = heldout_loss(short, export)
    assert 0 < found["cut"] < found["samples"]
