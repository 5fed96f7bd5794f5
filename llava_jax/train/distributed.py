"""Several processes as one run: joining them, and what they must agree on.

`initialize` joins the processes that a scheduler started. The other functions work with one process
as with many, and all processes must call them in the same order.
"""

from __future__ import annotations

import contextlib
import glob
import importlib.util
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import jax
import numpy as np

from llava_jax.chips import visible_gpus
from llava_jax.errors import ConfigError, LlavaError

log = logging.getLogger(__name__)

T = TypeVar("T")
JOIN_SECONDS = 300
"""How long a process waits for the others at the start."""
LOST = 69
"""Exit code of a process whose run lost another one: EX_UNAVAILABLE of sysexits.h."""
# What jax raises then, over Gloo, NCCL and the coordination service.
_LOST = re.compile(
    r"gloo|nccl|heartbeat|connection (reset|closed)|socket closed|unavailable|coordination service"
    r"|preempted",
    re.IGNORECASE,
)

OURS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# Launchers, with the variables for the number of processes and the index of this one.
LAUNCHERS = {
    "Open MPI": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "MPI": ("PMI_SIZE", "PMI_RANK"),
    "torchrun": ("WORLD_SIZE", "RANK"),
}
_CHIPS = ("/dev/accel*", "/dev/vfio/[0-9]*")


@dataclass(frozen=True)
class Job:
    """What the environment says about the processes of this run.

    by: what started them. count: how many there are; None where only jax can find out.
    arguments: of jax.distributed.initialize, which detects the others itself.
    """

    by: str
    count: int | None
    arguments: dict[str, Any] = field(default_factory=dict)


def find_job(env: Mapping[str, str] = os.environ) -> Job | None:
    """The job of several processes that this one belongs to, by environment variables; or None.

    Raises ConfigError for variables that contradict each other, and for processes that jax has no
    way to join. The variables of each scheduler are those of jax._src.clusters.
    """
    given = [name for name in OURS if env.get(name)]
    job = None
    if given in ([], ["JAX_COORDINATOR_ADDRESS"]):
        job = _slurm(env) or _tpu(env) or _launcher(env) or _kubernetes(env)
    elif env.get("JAX_NUM_PROCESSES") == "1":
        return None
    elif len(given) == len(OURS):
        job = _addressed(OURS[1], env, *OURS[1:])
    if given and job is None:
        missing = " and ".join(name for name in OURS if name not in given)
        raise ConfigError(
            f"{' and '.join(given)} set without {missing}", fix="set all three, or none"
        )
    return job if job is None or job.count != 1 else None


def initialize(*, timeout: int = JOIN_SECONDS) -> None:
    """Joins the processes that the environment names.

    Call it before anything touches a device. Does nothing if the processes are joined already or
    there is only one. Raises ConfigError where they cannot be joined. If the others do not appear
    within `timeout` seconds, the process says so and exits with code 2.
    """
    joined = jax.distributed.is_initialized()
    job = None if joined else find_job()
    if job is None:
        if joined:
            _leave_cpu_cache()
        return
    # Affects only the CPU, whose default has no collectives between processes.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        with _deadline(job, timeout):
            jax.distributed.initialize(
                **job.arguments, initialization_timeout=timeout + 60, shutdown_timeout_seconds=60
            )
    except ValueError as error:
        if job.count is None:
            log.debug("jax finds no cluster: %s", error)
            return
        raise _not_joined(job, str(error)) from error
    except RuntimeError as error:
        raise _not_joined(job, str(error)) from error
    _leave_cpu_cache()
    log.info("process %d of %d (%s)", jax.process_index() + 1, jax.process_count(), job.by)


def _leave_cpu_cache() -> None:
    """Turns jax's compilation cache off for several processes on CPU.

    Only process 0 writes it. With a warm one gloo has aborted over messages of other lengths than it
    waited for, not in every run.
    """
    if cast(Any, jax.config).jax_compilation_cache_dir and jax.default_backend() == "cpu":
        jax.config.update("jax_enable_compilation_cache", False)
        if is_main():
            log.info("the compilation cache is off: programs from it fail in several CPU processes")


@contextlib.contextmanager
def leaving_lost_run() -> Iterator[None]:
    """Within it, a process whose run lost another one says so and exits with code LOST.

    At once: at Python's own exit jax would wait for the lost one, and abort. Where jax hears of it
    before us, it aborts by itself, with code 134.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        if jax.process_count() == 1 or not _LOST.search(said):
            raise
        print(
            f"llava-jax train: another process of this run ended: {said[:200]} "
            "(its own log says why; the same command goes on from the last checkpoint)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST)


def check_joined() -> None:
    """Raises ConfigError if several processes were started for one run and are not joined.

    Each would train the whole run by itself, and report success.
    """
    if jax.process_count() > 1:
        return
    job = find_job()
    if job and job.count:
        raise ConfigError(
            f"{job.by} started {job.count} processes, but they are not joined into one run",
            fix="call llava_jax.train.distributed.initialize() before anything uses jax, or set "
            "JAX_NUM_PROCESSES=1 for runs of their own",
        )


@contextlib.contextmanager
def _deadline(job: Job, timeout: int) -> Iterator[None]:
    """Ends the process with one line after `timeout` seconds in the context.

    An exception would not do: jax waits in C++, and aborts with a stack trace at its own timeout.
    """

    def end() -> None:
        error = _not_joined(job, f"waited {timeout} s for the others")
        print(f"llava-jax: {error}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _addressed(by: str, env: Mapping[str, str], size: str, rank: str) -> Job:
    """A job that jax does not detect: its address, number of processes and index are variables."""
    count, index, address = _number(env, size), _number(env, rank), env.get(OURS[0])
    if not address:
        raise ConfigError(
            f"{by} started {count} processes, but JAX_COORDINATOR_ADDRESS is not set",
            fix="set it to HOST:PORT of the first, for all of them, or JAX_NUM_PROCESSES=1 for "
            "runs of their own",
        )
    if not re.search(r":\d+$", address):
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS {address!r} has no port", fix="HOST:PORT of process 0"
        )
    if not 0 <= index < count:
        raise ConfigError(f"{rank} is {index}, not below {size} {count}")
    arguments = {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
    return Job(by, count, arguments)


def _slurm(env: Mapping[str, str]) -> Job | None:
    """A step that srun started; the shell of salloc and a batch script are not one."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in env for name in needed) or "SLURM_NTASKS" not in env:
        return None
    step = "SLURM_STEP_NUM_TASKS"
    count = _number(env, step if step in env else "SLURM_NTASKS")
    alone = re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return Job("SLURM", count, {"num_processes": count, **_all_gpus(bool(alone), env)})


def _all_gpus(one_task_per_host: bool, env: Mapping[str, str]) -> dict[str, Any]:
    """Every GPU of the host for its only process; by default jax gives each process one."""
    if not one_task_per_host or env.get("JAX_LOCAL_DEVICE_IDS"):
        return {}
    count = visible_gpus(env)
    return {"local_device_ids": list(range(count))} if count > 1 else {}


def _launcher(env: Mapping[str, str]) -> Job | None:
    for by, (size, rank) in LAUNCHERS.items():
        if not (env.get(size) and env.get(rank)) or _number(env, size) == 1:
            continue
        if "OMPI_MCA_orte_hnp_uri" in env and by == "Open MPI":
            alone = env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
            return Job(by, _number(env, size), _all_gpus(alone, env))
        return _addressed(by, env, size, rank)
    return None


def _tpu(env: Mapping[str, str]) -> Job | None:
    """A TPU slice of several hosts: GKE names them; on Compute Engine jax asks for them."""
    platforms = env.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts and env.get("TPU_WORKER_ID") is not None:
        slices = _number(env, "MEGASCALE_NUM_SLICES") if env.get("MEGASCALE_NUM_SLICES") else 1
        return Job("GKE", len(hosts.split(",")) * slices)
    chips = any(map(glob.glob, _CHIPS)) and importlib.util.find_spec("libtpu")
    return Job("Cloud TPU", None) if chips and "TPU_SKIP_MDS_QUERY" not in env else None


def _kubernetes(env: Mapping[str, str]) -> Job | None:
    """An indexed Job; jax asks Kubernetes for its size, with the package `kubernetes`."""
    indexed = "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env
    known = indexed and importlib.util.find_spec("kubernetes")
    return Job("Kubernetes", None) if known else None


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name} is {env[name]!r}, not a number") from None


def _not_joined(job: Job, reason: str) -> ConfigError:
    count = f"{job.count} processes" if job.count else "the processes"
    return ConfigError(
        f"{count} ({job.by}) did not join: {' '.join(reason.split())[:200]}",
        fix="check the logs of the others, and that they reach the host and port of the first",
    )


# What all processes must agree on ------------------------------------------------------------------


def is_main() -> bool:
    """Whether this process writes the files of the run."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The JSON-ready `value` of every process, in order."""
    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def together(work: Callable[[], T]) -> T:
    """work(), by every process; an error in one is an error in all, so that none waits for ever.

    Raises the process's own error if it has one, else LlavaError with another process's message.
    """
    if jax.process_count() == 1:
        return work()
    result: Any = None
    own: Exception | None = None
    try:
        result = work()
    except Exception as error:
        own = error
    errors = gather(None if own is None else f"{own}" or type(own).__name__)
    if own is not None:
        raise own
    for process, message in enumerate(errors):
        if message is not None:
            raise LlavaError(f"process {process}: {message}")
    return result


def check_alike(values: Mapping[str, Any]) -> None:
    """Raises ConfigError, in every process, where the JSON-ready `values` of the processes differ."""
    first, *others = gather(dict(values))
    for process, theirs in enumerate(others, 1):
        differing = sorted(n for n in first.keys() | theirs.keys() if first.get(n) != theirs.get(n))
        if differing:
            name = differing[0]
            more = f", and {len(differing) - 1} more differ" if len(differing) > 1 else ""
            raise ConfigError(
                f"{name} is {first.get(name)!r} in process 0 and {theirs.get(name)!r} in process "
                f"{process}{more}",
                fix="start all processes of a run with the same settings and data",
            )


def on_main(work: Callable[[], Any]) -> None:
    """work() in the main process alone; the others wait for it, and fail if it fails."""
    together(work if is_main() else lambda: None)
