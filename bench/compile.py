"""Compile time of a training step and of answering, and how many programs mixed requests compile.

    python -m bench compile                     # the tiny model and the shipped one
    python -m bench compile --against 5145f1a   # beside a commit: `llava-jax train` of both, in turns

Processor seconds of compiling: XLA's threads are counted. Each time in a fresh process, without a cache on
disk. With --against, a run of one step of each tree, whose own log says how long XLA took (wall seconds,
the two in turns on one core).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import frame

KINDS = {"train": "bench.compile:Train", "answer": "bench.compile:Answer"}
_LOGGED = re.compile(r"Finished XLA compilation of jit\((\w+)\) in ([\d.]+) sec")
_SAMPLES = 8


def main(name: str, words: list[str]) -> int:
    """Prints the tables; 1 if mixed requests compiled a program twice."""
    parser = frame.parser(__doc__, repeats=3)
    parser.add_argument("--against", metavar="COMMIT", help="beside this commit of ours")
    args = parser.parse_args(words)
    if args.against:
        return against(name, args)
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for _ in range(args.repeats):
        for kind, place in KINDS.items():
            with frame.Systems({kind: place}, args) as systems:
                found[kind].append(systems.ask(kind, "compile")["gave"])
    rows = []
    for kind, turns in found.items():
        for what in turns[0]["seconds"]:
            own = frame.spread([turn["seconds"][what] for turn in turns])
            rows.append([f"{kind}: {what}", own["min"], own["median"]])
    frame.show(["CPU seconds", "least", "median"], rows)
    programs = found["answer"][0]["programs"]
    print(f"programs compiled by mixed requests, and by as many more: {programs}")
    frame.record(name, args, turns=found, programs=programs)
    return int(programs[0] != programs[1])


class Train:
    """The step of a run of the tiny model."""

    def __init__(self, args: argparse.Namespace):
        from bench import train
        from bench.train_systems import Ours

        self.system = Ours(train.arguments(["--size", "tiny", "--rows", "8", "--length", "120"]))

    def compile(self) -> dict[str, Any]:
        """{"seconds": {what: processor seconds}}."""
        begun = time.process_time()
        self.system.start()
        return {"seconds": {"the step of a tiny model": time.process_time() - begun}}


class Answer:
    """The programs of the shipped model."""

    def __init__(self, args: argparse.Namespace):
        import llava_jax

        self.model = llava_jax.load("tiny")

    def compile(self) -> dict[str, Any]:
        """{"seconds": {what: processor seconds}, "programs": before and after more requests}."""
        begun, counts = time.process_time(), []
        self._ask(0, 1)
        first = time.process_time() - begun
        for _ in range(2):  # the second time nothing may be compiled
            for n in range(1, 20):
                self._ask(n % 3, 7 * n)
            counts.append(dict(self.model.generator.compiled))
        return {"seconds": {"the first answer": first}, "programs": counts}

    def _ask(self, pictures: int, words: int) -> None:
        from PIL import Image

        images = [Image.new("RGB", (64, 64), color) for color in ("red", "blue")[:pictures]]
        self.model.generate("what " * words, images or None, max_new_tokens=2)


def against(name: str, args: argparse.Namespace) -> int:
    """The compile times of two trees' own runs."""
    frame.pin(args.threads)
    found: dict[str, list[float]] = {"here": [], args.against: []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        packed = subprocess.run(
            ["git", "-C", str(frame.ROOT), "archive", args.against], check=True, capture_output=True
        )
        (work / "tree.tar").write_bytes(packed.stdout)
        with tarfile.open(work / "tree.tar") as tar:
            tar.extractall(work / "then", filter="data")
        data = _data(work)
        convert = [sys.executable, "-m", "llava_jax", "convert", "tiny", str(work / "model")]
        subprocess.run([*convert, "--to", "hf"], check=True, cwd=frame.ROOT)
        for turn in range(args.repeats):
            for tree, root in (("here", frame.ROOT), (args.against, work / "then")):
                found[tree].append(_run(root, data, work / f"{turn}{tree}"))
    rows = [[tree, *(frame.spread(s)[k] for k in ("min", "median"))] for tree, s in found.items()]
    frame.show(["training step, compiled in (wall s)", "least", "median"], rows)
    ours, theirs = (frame.spread(seconds) for seconds in found.values())
    print(*(f"{k}: 1/{theirs[k] / ours[k]:.2f}" for k in ("min", "median")))
    frame.record(name, args, seconds=found)
    return 0


def _data(work: Path) -> Path:
    """A LLaVA JSON with pictures."""
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(work / "red.png")
    turns = [("human", "<image>\nwhat color is it"), ("gpt", "red")]
    said = [{"from": who, "value": text} for who, text in turns]
    records = [{"id": str(n), "image": "red.png", "conversations": said} for n in range(_SAMPLES)]
    (work / "data.json").write_text(json.dumps(records))
    return work / "data.json"


def _run(root: Path, data: Path, workdir: Path) -> float:
    """Seconds of XLA for the step of a run of one step."""
    settings = {
        "model.init": data.parent / "model",
        "data.path": data,
        "data.image_folder": data.parent,
        "steps": 1,
        "batch_size": _SAMPLES,
        "dtype": "float32",
        "remat": "none",
        "data.max_length": 256,
    }
    words = [f"--config.{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "llava_jax", "train", "--config", "configs/finetune_7b.py"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "JAX_LOG_COMPILES": "1",
        "LLAVA_JAX_CACHE": "off",
    }
    done = subprocess.run(
        [*command, "--workdir", str(workdir), *words],
        cwd=root, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{root}: {done.stderr[-2000:]}")
    times = [float(seconds) for _, seconds in _LOGGED.findall(done.stderr + done.stdout)]
    return max(times)
