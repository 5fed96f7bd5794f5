"""How long weights take to be read, and a process to its first token.

    python -m bench load     # a file of 65 M parameters in Hugging Face's layout
    python -m bench start    # of the shipped model, and of that file

`load` is timed until every weight has been read once (transformers maps lazily), without imports, each
time in a fresh process. `start` runs whole processes in turns: to import flax.nnx, to a loaded model, and
to the first token with the compile cache empty and filled. On a busy machine the wall seconds of one run
compare with each other only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import frame, models

KINDS = {"llava_jax": "bench.start:Ours", "torch": "bench.start:Theirs"}
_FIRST_TOKEN = """
from llava_jax.generate.compile_cache import use_compile_cache
use_compile_cache()
import llava_jax
model = llava_jax.load("tiny")
next(iter(model.stream("What color is the shape?", {picture!r})))
"""
_OURS = """
from llava_jax.generate import Generator
from llava_jax.convert import load_checkpoint
checkpoint = load_checkpoint({folder!r}, lazy=True)
Generator(checkpoint.config, checkpoint.params, consume=True)
"""
_THEIRS = """
from transformers import LlavaForConditionalGeneration
LlavaForConditionalGeneration.from_pretrained({folder!r})
"""


def main(name: str, words: list[str]) -> int:
    """Prints the table of "load" or "start"."""
    parser = frame.parser(__doc__, size="65m")
    parser.add_argument("--size", choices=models.SIZES)
    parser.add_argument("--folder", type=Path, help="keeps the weights here")
    args = parser.parse_args(words)
    with tempfile.TemporaryDirectory() as work:
        args.folder = str(args.folder or Path(work) / "weights")
        models.save_random(args.size, Path(args.folder))
        return (load if name == "load" else start)(args, Path(work))


def load(args: argparse.Namespace, _: Path) -> int:
    """CPU seconds and memory of reading every weight once."""
    size = sum(f.stat().st_size for f in Path(args.folder).glob("*.safetensors"))
    found: dict[str, Any] = {name: {"cpu_seconds": [], "seconds": [], "gave": []} for name in KINDS}
    for _ in range(args.repeats):
        for name, kind in KINDS.items():
            with frame.Systems({name: kind}, args) as systems:  # a process each: nothing is warm
                for key, value in systems.ask(name, "load").items():
                    found[name][key].append(value)
    times = {
        n: {k: frame.spread(f[k]) for k in ("cpu_seconds", "seconds")} for n, f in found.items()
    }
    rows = frame.compared(f"{size / 1e6:.0f} MB, ms", times, 1e3)
    frame.show(frame.COMPARED, rows)
    memory = {n: max(f["gave"]) / (size / 1e9) for n, f in found.items()}
    frame.show(
        ["system", "peak memory added, of the file's size"], [[n, m] for n, m in memory.items()]
    )
    frame.record("load", args, file_bytes=size, times=times, memory=memory)
    return 0


class Ours:
    """llava_jax: the way of `load`, to the generator."""

    def __init__(self, args: argparse.Namespace):
        import jax

        from llava_jax.convert import load_checkpoint  # noqa: F401
        from llava_jax.generate import Generator  # noqa: F401

        self.folder = args.folder
        jax.block_until_ready(jax.numpy.zeros(1))
        self.before = frame.peak_memory()

    def load(self) -> float:
        """GB of memory that it took at most."""
        import numpy as np

        from llava_jax.convert import load_checkpoint
        from llava_jax.generate import Generator

        checkpoint = load_checkpoint(self.folder, lazy=True)
        generator = Generator(checkpoint.config, checkpoint.params, consume=True)
        sum(float(np.asarray(leaf).sum()) for leaf in generator.leaves)
        return frame.peak_memory() - self.before


class Theirs:
    """transformers: from_pretrained."""

    def __init__(self, args: argparse.Namespace):
        import torch
        from transformers import LlavaForConditionalGeneration

        if args.threads:
            torch.set_num_threads(args.threads)
        self.folder, self.kind = args.folder, LlavaForConditionalGeneration
        self.before = frame.peak_memory()

    def load(self) -> float:
        """GB of memory that it took at most."""
        model = self.kind.from_pretrained(self.folder)
        sum(float(p.detach().numpy().sum()) for p in model.parameters())
        return frame.peak_memory() - self.before


def start(args: argparse.Namespace, work: Path) -> int:
    """Seconds of whole processes."""
    from PIL import Image

    picture = str(work / "red.png")
    Image.new("RGB", (64, 64), "red").save(picture)
    environment = frame.pin(0)
    cache = work / "cache"
    token = _FIRST_TOKEN.format(picture=picture)
    programs = {
        "import flax.nnx": ("import flax.nnx", None),
        "tiny: loaded": ("import llava_jax; llava_jax.load('tiny')", cache),
        "tiny: first token, cache empty": (token, None),
        "tiny: first token, cache filled": (token, cache),
        f"{args.size}: loaded": (_OURS.format(folder=args.folder), cache),
        f"{args.size}: loaded, transformers": (_THEIRS.format(folder=args.folder), None),
    }

    def run(program: str, cache: Path | None) -> dict[str, float]:
        with tempfile.TemporaryDirectory() as empty:
            begun = time.monotonic()
            child = subprocess.Popen(
                [sys.executable, "-c", program],
                env={**environment, "LLAVA_JAX_CACHE": str(cache or empty)},
            )
            _, status, usage = os.wait4(child.pid, 0)
            if status:
                raise SystemExit(f"this failed:\n{program}")
            seconds = time.monotonic() - begun
        return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}

    run(token, cache)
    turns = [
        {name: run(*program) for name, program in programs.items()} for _ in range(args.repeats)
    ]
    times = {
        name: {
            kind: frame.spread([t[name][kind] for t in turns])
            for kind in ("seconds", "cpu_seconds")
        }
        for name in programs
    }
    base = times["import flax.nnx"]["seconds"]
    frame.show(
        ["process", "wall s, least", "median", "of importing flax.nnx", "of its median", "CPU s, least"],
        [
            [name, t["seconds"]["min"], t["seconds"]["median"], t["seconds"]["min"] / base["min"],
             t["seconds"]["median"] / base["median"], t["cpu_seconds"]["min"]]
            for name, t in times.items()
        ],
    )  # fmt: skip
    frame.record("start", args, times=times)
    return 0
