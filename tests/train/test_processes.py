"""Two processes as one run, under the variables that SLURM sets: one model, one work directory, the
losses of one process; killed, stopped and resumed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from llava_jax.convert import load_checkpoint
from llava_jax.train.cli import load_config
from llava_jax.train.log import METRICS, read_metrics
from llava_jax.train.stages import run_stages
from tests.conftest import xla_flags
from tests.train.run import make_data, make_model, overrides

SETTINGS = {
    "steps": 6,
    "save_every": 2,
    "batch_size": 16,
    "grad_accum": 2,
    "mesh.data": 2,
    "mesh.fsdp": 2,
    "mesh.tensor": 2,
    "unroll_layers": False,
    "data.holdout": 0.2,
    "exact_match": True,
    "loss_average": "micro",  # depends on which rows are in which micro-batch
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    data = make_data(folder / "data", 30)
    return make_model(folder, data), data


@pytest.fixture(scope="module")
def alone(made, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone")
    run_stages(load_config("common", overrides(*made, **SETTINGS)), workdir, quiet=True)
    return workdir


def slurm(count, devices):
    """The environment of each of `count` processes of so many devices, as srun starts them on one host."""
    # The port that jax makes of the job's number must be free.
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    for index in range(count):
        env = {**os.environ, "XLA_FLAGS": xla_flags(devices), "JAX_COORDINATOR_PORT": str(port)}
        # Programs from a warm cache sent gloo messages of other lengths than it waited for.
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
        env |= {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost"}
        env |= {"SLURM_NTASKS": str(count), "SLURM_STEP_NUM_TASKS": str(count)}
        env |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        yield env


def start(made, workdir, count=2, **changes):
    """`count` processes of 8 / count devices each."""
    processes = []
    for env in slurm(count, 8 // count):
        command = [sys.executable, "-m", "llava_jax", "train", "--config", "common", "--quiet"]
        command += ["--workdir", str(workdir), *overrides(*made, **{**SETTINGS, **changes})]
        processes.append(
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    return processes


def end(processes, seconds=300):
    """(exit codes, outputs) of the processes."""
    try:
        outs = [p.communicate(timeout=seconds)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], outs


def losses(workdir):
    return [row["loss"] for row in read_metrics(workdir / METRICS)]


def wait_for_steps(processes, workdir, steps, before=0, seconds=300):
    """Until these processes logged step `steps`; before: the log's inode of an earlier start."""
    path, until = workdir / METRICS, time.time() + seconds
    while time.time() < until and all(p.poll() is None for p in processes):
        anew = path.exists() and path.stat().st_ino != before
        if anew and len(read_metrics(path)) >= steps:
            return
        time.sleep(0.02)
    pytest.fail(str(end(processes, 1)))


def same_run(workdir, alone):
    np.testing.assert_allclose(losses(workdir), losses(alone), rtol=1e-5)
    rows, theirs = (read_metrics(w / METRICS) for w in (workdir, alone))
    # Of the first step, before updates amplify what rounding differs in.
    np.testing.assert_allclose(rows[0]["grad_norm"], theirs[0]["grad_norm"], rtol=1e-5)
    assert [(r["samples"], r["tokens"]) for r in rows] == [
        (r["samples"], r["tokens"]) for r in theirs
    ]
    ours, wanted = (load_checkpoint(w / "export").params for w in (workdir, alone))
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(ours[name], value, atol=2e-4, err_msg=name)


def test_two_processes_are_one_run(made, alone, tmp_path):
    # Each process as a slice: data is then twice what it says, as it is for one process.
    codes, outs = end(start(made, tmp_path, **{"mesh.data": 1, "mesh.slices": 2}))
    assert codes == [0, 0], outs
    same_run(tmp_path, alone)
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {p.name for p in alone.iterdir()}
    for name in ("data_report.json", "exact_match.json", "config.json"):
        ours, theirs = (json.loads((w / name).read_text()) for w in (tmp_path, alone))
        for found in (ours, theirs):  # answers of a model that is hardly trained may differ
            found.pop("wrong", None)
            found.pop("mesh", None)
        assert ours == theirs, name
    # The table before the first step, which names the export too, is every process's.
    last = [line for out in outs for line in out.splitlines() if line.startswith("the model ")]
    assert len(last) == 1


@pytest.mark.slow
def test_killed_and_resumed_by_two_and_then_by_one(made, alone, tmp_path):
    first = start(made, tmp_path)
    wait_for_steps(first, tmp_path, 3)
    for process in first:
        process.send_signal(signal.SIGKILL)
    end(first)
    old = (tmp_path / METRICS).stat().st_ino  # a resumed run writes the file anew
    second = start(made, tmp_path)
    wait_for_steps(second, tmp_path, 3, old)
    second[1].send_signal(signal.SIGTERM)  # one of the two is enough
    codes, outs = end(second)
    stopped = losses(tmp_path)
    if len(stopped) < SETTINGS["steps"]:  # else the signal came too late to stop anything
        assert codes == [75, 75], outs
        assert all("state saved" in out for out in outs)
    run_stages(load_config("common", overrides(*made, **SETTINGS)), tmp_path, quiet=True)
    same_run(tmp_path, alone)
