"""Checkpoints that cannot be written or read: one line that says which, and what to do."""

import shutil

import jax.numpy as jnp
import pytest

from llava_jax.errors import LlavaError
from llava_jax.train.checkpoint import Checkpointer, NotSaved
from llava_jax.train.step import TrainState


def state(value):
    return TrainState(
        jnp.int32(value), {"a": jnp.full((64, 64), value, jnp.float32)}, (jnp.ones(3),)
    )


@pytest.fixture
def folder(tmp_path):
    checkpoints = Checkpointer(tmp_path / "checkpoints")
    for step in (1, 2):
        checkpoints.save(step, state(step), {"step": step}, {"step": step})
    checkpoints.close()
    return tmp_path / "checkpoints"


def restored(folder):
    checkpoints = Checkpointer(folder)
    try:
        return checkpoints.restore(state(0))
    finally:
        checkpoints.close()


def _cut(folder):
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:50])


DAMAGES = {
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no data": lambda step: shutil.rmtree(step / "data"),
    "nothing": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
    "cut off": lambda step: _cut(step / "state"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(folder, damage):
    DAMAGES[damage](folder / "2")
    with pytest.raises(LlavaError, match=r"checkpoints/2 cannot be read.*resumes from step 1\b"):
        restored(folder)
    shutil.rmtree(folder / "2")
    found, data, meta = restored(folder)
    assert data == meta == {"step": 1}
    assert (found.params["a"] == 1).all()


def test_without_another_one_the_run_begins_anew(folder):
    shutil.rmtree(folder / "1")
    DAMAGES["no state"](folder / "2")
    with pytest.raises(LlavaError, match="remove this folder, and the run starts again"):
        restored(folder)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("RESOURCE_EXHAUSTED: x: No space left on device [28]"), "no space left on dev"),
        (OSError(122, "Disk quota exceeded"), "disk quota exceeded"),
        (RuntimeError("something else"), "RuntimeError: something else"),
    ],
)
def test_what_stops_a_write_is_said(tmp_path, monkeypatch, error, said):
    checkpoints = Checkpointer(tmp_path / "checkpoints")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", fail)
    with pytest.raises(NotSaved, match=f"could not be written: {said}") as info:
        checkpoints.save(1, state(1), {}, {})
    assert str(tmp_path / "checkpoints") in str(info.value)
    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
    with pytest.raises(NotSaved, match=said):
        checkpoints.wait()
