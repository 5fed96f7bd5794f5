"""What a training run survives: it is killed, damaged, starved of disk and stopped, and compared with one that was not.

    python -m bench.survival kills --count 100 --out bench/results/survival_kills.json

Each of WHAT trains a tiny model on the CPU, with the command line that users type, and exits with 1 where
a promise of docs/reliability.md does not hold. `--folder` is for the runs; it is emptied at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from bench.survival_kills import kills, peer_kills
from bench.survival_runs import Bench, committed, compared, finished, outcome
from llava_jax.train.log import METRICS, read_metrics

# The disk ------------------------------------------------------------------------------------------


def damages(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """Random damages to any file of the newest checkpoint: each is found, and the step before serves."""
    import numpy as np

    from llava_jax import digests
    from llava_jax.train.verify import written
    from tests.train.test_checkpoint import HOW, damage, files, restored, saved, state

    saved(folder / "run" / "checkpoints", 1, 2)
    rng, hows, silent, unverified, wrong = np.random.default_rng(seed), Counter(), [], [], []
    like = state(0)
    wanted = np.asarray(state(1).params["a"])
    for n in range(count):
        copy = Path(shutil.copytree(folder / "run", folder / "copy")) / "checkpoints"
        path = rng.choice(files(copy / "2"))
        how = str(rng.choice(HOW))
        damage(path, how, rng)
        hows[how] += 1
        if not any(digests.damages(step) for step in written(copy)):
            unverified.append((n, how, path.name))
        found, meta = restored(copy, like)
        if meta["step"] != 1:
            silent.append((n, how, path.name))
        elif not np.array_equal(found.params["a"], wanted):
            wrong.append(n)
        shutil.rmtree(folder / "copy")
    return {
        "damages": dict(hows),
        "silent": silent,
        "not found by verify": unverified,
        "step before differs": wrong,
        "ok": not (silent or unverified or wrong),
    }


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes (tmpfs), which only root can mount."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A disk that is full from a random step on, and has room again later; and one that stays full."""
    rng, bench, differ, said = random.Random(seed), Bench(folder, steps=60), [], 0
    whole = folder / "whole"
    finished(bench.start(whole).wait(), whole)
    wanted = outcome(whole)
    for n in range(count):
        with small_disk(folder / f"disk{n}", 400 * 2**20) as disk:
            workdir, stays = disk / "run", n % 5 == 4
            process = bench.start(workdir)
            at = rng.randint(0, 40)
            _steps(process, workdir, at)
            _fill(disk / "filler", rng.choice((0, 4096, 100_000, 1_000_000)))
            log = workdir.with_suffix(".log")
            # Not on the full disk: what the run says must be seen.
            if not stays:
                time.sleep(rng.uniform(0.1, 1.5))
                (disk / "filler").unlink()
            code = process.wait()
            text = log.read_text()
            said += "no space left on device" in text
            if stays:
                (disk / "filler").unlink()
                if code != 74 and not (code == 0 and compared(outcome(workdir), wanted) == []):
                    differ.append((n, f"full to the end, exit {code}"))
                code = bench.start(workdir).wait()
            if code:
                differ.append((n, f"exit {code}: {log.read_text()[-300:]}"))
            else:
                differ += [(n, name) for name in compared(outcome(workdir), wanted)]
        print(
            f"disk {n}: full from step {at}, {'to the end' if stays else 'for a while'}, {differ}",
            flush=True,
        )
    return {"full disks": count, "that a save met": said, "differences": differ, "ok": not differ}


def _steps(process: subprocess.Popen, workdir: Path, steps: int) -> None:
    while process.poll() is None and len(read_metrics(workdir / METRICS)) < steps:
        time.sleep(0.01)


def _fill(path: Path, leave: int) -> None:
    free = shutil.disk_usage(path.parent).free - leave
    with contextlib.suppress(OSError), open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, free // 4096 * 4096))


# Signals, time -------------------------------------------------------------------------------------


def stops(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGTERM at any step, to one process and to one of two: code 75 within 10 s, and the same run after."""
    rng, seconds, differ = random.Random(seed), {1: [], 2: []}, []
    for processes in (1, 2):
        bench = Bench(folder / f"of{processes}", devices=1, steps=400, save_every=1000)
        more = ["--supervise", "--processes", "2"] if processes == 2 else []
        whole = bench.folder / "whole"
        finished(bench.start(whole, *more, cache=processes == 1).wait(), whole)
        wanted, workdir = outcome(whole), bench.folder / "run"
        while len(seconds[processes]) < count:
            before = len(read_metrics(workdir / METRICS))
            stamp = (workdir / METRICS).stat().st_ino if before else 0
            process = bench.start(workdir, *more, cache=processes == 1)
            goal = min(before + rng.randint(1, 20), 398)
            while process.poll() is None and (
                not (workdir / METRICS).exists()
                or (workdir / METRICS).stat().st_ino == stamp
                or len(read_metrics(workdir / METRICS)) < goal
            ):
                time.sleep(0.005)
            target = process
            if processes == 2:  # one of the two is told
                target = rng.choice(psutil.Process(process.pid).children())
            target.send_signal(signal.SIGTERM)
            start = time.monotonic()
            code = process.wait()
            if code == 0:
                differ += [(processes, name) for name in compared(outcome(workdir), wanted)]
                shutil.rmtree(workdir)
                continue
            seconds[processes].append(round(time.monotonic() - start, 2))
            logged = len(read_metrics(workdir / METRICS))
            if code != 75 or committed(workdir) != logged:
                differ.append((processes, code, logged, committed(workdir)))
            print(processes, seconds[processes][-1], differ, flush=True)
        if workdir.exists() and bench.start(workdir, *more, cache=processes == 1).wait() == 0:
            differ += [(processes, name) for name in compared(outcome(workdir), wanted)]
    slowest = {f"{n} processes": max(found) for n, found in seconds.items()}
    late = [s for found in seconds.values() for s in found if s > 10]
    return {
        "stops": {n: len(s) for n, s in seconds.items()},
        "slowest, s": slowest,
        "differences": differ,
        "ok": not late and not differ,
    }


def topology(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A run on 8 devices, resumed on 4, on 1 and on 8: the batches and losses of one on 8 throughout."""
    constant = {"warmup_ratio": 0.0, "lr_end_ratio": 1.0, "save_every": 1000}
    whole = folder / "whole"
    finished(Bench(folder, 8, **constant, steps=12).start(whole).wait(), whole)
    workdir = folder / "run"
    for steps, devices in ((3, 8), (6, 4), (9, 1), (12, 8)):
        finished(Bench(folder, devices, **constant, steps=steps).start(workdir).wait(), workdir)
    ours, theirs = (read_metrics(w / METRICS) for w in (workdir, whole))
    batches = [[(r["step"], r["samples"], r["tokens"]) for r in rows] for rows in (ours, theirs)]
    worst = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(ours, theirs, strict=True))
    return {
        "devices": [8, 4, 1, 8],
        "same batches": batches[0] == batches[1],
        "largest relative difference of a loss": worst,
        "ok": batches[0] == batches[1] and worst <= 1e-5,
    }


def soak(folder: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Memory, threads, files and temporary folders of a run that trains and saves all the time."""
    import numpy as np

    bench = Bench(folder, devices=1, steps=10_000_000, save_every=100, warmup_ratio=0.0)
    workdir, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    process = bench.start(workdir)
    run, begin, rows = psutil.Process(process.pid), time.monotonic(), []
    while process.poll() is None and time.monotonic() - begin < 60 * minutes:
        time.sleep(5)
        with contextlib.suppress(psutil.NoSuchProcess):
            rows.append(
                (
                    time.monotonic() - begin,
                    run.memory_info().rss / 2**20,
                    run.num_threads(),
                    run.num_fds(),
                    len(list(temporary.iterdir())),
                )
            )
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    table = np.array(rows)[len(rows) // 6 :]  # a sixth is warm-up
    x, y = table[:, 0] / 60, table[:, 1]
    slope, offset = np.polyfit(x, y, 1)
    rest = y - (slope * x + offset)
    # Neighbours are alike: the error of the slope from means over a minute.
    blocks = max(1, 12)
    m = len(x) // blocks
    xm, rm = (v[: m * blocks].reshape(m, blocks).mean(1) for v in (x, rest))
    error = np.sqrt((rm**2).sum() / max(m - 2, 1) / ((xm - xm.mean()) ** 2).sum())
    bound = slope + 1.96 * error
    half = len(table) // 2
    grown = {
        name: int(table[half:, i].max() - table[:half, i].max())
        for i, name in ((2, "threads"), (3, "open files"), (4, "temporary files"))
    }
    return {
        "minutes": round(rows[-1][0] / 60, 1),
        "steps": len(read_metrics(workdir / METRICS)),
        "saves": committed(workdir) // 100,
        "rss MB at the start, end": [round(float(y[0]), 1), round(float(y[-1]), 1)],
        "slope MB/min": round(float(slope), 3),
        "upper 95 % bound MB/min": round(float(bound), 3),
        "growth": grown,
        "exit code": code,
        "ok": bool(bound < 1 and code == 75 and all(g <= 0 for g in grown.values())),
    }


# ---------------------------------------------------------------------------------------------------

WHAT = {
    "kills": kills,
    "peer_kills": peer_kills,
    "damages": damages,
    "full_disk": full_disk,
    "stops": stops,
    "topology": topology,
}


def main(words: list[str] | None = None) -> int:
    """Runs one of WHAT; 1 if it does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[*WHAT, "soak"])
    parser.add_argument("--count", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    args = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    start = time.time()
    work = soak if args.what == "soak" else WHAT[args.what]
    result = work(folder, args.minutes if args.what == "soak" else args.count, args.seed)
    result = {
        "what": args.what,
        **result,
        "seconds": round(time.time() - start),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["ok"]:
        shutil.rmtree(folder)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
