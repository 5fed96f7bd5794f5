"""What a training run survives: it is killed, damaged, starved of disk and stopped, and compared with one that was not.

    python -m bench.survival kills --count 100 --out bench/results/survival_kills.json

Each of WHAT trains a tiny model on the CPU, with the command line that users type, and exits with 1 where
a promise of docs/reliability.md does not hold. `--folder` keeps the run that others are compared with, and
`--add` adds to the counts in --out, so that a long measurement can be made in pieces, each of another --seed.
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
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

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
        path = rng.choice(cast(Any, files(copy / "2")))
        how = str(rng.choice(HOW))
        damage(path, how, rng)
        hows[how] += 1
        if not any(digests.damages(step) for step in written(copy)):
            unverified.append((n, how, path.name))
        found, meta = cast(Any, restored(copy, like))
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
        subprocess.run(["umount", "-l", "-R", str(folder)], check=True)


def full_disk(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """A disk that is full, or a folder that is read-only, from a random step on: for a while or to the end."""
    rng, bench, differ, said = random.Random(seed), Bench(folder, steps=60), [], Counter()
    whole = folder / "whole"
    finished(bench.start(whole).wait(), whole)
    wanted = outcome(whole)
    for n in range(count):
        with small_disk(folder / f"disk{seed}-{n}", 400 * 2**20) as disk:
            workdir, stays = disk / f"run{seed}-{n}", rng.random() < 0.3
            process = bench.start(workdir)
            at, kind = rng.randint(1, 40), rng.choice(("full", "read-only"))
            _steps(process, workdir, at)
            if kind == "full":
                _fill(disk / "filler", rng.choice((0, 4096, 100_000, 1_000_000)))
                mend = (disk / "filler").unlink
            else:
                mend = _read_only(workdir / "checkpoints")
            if not stays:
                time.sleep(rng.uniform(0.1, 1.5))
                mend()
            code = process.wait()
            text = bench.log(workdir).read_text()
            met = "no space left on device" in text or "read-only file system" in text
            said.update({kind: 1, f"{kind}, met by a save": met})
            if stays:
                mend()
                if code != 74 and not (code == 0 and compared(outcome(workdir), wanted) == []):
                    differ.append((n, f"{kind} to the end, exit {code}"))
                code = bench.start(workdir).wait()
            if code:
                differ.append((n, f"exit {code}: {bench.log(workdir).read_text()[-300:]}"))
            else:
                # Where the disk stayed full, the model may have had room and the last state none.
                names = compared(outcome(workdir), wanted)
                differ += [(n, name) for name in names if not (stays and name == "checkpoints")]
        print(f"{n}: {kind} from step {at}, {'to the end' if stays else 'for a while'}, {differ}")
    return {"disks": dict(said), "differences": differ, "ok": not differ}


def _read_only(folder: Path) -> Callable[[], Any]:
    """Makes a folder read-only between two writes, for root too; what undoes that."""
    mount = ["mount", "-o", "remount,bind,ro", str(folder)]
    subprocess.run(["mount", "--bind", str(folder), str(folder)], check=True)
    while subprocess.run(mount, capture_output=True).returncode:
        time.sleep(0.005)
    return lambda: subprocess.run(["mount", "-o", "remount,bind,rw", str(folder)], check=True)


def _steps(process: subprocess.Popen, workdir: Path, steps: int) -> None:
    while process.poll() is None and len(read_metrics(workdir / METRICS)) < steps:
        time.sleep(0.01)


def _fill(path: Path, leave: int) -> None:
    free = shutil.disk_usage(path.parent).free - leave
    with contextlib.suppress(OSError), open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(4096, free // 4096 * 4096))


def bad_images(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """One picture in 20 is missing, empty, cut off or none at all: the run ends well, says which, and is
    the same again; with data.bad_samples=error it stops at one."""
    samples, rng = 20 * count, random.Random(seed)
    bench = Bench(folder, devices=1, samples=samples, steps=samples // 8, save_every=1000)
    pictures = sorted((folder / "data" / "images").iterdir())
    wanted = []
    for n, path in enumerate(rng.sample(pictures, count)):
        wanted.append(f"s{path.stem}")
        if n % 4 == 0:
            path.unlink()
        else:
            data = path.read_bytes()
            path.write_bytes((b"", data[: len(data) // 2], b"no picture" * 50)[n % 4 - 1])
    ends, found = [], []
    for name in ("one", "two"):
        finished(bench.start(folder / name).wait(), folder / name)
        report = json.loads((folder / name / "data_report.json").read_text())
        found.append(sorted(row["id"] for row in report["bad"]))
        ends.append(outcome(folder / name))
    strict, changes = folder / "strict", cast(Any, {"data.bad_samples": "error"})
    code = bench.start(strict, **changes).wait()
    said = bench.log(strict).read_text()
    named = [name for name in wanted if f"sample {name}:" in said]
    return {
        "bad pictures": count,
        "of samples": samples,
        "all found, and no other": found == [sorted(wanted)] * 2,
        "the second run differs in": compared(*ends),
        "bad_samples=error": {"exit code": code, "names": named},
        "ok": found == [sorted(wanted)] * 2
        and ends[0] == ends[1]
        and code == 2
        and len(named) == 1,
    }


# Signals, time -------------------------------------------------------------------------------------


def stops(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGTERM at any step: code 75 within 10 s, and the same run after it."""
    return _stops(folder, count, seed, 1)


def peer_stops(folder: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGTERM to one of two processes: both end with 75 within 10 s, at the same step."""
    return _stops(folder, count, seed, 2, "--supervise", "--processes", "2")


def _stops(folder: Path, count: int, seed: int, processes: int, *more: str) -> dict[str, Any]:
    rng, seconds, differ, runs = random.Random(seed), [], [], 0
    bench, cache = Bench(folder, devices=1, steps=60, save_every=1000), processes == 1
    whole, workdir = folder / "whole", folder / f"run{seed}"
    finished(bench.start(whole, *more, cache=cache).wait(), whole)
    wanted = outcome(whole)
    del wanted["checkpoints"]  # of a run that was stopped, those of the stops are there too
    while len(seconds) < count or workdir.exists():
        process = bench.start(workdir, *more, cache=cache)
        asked = len(seconds) < count and _wait_for_step(process, workdir, rng.randint(1, 12))
        if asked:
            children = psutil.Process(process.pid).children()
            (rng.choice(children) if processes > 1 else process).send_signal(signal.SIGTERM)
        start = time.monotonic()
        code = process.wait()
        if code == 75 and asked:
            seconds.append(round(time.monotonic() - start, 2))
            if committed(workdir) != (logged := len(read_metrics(workdir / METRICS))):
                differ.append((workdir.name, f"{logged} steps, {committed(workdir)} saved"))
        elif code:
            differ.append((workdir.name, f"exit {code}"))
            break
        else:  # asked in its last step, or not at all
            runs += 1
            differ += [(workdir.name, name) for name in compared(outcome(workdir), wanted)]
            shutil.rmtree(workdir)
        print(len(seconds), seconds[-1:], differ, flush=True)
    return {
        "stops": len(seconds),
        "seconds until it ended": seconds,
        "runs": runs,
        "differences": differ,
        "ok": not differ and max(seconds) <= 10,
    }


def _wait_for_step(process: subprocess.Popen, workdir: Path, more: int) -> bool:
    """Until this start of a run logged so many steps; whether it did, and has more to do."""
    path = workdir / METRICS
    before = len(read_metrics(path)) if path.exists() else 0
    stamp = path.stat().st_ino if before else 0  # a resumed run writes it anew
    while process.poll() is None:
        anew = path.exists() and path.stat().st_ino != stamp
        if anew and len(read_metrics(path)) >= before + more:
            return True
        time.sleep(0.005)
    return False


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

    bench = Bench(folder, devices=1, steps=1_000_000, save_every=100, warmup_ratio=0.0)
    workdir, temporary = folder / "run", folder / "tmp"
    temporary.mkdir()
    os.environ["TMPDIR"] = str(temporary)
    process = bench.start(workdir)
    _steps(process, workdir, 100)  # compiled, and saved once
    run, begin, rows = psutil.Process(process.pid), time.monotonic(), []
    while process.poll() is None and time.monotonic() - begin < 60 * minutes:
        time.sleep(0.05)
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = run.memory_info()
            rows.append(
                (
                    time.monotonic() - begin,
                    # Without pages of files, which the system takes and gives as it likes.
                    (memory.rss - memory.shared) / 2**20,
                    _threads(process.pid),
                    run.num_fds(),
                    len(list(temporary.iterdir())),
                )
            )
    process.send_signal(signal.SIGTERM)
    code = process.wait()
    table = np.array(rows)[len(rows) // 6 :]  # a sixth is warm-up
    # The least of each of 6 stretches. What malloc has freed stays with the process (train/heap.py) until
    # protobuf, which writes TensorBoard's files, trims the heap every few minutes, for a second: what is
    # then left is in use, and what is never given back is in it.
    stretches = np.array_split(table[:, :2], 6)
    x = np.array([part[:, 0].mean() for part in stretches]) / 60
    y = np.array([part[:, 1].min() for part in stretches])
    slope, offset = np.polyfit(x, y, 1)
    rest = y - (slope * x + offset)
    error = np.sqrt((rest**2).sum() / (len(y) - 2) / ((x - x.mean()) ** 2).sum())
    bound = slope + 2.78 * error  # Student's t, 4 degrees of freedom
    half = len(table) // 2
    grown = {
        name: int(table[half:, i].min() - table[:half, i].min())
        for i, name in ((2, "threads"), (3, "open files"), (4, "temporary files"))
    }
    return {
        "minutes": round(rows[-1][0] / 60, 1),
        "steps": len(read_metrics(workdir / METRICS)),
        "saves": committed(workdir) // 100,
        "MB, the least of each stretch": [round(float(least), 1) for least in y],
        "slope MB/min": round(float(slope), 3),
        "upper 95 % bound MB/min": round(float(bound), 3),
        "growth": grown,
        "exit code": code,
        "ok": bool(bound < 1 and code == 75 and all(g <= 0 for g in grown.values())),
    }


def _threads(pid: int) -> int:
    """How many threads a process has, without tensorstore's pool: it starts and ends its own, 0 to 6."""
    names = []
    for path in Path(f"/proc/{pid}/task").glob("*/comm"):
        with contextlib.suppress(OSError):
            names.append(path.read_text().strip())
    return sum(name != "ts_pool_worker" for name in names)


# ---------------------------------------------------------------------------------------------------

WHAT = {
    "kills": kills,
    "peer_kills": peer_kills,
    "damages": damages,
    "full_disk": full_disk,
    "bad_images": bad_images,
    "stops": stops,
    "peer_stops": peer_stops,
    "topology": topology,
}


def added(before: Any, value: Any) -> Any:
    """A result with that of an earlier piece: counts summed, lists joined, all of it ok or not."""
    if before is None:
        return value
    if isinstance(value, bool):
        return value and before
    if isinstance(value, dict):
        names = dict.fromkeys([*before, *value])
        return {n: added(before.get(n), value[n]) if n in value else before[n] for n in names}
    return before + value


def main(words: list[str] | None = None) -> int:
    """Runs one of WHAT; 1 if it does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=[*WHAT, "soak"])
    parser.add_argument("--count", type=int, default=20, help="how often (default: 20)")
    parser.add_argument("--minutes", type=float, default=30.0, help="of the soak (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="a JSON file for the result")
    parser.add_argument("--add", action="store_true", help="add to what is in --out")
    args = parser.parse_args(words)
    before = json.loads(args.out.read_text()) if args.add and args.out.exists() else {}
    if args.seed in before.get("seeds", ()):
        parser.error(f"{args.out} has --seed {args.seed} already")
    folder = args.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    work = soak if args.what == "soak" else WHAT[args.what]
    result = work(folder, args.minutes if args.what == "soak" else args.count, args.seed)
    result |= {"seconds": round(time.time() - start), "seeds": [args.seed]}
    result = {
        "what": args.what,
        **{name: added(before.get(name), value) for name, value in result.items()},
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {name: version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    if result["ok"] and not args.folder:
        shutil.rmtree(folder)
    return int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
