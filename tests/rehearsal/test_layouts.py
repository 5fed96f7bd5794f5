"""One recipe, many layouts: devices, processes, grouping, packing and accumulation change no loss.

The mixture in small, two steps of finetune_7b from a Hugging Face folder; float32 losses agree to
1e-5, those in the recipe's own bfloat16 to 1e-3.
"""

import math
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.rehearsal.command import finish, losses, metrics, ok, start, train_words

STEPS, BATCH = 2, 16
LAYOUTS = {
    "fsdp": {},  # the recipe's own
    "data": {"mesh.data": 8, "mesh.fsdp": 1},
    "tensor": {"mesh.fsdp": 4, "mesh.tensor": 2},
}
FEEDS = {
    "shuffled": {"data.group_by_modality": False},
    "packed": {"data.pack": "exact"},
    "packed, shuffled": {"data.pack": "exact", "data.group_by_modality": False},
    "accumulated": {"grad_accum": 2},
    "packed, accumulated": {"data.pack": "exact", "grad_accum": 2},
}


def _settings(mix, model, **changes) -> dict:
    return {
        "model.init": model("hugging_face"),
        "batch_size": BATCH,
        "steps": STEPS,
        **mix.settings("instruct"),
        **changes,
    }


@pytest.fixture(scope="module")
def trained(mix, model, tmp_path_factory):
    """trained(devices, **changes): the losses of a run, each made once."""
    folder, done = tmp_path_factory.mktemp("layouts"), {}

    def get(devices: int = 1, **changes) -> list[float]:
        key = (devices, *sorted(changes.items()))
        if key not in done:
            workdir = folder / str(len(done))
            words = train_words("finetune_7b", workdir, _settings(mix, model, **changes))
            ok(*words, devices=devices)
            done[key] = losses(workdir)
            assert len(done[key]) == STEPS
            assert all(map(math.isfinite, done[key]))
        return done[key]

    return get


@pytest.mark.slow  # quick, gradients included: tests/train/test_layouts.py
@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_are_equal_on_eight_devices(layout, trained):
    one = trained(dtype="float32")
    eight = trained(8, dtype="float32", **LAYOUTS[layout])
    np.testing.assert_allclose(eight, one, rtol=1e-5)


@pytest.mark.slow
def test_losses_are_equal_in_the_recipes_own_bfloat16(trained):
    np.testing.assert_allclose(trained(8), trained(), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_losses_are_equal_in_bfloat16_on_every_mesh(layout, trained):
    np.testing.assert_allclose(trained(8, **LAYOUTS[layout]), trained(), rtol=1e-3)


# Quick of the accumulated: tests/train/test_compiled.py, gradients included.
@pytest.mark.parametrize("feed", ["packed", pytest.param("accumulated", marks=pytest.mark.slow)])
def test_the_same_samples_give_the_same_loss(feed, trained):
    """Packing and accumulation change rows, not samples: the token mean stays."""
    np.testing.assert_allclose(
        trained(dtype="float32", **FEEDS[feed]), trained(dtype="float32"), rtol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("feed", FEEDS)
def test_every_feed_is_equal_on_eight_devices(feed, trained):
    changes = FEEDS[feed] | {"dtype": "float32"}
    changes |= {"batch_size": 64} if "pack" in feed else {}  # an eighth of it is a row a device
    np.testing.assert_allclose(trained(8, **changes), trained(**changes), rtol=1e-5)


# Two processes ------------------------------------------------------------------------------------


def _slurm(job: int, index: int, count: int = 2) -> dict[str, str]:
    """What srun sets for one task of a step on one host; the job's number gives the port."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_TASKS_PER_NODE": str(count),
    }


def _free_job() -> int:
    """A job number whose port (jax's rule: 61440 + number modulo 4096) is free."""
    for job in np.random.default_rng().integers(0, 4096, 50):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 61440 + int(job))):
                return int(job)
    raise AssertionError("no free port")


def _as_two_processes(words: list[str], **options) -> list[str]:
    job = _free_job()
    both = [start(*words, **_slurm(job, i), **options) for i in range(2)]
    told = []
    for process in both:
        done = finish(process)
        assert done.code == 0, f"exit code {done.code}\n{done.out}\n{done.err}"
        told.append(done.out + done.err)
    return told


@pytest.mark.slow  # on other data: tests/train/test_processes.py::test_two_processes_are_one_run
def test_two_processes_train_one_model(mix, model, trained, tmp_path):
    words = train_words("finetune_7b", tmp_path, _settings(mix, model, dtype="float32"))
    told = _as_two_processes(words)
    np.testing.assert_allclose(losses(tmp_path), trained(dtype="float32"), rtol=1e-5)
    assert [row["step"] for row in metrics(tmp_path)] == [1, 2], "one process logs"
    assert (tmp_path / "export" / "llava_jax.json").is_file()
    assert (tmp_path / "data_report.json").is_file()
    assert all("2 cpu device" in text for text in told), told


@pytest.mark.slow  # in one process: test_the_same_samples_give_the_same_loss[packed]
def test_two_processes_train_packed_rows_as_one_does(mix, model, trained, tmp_path):
    """Full rows of no other samples than one process has, whose losses are those of one device."""
    changes = {
        "dtype": "float32",
        "data.pack": "fill",
        "data.group_by_modality": False,
        "data.pack_rows": 2,
    }
    _as_two_processes(train_words("finetune_7b", tmp_path, _settings(mix, model, **changes)))
    np.testing.assert_allclose(losses(tmp_path), trained(**changes), rtol=1e-5)
    assert all(row["real"] > 0.5 for row in metrics(tmp_path))


@pytest.mark.slow
def test_two_processes_of_four_devices_account_for_every_record(mix, model, tmp_path):
    from tests.rehearsal.test_recipes import check

    one, two = tmp_path / "one", tmp_path / "two"
    settings = _settings(mix, model, dtype="float32", steps=0)
    ok(*train_words("finetune_7b", one, settings))
    _as_two_processes(train_words("finetune_7b", two, settings), devices=4)
    check(two, mix.manifest["instruct"])
    check(one, mix.manifest["instruct"])
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)


@pytest.mark.slow  # without a run: tests/train/test_lock.py
def test_two_launches_into_one_workdir_are_refused(mix, model, tmp_path: Path):
    """The second is told of the first, and the first goes on unharmed."""
    from tests.rehearsal.command import refused, run

    words = train_words("finetune_7b", tmp_path, _settings(mix, model, steps=3))
    first = start(*words)
    while not (tmp_path / "config.json").exists() and first.poll() is None:
        pass
    refused(run(*words), str(tmp_path))
    assert finish(first).code == 0
    assert len(losses(tmp_path)) == 3
