"""SIGKILLs of a run: of one process, at chosen moments, and of one of two. See bench/survival.py."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from bench.survival_runs import Bench, committed, compared, finished, outcome
from llava_jax.train.log import METRICS, read_metrics

CALLS = ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync")


def die_at(call: int, after: bool) -> Callable[[], None]:
    """Makes this process kill itself before or after its so many-th call that changes a checkpoint."""

    def prepare() -> None:
        left = [call]

        def wrapped(name: str, real: Callable) -> Callable:
            def run(path: Any, *rest: Any, **more: Any) -> Any:
                where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
                folder = more.get("dir_fd")
                where += os.readlink(f"/proc/self/fd/{folder}") if folder is not None else ""
                left[0] -= "checkpoints" in where
                last = left[0] == 0 and "checkpoints" in where
                if last and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                found = real(path, *rest, **more)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return found

            return run

        for name in CALLS:
            setattr(os, name, wrapped(name, getattr(os, name)))

    return prepare


def kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGKILLs of one process: at any moment, while arrays are written, and at single system calls."""
    _import_all()
    rng, aims, lost, differ = random.Random(seed), Counter(), [], []
    runs, resumed = Counter(), 0
    for dtype in ("float32", "bfloat16"):
        bench = Bench(folder, devices=1, dtype=dtype, steps=8, save_every=1)
        whole, warm = folder / f"whole-{dtype}", folder / f"warm-{dtype}"
        finished(os.waitpid(bench.fork(whole, fill=True), 0)[1], whole)
        shutil.rmtree(warm, ignore_errors=True)
        start = time.monotonic()  # of a run that finds its programs compiled
        finished(os.waitpid(bench.fork(warm), 0)[1], warm)
        wanted, length = outcome(whole), time.monotonic() - start
        goal = count // 2 if dtype == "float32" else count
        while sum(aims.values()) < goal:
            workdir = folder / f"run{seed}-{dtype}{runs[dtype]}"
            while True:
                full = sum(aims.values()) >= goal
                aim = None if full else rng.choices(("call", "writing", "any"), (4, 2, 4))[0]
                before = committed(workdir)
                mark = bench.log(workdir).stat().st_size if before else 0
                prepare = die_at(rng.randint(1, 60), rng.random() < 0.5) if aim == "call" else None
                pid = bench.fork(workdir, prepare or (lambda: None))
                if aim == "any":
                    time.sleep(rng.uniform(0.2, 1.0) * length)
                elif aim == "writing":
                    _wait_for_work(pid, workdir, rng)
                if aim in ("any", "writing"):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                status = os.waitpid(pid, 0)[1]
                said = bench.log(workdir).read_text()[mark:] if before else ""
                if found := re.search(r"resumed at step (\d+)", said):
                    resumed += 1
                    if int(found[1]) != before:
                        lost.append((workdir.name, before, int(found[1])))
                if status == 0:
                    break
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                    aims[aim] += 1
                else:
                    differ.append((workdir.name, f"exit {os.waitstatus_to_exitcode(status)}"))
                    break
            runs[dtype] += 1
            differ += [(workdir.name, name) for name in compared(outcome(workdir), wanted)]
            if not differ:
                shutil.rmtree(workdir)
            print(f"{dtype}: {dict(aims)} kills, {runs[dtype]} runs, differ {differ}", flush=True)
    return {
        "kills": dict(aims),
        "runs": dict(runs),
        "resumes": resumed,
        "committed steps lost": lost,
        "differences": differ,
        "ok": not lost and not differ,
    }


def _import_all() -> None:
    """Imports what runs use before they are forked, so that each begins sooner."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import llava_jax.train.evaluate
    import llava_jax.train.heldout
    import llava_jax.train.lock
    import llava_jax.train.loop
    import llava_jax.train.stages  # noqa: F401


def _wait_for_work(pid: int, workdir: Path, rng: random.Random) -> None:
    """Until this process writes a checkpoint (one of its saves, by chance), and a moment more."""
    for _ in range(rng.randint(1, 3)):
        seen = {p.name for p in workdir.glob("checkpoints/.*.tmp")}
        while not {p.name for p in workdir.glob("checkpoints/.*.tmp")} - seen:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return
            time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.04))


def peer_kills(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGKILLs of one of two processes under --supervise, which starts both again."""
    rng, bench = random.Random(seed), Bench(folder, devices=1, steps=8)
    both = ["--supervise", "--processes", "2", "--max-failures", "1000"]
    whole = folder / "whole"
    finished(bench.start(whole, *both, cache=False).wait(), whole)
    wanted, done, runs, differ = outcome(whole), 0, 0, []
    while done < count:
        workdir = folder / f"pair{seed}-{runs}"
        supervisor = bench.start(workdir, *both, cache=False)
        while supervisor.poll() is None:
            if done < count and _kill_one(supervisor, workdir, rng):
                done += 1
                print(f"{done} kills of one of two", flush=True)
            time.sleep(0.05)
        runs += 1
        if supervisor.returncode:
            differ.append((workdir.name, f"exit {supervisor.returncode}"))
            break
        differ += [(workdir.name, name) for name in compared(outcome(workdir), wanted)]
        if not differ:
            shutil.rmtree(workdir)
    return {"kills": done, "runs": runs, "differences": differ, "ok": done >= count and not differ}


def _kill_one(supervisor: subprocess.Popen, workdir: Path, rng: random.Random) -> bool:
    """Kills a child that trains, at a moment of its life; whether it did."""
    before = read_metrics(workdir / METRICS)
    children = psutil.Process(supervisor.pid).children()
    path = workdir / METRICS
    stamp = path.stat().st_ino if path.exists() else 0
    until = rng.randint(0, 3)  # steps into its life
    while supervisor.poll() is None:
        now = read_metrics(path) if path.exists() else []
        anew = path.exists() and path.stat().st_ino != stamp
        if anew and len(now) >= min(len(before) + until, 7):
            break
        time.sleep(0.02)
    time.sleep(rng.uniform(0, 0.3))
    children = (
        [c for c in psutil.Process(supervisor.pid).children()] if supervisor.poll() is None else []
    )
    if len(children) < 2:
        return False
    with contextlib.suppress(psutil.NoSuchProcess):
        rng.choice(children).kill()
        return True
    return False
