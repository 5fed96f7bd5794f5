"""Checkpoints: digests of every file, damage that is named and passed over, disks that take none."""

import errno
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from llava_jax import cli
from llava_jax.digests import SUMS
from llava_jax.errors import LlavaError
from llava_jax.sharding import make_mesh
from llava_jax.train.checkpoint import Checkpointer
from llava_jax.train.step import TrainState


def state(value, sharding=None):
    rows = np.random.default_rng(value).normal(size=(64, 64)).astype(np.float32)
    place = jnp.asarray if sharding is None else lambda x: jax.device_put(x, sharding)
    return TrainState(jnp.int32(value), {"a": place(rows)}, (jnp.ones(3),))


def saved(folder, *steps, keep=2):
    checkpoints = Checkpointer(folder, keep=keep)
    for step in steps:
        checkpoints.begin(step, state(step), {"step": step})
        assert checkpoints.settle()
    checkpoints.close()


@pytest.fixture
def folder(tmp_path):
    saved(tmp_path / "checkpoints", 1, 2)
    return tmp_path / "checkpoints"


def restored(folder, like=None) -> Any:
    checkpoints = Checkpointer(folder)
    try:
        return checkpoints.restore(state(0) if like is None else like)
    finally:
        checkpoints.close()


def test_what_a_kill_left_to_be_removed_is_removed_at_the_next_start(tmp_path):
    saved(tmp_path, 1, 2, 3, keep=3)
    assert restored(tmp_path)[1] == {"step": 3}
    assert names(tmp_path) == ["2", "3"]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def files(step):
    return sorted(p for p in step.rglob("*") if p.is_file())


def damage(path, how, rng):
    data = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(data[: rng.integers(len(data))])
    elif how == "zeros":
        at = int(rng.choice(np.flatnonzero(np.frombuffer(data, np.uint8))))
        end = at + 1 + int(rng.integers(4096))
        data[at:end] = bytes(len(data[at:end]))
        path.write_bytes(data)
    else:
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)


HOW = ("bit", "cut off", "zeros", "deleted")


@pytest.mark.parametrize("how", HOW)
def test_any_damage_is_named_and_the_step_before_serves(folder, how, caplog, capsys):
    count = len(files(folder / "2"))
    for which in range(count):
        copy = shutil.copytree(folder, folder.parent / f"copy{which}" / "checkpoints")
        path = files(copy / "2")[which]
        damage(path, how, np.random.default_rng(which))
        assert cli.main(["verify", "-q", str(copy.parent)]) == 1
        said = capsys.readouterr().out
        assert SUMS in said or str(path.relative_to(copy / "2")) in said
        caplog.clear()
        found, meta = restored(copy)
        assert meta == {"step": 1}
        assert np.array_equal(found.params["a"], state(1).params["a"])
        assert "checkpoint 2 is not used: " in caplog.text
        assert names(copy) == ["1", "2.damaged"]


def test_where_all_are_damaged_nothing_begins_anew_by_itself(folder):
    for step in ("1", "2"):
        (folder / step / "run.json").unlink()
    with pytest.raises(LlavaError, match="all checkpoints are damaged .2: run.json is missing; 1:"):
        restored(folder)
    assert names(folder) == ["1", "2"]
    with pytest.raises(LlavaError, match="all checkpoints are damaged"):  # and so it stays
        restored(folder)


def test_checkpoints_without_digests_are_refused_until_they_are_given_some(folder):
    """By the command in docs/reliability.md."""
    for step in ("1", "2"):
        (folder / step / SUMS).unlink()
    with pytest.raises(LlavaError, match="no checkpoint has SHA256SUMS; an earlier version wrote"):
        restored(folder)
    page = Path("docs/reliability.md").read_text().splitlines()
    command = next(line for line in page if "-exec sha256sum" in line)
    subprocess.run(command.partition("&& ")[2], shell=True, check=True, cwd=folder / "2")
    assert restored(folder)[1]["step"] == 2


def test_the_digests_are_those_of_other_tools(folder):
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=folder / "2", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b": OK\n") == len(files(folder / "2")) - 1


def test_only_the_newest_are_kept_and_nothing_of_a_killed_save(tmp_path):
    (tmp_path / ".7.tmp" / "state").mkdir(parents=True)
    saved(tmp_path, 1, 2, 3, 4, keep=3)
    assert names(tmp_path) == ["2", "3", "4"]


def test_arrays_come_back_to_the_bit_on_any_number_of_devices(tmp_path):
    for step, count in enumerate((8, 4, 1, 8), 1):
        mesh = make_mesh(devices=jax.devices()[:count])
        place = jax.NamedSharding(mesh, P("fsdp"))
        if step > 1:
            found, _ = restored(tmp_path, state(0, place))
            assert found.params["a"].sharding == place
            assert np.array_equal(found.params["a"], state(step - 1).params["a"])
        checkpoints = Checkpointer(tmp_path)
        checkpoints.begin(step, state(step, place), {"step": step})
        assert checkpoints.settle()
        checkpoints.close()


def test_a_save_is_committed_once_it_is_written_and_not_before(tmp_path):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.begin(3, state(3), {"step": 3})
    checkpoints.advance(writing=True, lost=False)
    assert names(tmp_path) == [".3.tmp"]
    while checkpoints.writing:
        pass
    checkpoints.advance(checkpoints.writing, checkpoints.lost)
    checkpoints.close()
    assert names(tmp_path) == ["3"]


@pytest.mark.parametrize(
    ("where", "number"),
    [("mkdir", errno.EROFS), ("write_sums", errno.ENOSPC), ("rename", errno.ENOSPC)],
)
def test_a_disk_that_takes_nothing_is_said_and_left_as_it_was(
    folder, monkeypatch, caplog, where, number
):
    checkpoints = Checkpointer(folder)

    def full(*_, **__):
        raise OSError(number, os.strerror(number), "x")

    with monkeypatch.context() as patch:
        if where == "write_sums":
            patch.setattr("llava_jax.train.checkpoint.write_sums", full)
        else:
            patch.setattr(f"pathlib.Path.{where}", full)
        checkpoints.begin(3, state(3), {"step": 3})
        assert not checkpoints.settle()
        assert checkpoints.failed == (where != "mkdir") or checkpoints.failed
    said = os.strerror(number).lower()
    assert f"the checkpoint of step 3 is not saved: {said}" in caplog.text
    assert names(folder) == ["1", "2"]
    (folder / ".3.tmp").mkdir()  # as if it could not be removed
    checkpoints.begin(4, state(4), {"step": 4})
    assert checkpoints.settle()
    checkpoints.close()
    assert names(folder) == ["2", "4"]


@pytest.mark.skipif(not shutil.which("strace"), reason="strace is not installed")
def test_saved_means_on_the_disk(tmp_path):
    """Every file of the checkpoint, its folder and the folder above are synced, before and after the rename."""
    code = (
        "from pathlib import Path; import sys; from tests.train.test_checkpoint import saved;"
        "saved(Path(sys.argv[1]), 1)"
    )
    trace = tmp_path / "trace"
    calls = "fsync,fdatasync,rename,renameat,renameat2"
    words = ["strace", "-f", "-y", "-e", f"trace={calls}", "-o", str(trace)]
    words += ["python", "-c", code, str(tmp_path / "checkpoints")]
    subprocess.run(words, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    lines = [line for line in trace.read_text().splitlines() if " = 0" in line]
    renamed = next(i for i, x in enumerate(lines) if 'checkpoints/.1.tmp", ' in x)
    synced = {x.partition("<")[2].partition(">")[0] for x in lines[:renamed] if "sync(" in x}
    step = tmp_path / "checkpoints" / "1"
    for path in [step, *step.rglob("*")]:
        assert str(path).replace("checkpoints/1", "checkpoints/.1.tmp") in synced, path
    assert any(f"<{step.parent}>" in x for x in lines[renamed:] if "sync(" in x)


class Killed(BaseException):
    """Stands for SIGKILL: no code of ours runs after it."""


CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")


def killed_at(monkeypatch, call, after):
    """From the so many-th call that changes the disk on, none is made any more."""
    left = [call]

    def wrapped(real):
        def run(*args, **more):
            left[0] -= 1
            if left[0] < 0 or (left[0] == 0 and not after):
                raise Killed
            found = real(*args, **more)
            if left[0] == 0:
                raise Killed
            return found

        return run

    for name in CALLS:
        monkeypatch.setattr(os, name, wrapped(getattr(os, name)))
    return left


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_call_that_changes_the_disk_no_saved_step_is_lost(folder, monkeypatch, after):
    """A save of step 3 and the removal of step 1, cut off at each of their calls in turn."""
    call = 0
    while True:
        call += 1
        copy = shutil.copytree(folder, folder.parent / f"at{call}" / "checkpoints")
        with monkeypatch.context() as patch:
            checkpoints = Checkpointer(copy)
            left = killed_at(patch, call, after)
            try:
                checkpoints.begin(3, state(3), {"step": 3})
                checkpoints.settle()
            except Killed:
                pass
            ended = left[0] > 0
        saved_then = (copy / "3").exists()
        # The threads of tensorstore outlive this kind of death, and may still write what is removed.
        for _ in range(100):
            found, meta = restored(copy)
            if set(names(copy)) <= {"1", "2", "3"}:
                break
            time.sleep(0.1)
        assert meta["step"] == (3 if saved_then else 2)
        assert np.array_equal(found.params["a"], state(meta["step"]).params["a"])
        assert set(names(copy)) <= {"1", "2", "3"}, call
        if ended:
            break
    assert call > 15
    assert names(copy) == ["2", "3"]
