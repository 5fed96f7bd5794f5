"""Which run of several processes the environment means, and what one process does with it."""

import os
import subprocess
import sys
from contextlib import nullcontext

import jax
import pytest

from llava_jax.errors import ConfigError
from llava_jax.train import distributed
from llava_jax.train.distributed import (
    check_alike,
    check_joined,
    find_job,
    gather,
    initialize,
    on_main,
    together,
)

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}


def without(env, *names):
    return {k: v for k, v in env.items() if k not in names}


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # the shell of salloc
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},  # an interactive step
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        without({**STEP, "SLURM_NTASKS": "1"}, "SLURM_STEP_NUM_TASKS"),
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "8"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0", "JAX_PLATFORMS": "cpu"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
        {"JAX_NUM_PROCESSES": "1", **STEP},  # runs of their own, on purpose
    ],
)
def test_one_process(env):
    assert find_job(env) is None


@pytest.mark.parametrize(
    ("env", "by", "count"),
    [
        (STEP, "SLURM", 2),
        (without(STEP, "SLURM_STEP_NUM_TASKS"), "SLURM", 2),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp://10.0.0.1:34911",
            },
            "Open MPI",
            4,
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}, "GKE", 4),
        (
            {"TPU_PROCESS_ADDRESSES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"},
            "GKE",
            4,
        ),
    ],
)
def test_schedulers_that_jax_knows(env, by, count):
    job = find_job(env)
    assert job
    assert (job.by, job.count) == (by, count)
    assert "coordinator_address" not in job.arguments


@pytest.mark.parametrize(
    "env",
    [
        {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"},
        {"WORLD_SIZE": "4", "RANK": "2"},
        {"PMI_SIZE": "4", "PMI_RANK": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"},  # Open MPI 5 has no hnp_uri
    ],
)
def test_launchers_that_need_an_address(env):
    with pytest.raises(ConfigError, match="JAX_COORDINATOR_ADDRESS") as info:
        find_job(env)
    assert info.value.fix
    job = find_job({**env, "JAX_COORDINATOR_ADDRESS": "node1:1234"})
    assert job
    assert job.arguments == {
        "coordinator_address": "node1:1234",
        "num_processes": 4,
        "process_id": 2,
        "cluster_detection_method": "deactivate",
    }


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "node1:1"},
            "set without JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"},
            "set without JAX_PROCESS_ID",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            "no port",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            "not below",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"},
            "not a number",
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0", "MEGASCALE_NUM_SLICES": "two"},
            "MEGASCALE_NUM_SLICES is 'two', not a number",
        ),
    ],
)
def test_variables_that_contradict_each_other(env, says):
    with pytest.raises(ConfigError, match=says):
        find_job(env)


def test_the_only_process_of_a_host_takes_all_its_gpus():
    """jax gives a process of SLURM or Open MPI one GPU, by its place on the host."""
    env = {**STEP, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}

    def arguments(env):
        job = find_job(env)
        assert job
        return job.arguments

    assert "local_device_ids" not in arguments(env)
    alone = {**env, "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert arguments(alone)["local_device_ids"] == [0, 1, 2, 3]
    assert "local_device_ids" not in arguments({**alone, "JAX_LOCAL_DEVICE_IDS": "1"})
    four = {**env, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
    assert "local_device_ids" not in arguments(four)


def test_processes_that_were_not_joined_do_not_train_beside_each_other(monkeypatch):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="SLURM started 2 processes") as info:
        check_joined()
    assert "initialize()" in str(info.value)


def test_processes_with_other_settings_are_named(monkeypatch):
    said = [
        {"lr": 1e-3, "epochs": 1},
        {"lr": 1e-3, "epochs": 1},
        {"lr": 1e-4, "epochs": 1, "steps": 2},
    ]
    monkeypatch.setattr(distributed, "gather", lambda own: [own, *said[1:2]])
    check_alike(said[0])
    monkeypatch.setattr(distributed, "gather", lambda own: [own, *said[1:]])
    says = r"lr is 0\.001 in process 0 and 0\.0001 in process 2, and 1 more differ"
    with pytest.raises(ConfigError, match=says):
        check_alike(said[0])


def test_one_process_agrees_with_itself(monkeypatch):
    monkeypatch.setattr(distributed, "find_job", lambda: None)
    initialize()
    assert jax.process_count() == 1
    assert gather({"a": [1]}) == [{"a": [1]}]
    done = []
    on_main(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ConfigError, match="mine"):
        together(lambda: (_ for _ in ()).throw(ConfigError("mine")))


@pytest.mark.parametrize("index", [0, 1])
def test_when_the_others_do_not_come_one_line_says_so(index):
    code = "from llava_jax.train.distributed import initialize; initialize(timeout=3)"
    env = {
        **os.environ,
        "JAX_COORDINATOR_ADDRESS": "localhost:29341",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("llava-jax:")]
    assert "2 processes (JAX_NUM_PROCESSES) did not join: waited 3 s" in line


@pytest.mark.parametrize(
    ("said", "count", "code"),
    [
        ("UNKNOWN: Gloo all-reduce failed: Connection reset by peer", 2, distributed.LOST),
        ("INTERNAL: NCCL operation failed: remote process exited", 2, distributed.LOST),
        ("INTERNAL: Gloo", 1, None),  # alone: nobody was lost
        ("RESOURCE_EXHAUSTED: out of memory", 2, None),
    ],
)
def test_a_process_whose_run_lost_another_says_so_and_leaves(
    said, count, code, monkeypatch, capsys
):
    left = []
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(os, "_exit", left.append)
    expected = pytest.raises(jax.errors.JaxRuntimeError) if code is None else nullcontext()
    with expected, distributed.leaving_lost_run():
        raise jax.errors.JaxRuntimeError(said)
    assert left == ([code] if code else [])
    assert ("another process of this run ended" in capsys.readouterr().err) == bool(code)
