"""What the benchmarks share: systems in processes of their own that take turns, a table, and its JSON.

A benchmark names its systems as "module:Class". Each is made in a process of its own, so that memory
and threads are its own, and the parent asks them in turns (A B A B ...) to run the same thing. On a CPU
every process is pinned to the same core and its processor seconds count; wall time counts elsewhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "orbax-checkpoint")
ON_CPU = not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0"))


def parser(doc: str | None, epilog: str = "", **defaults: Any) -> argparse.ArgumentParser:
    """A benchmark's command line with what all of them take."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0], epilog=epilog)
    made.add_argument("--repeats", type=int, default=7, help="timed turns of each system")
    made.add_argument(
        "--threads", type=int, default=int(ON_CPU), help="pins to so many cores; 0: all"
    )
    made.add_argument("--out", type=Path, help="a JSON file of the results")
    made.set_defaults(**defaults)
    return made


def installed(*names: str) -> bool:
    """Whether these packages are here."""
    try:
        return all(version(name) for name in names)
    except PackageNotFoundError:
        return False


# The parent -------------------------------------------------------------------------------------


class Systems:
    """Systems that take turns. `kinds`: {name: "module:Class"}; each is made with `args`."""

    def __init__(self, kinds: dict[str, str], args: argparse.Namespace):
        self.environment = pin(args.threads)
        options = {k: v for k, v in vars(args).items() if k != "out"}
        self.workers: dict[str, Any] = {}
        for name, kind in kinds.items():
            words = [sys.executable, "-m", "bench.frame", kind, json.dumps(options, default=str)]
            self.workers[name] = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                env=self.environment,
            )  # fmt: skip

    def __enter__(self) -> Systems:
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self.workers.values():
            with contextlib.suppress(BrokenPipeError):  # of one that has ended
                worker.stdin.close()
            worker.wait()

    def ask(self, name: str, method: str, *args: Any) -> dict[str, Any]:
        """What a system's method gives, with the seconds it took: {"gave", "cpu_seconds", "seconds"}."""
        worker = self.workers[name]
        try:
            worker.stdin.write(json.dumps([method, args]) + "\n")
            worker.stdin.flush()
        except BrokenPipeError:
            pass
        answer = worker.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} ended during {method!r}")
        return json.loads(answer)

    def each(self, method: str, *args: Any) -> dict[str, Any]:
        """{system: what its method gives}."""
        return {name: self.ask(name, method, *args)["gave"] for name in self.workers}

    def take_turns(self, repeats: int, method: str, *args: Any) -> dict[str, dict[str, Any]]:
        """{system: {"cpu_seconds": spread, "seconds": spread}} of so many turns each."""
        turns = [{n: self.ask(n, method, *args) for n in self.workers} for _ in range(repeats)]
        return {
            name: {
                kind: spread([t[name][kind] for t in turns]) for kind in ("cpu_seconds", "seconds")
            }
            for name in self.workers
        }


def pin(threads: int) -> dict[str, str]:
    """Pins this process, and what it starts, to so many cores; the environment of what it starts."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    if threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            environment[name] = str(threads)
        environment["OMP_WAIT_POLICY"] = "passive"  # spinning threads would count as work
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    if threads == 1:  # read when jax starts
        flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    return environment


def spread(values: list[float]) -> dict[str, Any]:
    """The least, the median and all of some values."""
    return {"min": min(values), "median": statistics.median(values), "all": values}


def clock(rows: dict[str, Any]) -> dict[str, Any]:
    """Of what take_turns gives for a system: the seconds that count on this machine."""
    return rows["cpu_seconds" if ON_CPU else "seconds"]


# The table and the file ---------------------------------------------------------------------------


def show(head: list[str], rows: list[list[Any]]) -> None:
    """Prints a table in Markdown."""
    words = [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows]
    for line in [head, ["---"] * len(head), *words]:
        print("| " + " | ".join(line) + " |", flush=True)


def compared(what: str, found: dict[str, dict[str, Any]], scale: float = 1) -> list[list[Any]]:
    """Rows of a table: what, system, least, median, and how many times as long the first system's."""
    first = clock(next(iter(found.values())))
    rows = []
    for name, times in found.items():
        t = clock(times)
        ratios = [f"{t[k] / first[k]:.2f}" for k in ("min", "median")]
        rows.append([what, name, t["min"] * scale, t["median"] * scale, *ratios])
    return rows


COMPARED = ["what", "system", "least", "median", "of the first's least", "of its median"]


def record(name: str, args: argparse.Namespace, **found: Any) -> dict[str, Any]:
    """What `--out` holds: the result with machine, versions, settings, commit, date and load; writes it."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = ""
    result = {
        "benchmark": name,
        "settings": {k: v for k, v in vars(args).items() if k != "out" and not callable(v)},
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, {platform.system()}",
        "load": round(os.getloadavg()[0], 1),
        "clock": "processor seconds" if ON_CPU else "wall seconds",
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in PACKAGES if installed(name)},
        **found,
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1, default=str) + "\n", encoding="utf-8")
    return result


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = [x for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    return names[0].partition(": ")[2] if names else platform.processor() or platform.machine()


def peak_memory() -> float:
    """GB resident at most in this process so far, in files it maps too.

    Linux's own count (VmHWM): getrusage's begins with what the parent had.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


# A worker -----------------------------------------------------------------------------------------


def work(kind: str, options: str) -> None:
    """Makes a system and answers [method, arguments] with a line of JSON each, until stdin ends."""
    answers, sys.stdout = sys.stdout, sys.stderr
    module, _, name = kind.partition(":")
    system = getattr(importlib.import_module(module), name)(
        argparse.Namespace(**json.loads(options))
    )
    for line in sys.stdin:
        method, args = json.loads(line)
        cpu, wall = time.process_time(), time.perf_counter()
        gave = getattr(system, method)(*args)
        times = {"cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
        print(json.dumps({"gave": gave, **times}), file=answers, flush=True)


if __name__ == "__main__":
    work(*sys.argv[1:])
