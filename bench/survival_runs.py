"""The runs of bench/survival.py: a tiny model and its data, and what must be the same in two of its runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_jax.digests import sha256
from llava_jax.train.log import METRICS, read_metrics
from tests.train.run import overrides

SETTINGS = {"steps": 12, "save_every": 2, "data.threads": 2}
ROOT = Path(__file__).resolve().parents[1]

_MAKE = """
import sys; from pathlib import Path; from tests.train.run import make_data, make_model
folder = Path(sys.argv[1]); make_model(folder, make_data(folder / "data", int(sys.argv[2])))
"""


class Bench:
    """A tiny model and its data in `folder`, and runs on them. devices: of each process.
    samples: of the data."""

    def __init__(self, folder: Path, devices: int = 2, samples: int = 30, **settings: Any):
        self.folder, self.settings = folder, {**SETTINGS, **settings}
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model").exists():
            # In a process of its own: `fork` needs one that has touched no device.
            make = [sys.executable, "-c", _MAKE, str(folder), str(samples)]
            subprocess.run(make, check=True, cwd=ROOT)
        self.made = folder / "model", folder / "data" / "data.json"
        self.env = {
            "JAX_PLATFORMS": "cpu",
            # Programs that run slower and compile sooner: most of these runs are killed in their first steps.
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
            " --xla_backend_optimization_level=0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }

    def words(self, workdir: Path, *more: str, **changes: Any) -> list[str]:
        settings = overrides(*self.made, **{**self.settings, **changes})
        return [
            "train",
            "--config",
            "common",
            "--quiet",
            "--workdir",
            str(workdir),
            *settings,
            *more,
        ]

    def log(self, workdir: Path) -> Path:
        """What the runs in `workdir` say; never on a disk that is full."""
        return self.folder / f"{workdir.name}.log"

    def start(
        self, workdir: Path, *more: str, cache: bool = True, **changes: Any
    ) -> subprocess.Popen:
        env = {**os.environ, **self.env}
        if not cache:  # programs from a cache upset collectives between CPU processes
            env.pop("JAX_COMPILATION_CACHE_DIR")
        command = [sys.executable, "-m", "llava_jax", *self.words(workdir, *more, **changes)]
        log = open(self.log(workdir), "ab")  # noqa: SIM115
        return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def fork(
        self, workdir: Path, prepare: Callable[[], Any] = lambda: None, *, fill: bool = False
    ) -> int:
        """The process id of a run in a fork of this process, which imported all and touched no device.

        fill: whether it adds to the cache of programs.
        """
        pid = os.fork()
        if pid:
            return pid
        try:
            with open(self.log(workdir), "ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(self.env)
            import jax

            from llava_jax import cli

            # jax was imported before, and has read its environment. What is killed only reads the cache.
            jax.config.update("jax_platforms", "cpu")
            jax.config.update("jax_compilation_cache_dir", self.env["JAX_COMPILATION_CACHE_DIR"])
            least = 0.0 if fill else 1e9
            jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
            prepare()
            os._exit(cli.main(self.words(workdir)))
        finally:
            os._exit(70)


def outcome(workdir: Path) -> dict[str, Any]:
    """What must be the same in two runs: every logged number, the model, the files that are left."""
    rows = [
        {k: v.hex() if isinstance(v, float) else v for k, v in row.items() if "seconds" not in k}
        for row in read_metrics(workdir / METRICS)
    ]
    weights = sorted((workdir / "export").glob("*.safetensors"))
    files = sorted(
        p.relative_to(workdir).as_posix()
        for p in workdir.rglob("*")
        if p.is_file() and "tensorboard" not in p.parts and "checkpoints" not in p.parts
    )
    return {
        "rows": rows,
        "model": [sha256(path) for path in weights],
        "files": [f for f in files if f != "restarts.jsonl"],
        "checkpoints": sorted(p.name for p in (workdir / "checkpoints").glob("[!.]*")),
        "left behind": sorted(p.name for p in (workdir / "checkpoints").glob(".*")),
    }


def compared(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [name for name in theirs if ours[name] != theirs[name]]


def finished(code: int, workdir: Path) -> None:
    """Raises where the run that others are compared with did not end well."""
    if code:
        raise SystemExit(workdir.with_suffix(".log").read_text()[-2000:])


def committed(workdir: Path) -> int:
    steps = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit()]
    return max(steps, default=0)
