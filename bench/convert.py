"""How fast, and with how much memory, a checkpoint of real size converts.

    python bench/convert.py --size llava-v1.5-7b --folder /big/disk

Makes a random checkpoint in Hugging Face's layout, copies it (the yardstick), converts it to the
JAX side and back, and checks that every tensor came back. One JSON line per step:
{"step", "seconds", "cpu_seconds", "gigabytes", "ratio_to_copy", "peak_anonymous_mb"}.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from llava_jax.config import PRESETS, LlavaConfig
from llava_jax.convert import Source, Target
from llava_jax.convert.checkpoint import save
from llava_jax.convert.compare import same_bytes
from llava_jax.convert.io.folder import read_folder
from llava_jax.convert.io.lazy import DTYPES, Lazy, Leaf
from llava_jax.params import is_stacked, parameter_shapes
from llava_jax.util import sync_tree

_RUN = """
import sys
from llava_jax.convert import Target, convert
convert(sys.argv[1], sys.argv[2], Target(sys.argv[3]))
"""


def main(words: list[str] | None = None) -> int:
    """Runs the benchmark; 1 if a tensor did not come back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", choices=sorted(PRESETS), default="llava-v1.5-7b")
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for it")
    parser.add_argument("--layers", type=int, help="of the decoder, to make it smaller")
    parser.add_argument("--keep", action="store_true", help="leave the files there")
    args = parser.parse_args(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    first, jax, back, copy = (args.folder / n for n in ("hf", "jax", "back", "copy"))
    config = PRESETS[args.size]()
    if args.layers:
        config = replace(config, language=replace(config.language, layers=args.layers))
    source = random_source(config)
    save(source, first, Target("hf", overwrite=True))
    size = sum(p.stat().st_size for p in first.glob("*.safetensors"))
    try:
        yardstick = copied(first, copy)
        report("plain copy", yardstick, 0, size, yardstick, 0)
        shutil.rmtree(copy)
        for step, a, b, to in (("hf to jax", first, jax, "jax"), ("jax to hf", jax, back, "hf")):
            shutil.rmtree(b, ignore_errors=True)
            seconds, cpu, peak = measured([sys.executable, "-c", _RUN, str(a), str(b), to])
            report(step, seconds, cpu, size, yardstick, peak)
        same = equal(first, back)
        print(json.dumps({"step": "every tensor byte-equal", "equal": same}), flush=True)
        return 0 if same else 1
    finally:
        for folder in () if args.keep else (first, jax, back, copy):
            shutil.rmtree(folder, ignore_errors=True)


def random_source(config: LlavaConfig) -> Source:
    """A checkpoint of bfloat16 noise, made block by block as it is written."""
    noise = np.random.default_rng(0).normal(size=1 << 22).astype(DTYPES["BF16"])

    def lazy(shape: tuple[int, ...], name: str, i: int) -> Lazy:
        def read() -> np.ndarray:
            count = int(np.prod(shape))
            return np.resize(np.roll(noise, hash((len(name), i)) % 1000), count).reshape(shape)

        return Lazy(shape, noise.dtype, read, name)

    leaves = {}
    for name, shape in parameter_shapes(config).items():
        if is_stacked(name):
            leaves[name] = Leaf(tuple(lazy(shape[1:], name, i) for i in range(shape[0])), True)
        else:
            leaves[name] = Leaf((lazy(shape, name, 0),), False)
    return Source("random", config, leaves)


def copied(a: Path, b: Path) -> float:
    """Seconds of copying a folder's weights to disk, fsync included."""
    b.mkdir(exist_ok=True)
    start = time.perf_counter()
    for path in a.glob("*.safetensors"):
        with open(path, "rb") as x, open(b / path.name, "wb") as y:
            shutil.copyfileobj(x, y, 1 << 24)
    sync_tree(b)
    return time.perf_counter() - start


def measured(command: list[str]) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak anonymous memory in MB) of a process.

    Mapped files do not count as memory: RssAnon.
    """
    start, peak = time.perf_counter(), 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = subprocess.Popen(command)
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = status.read_text().splitlines()
            peak = max([peak, *(int(x.split()[1]) for x in lines if x.startswith("RssAnon"))])
        except OSError:
            break
        time.sleep(0.01)
    if child.wait():
        raise SystemExit(f"{command[-1]}: exit code {child.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, cpu, peak * 1024 / 1e6


def equal(a: Path, b: Path) -> bool:
    """Whether two folders hold the same tensors, byte by byte."""
    one, other = (read_folder(p, allow_pickle=False)[0] for p in (a, b))
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and same_bytes(one[n].read(), other[n].read()) for n in one
    )


def report(step: str, seconds: float, cpu: float, size: int, yardstick: float, peak: float) -> None:
    """Prints one step as a JSON line."""
    line = {
        "step": step,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "gigabytes": round(size / 1e9, 2),
        "ratio_to_copy": round(seconds / yardstick, 2),
        "peak_anonymous_mb": round(peak),
        "cores": os.cpu_count(),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
