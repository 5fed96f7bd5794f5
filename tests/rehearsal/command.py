"""Runs `llava-jax` as a user does: a process of its own, with a user's environment.

`here` runs a command line in this process instead: for what is refused before a device is touched.
"""

import contextlib
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax import cli

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1200  # seconds; a hang must not stop the suite


@dataclass(frozen=True)
class Done:
    """A finished command line."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line of standard error: where an error is said."""
        return (self.err.strip().splitlines() or [""])[-1]


def environment(devices: int = 1, **more: Any) -> dict[str, str]:
    """This process's environment without what only our tests set, on `devices` simulated devices."""
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_DEFAULT_MATMUL_PRECISION",)}
    env = {k: v for k, v in env.items() if not k.startswith(("SLURM_", "OMPI_", "COORDINATOR"))}
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", env.get("XLA_FLAGS", ""))
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    env |= {"XLA_FLAGS": flags.strip(), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return env | {name: str(value) for name, value in more.items()}


def start(*words: Any, devices: int = 1, cwd: Path | None = None, **env: Any) -> subprocess.Popen:
    """`llava-jax WORDS` in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "llava_jax", *map(str, words)],
        env=environment(devices, **env),
        cwd=cwd or ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen, timeout: float = TIMEOUT) -> Done:
    """Waits for the process."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"not done after {timeout} s:\n{out}\n{err}") from None
    return Done(process.returncode, out, err)


def run(*words: Any, devices: int = 1, cwd: Path | None = None, **env: Any) -> Done:
    """`llava-jax WORDS`, to its end."""
    return finish(start(*words, devices=devices, cwd=cwd, **env))


def here(*words: Any) -> Done:
    """`llava-jax WORDS` in this process: its devices, and no start-up."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main([str(word) for word in words])
    finally:
        logging.getLogger().removeHandler(handler)
    return Done(code, out.getvalue(), err.getvalue())


def ok(*words: Any, **options: Any) -> Done:
    """As `run`; fails unless it succeeds."""
    done = run(*words, **options)
    assert done.code == 0, f"exit code {done.code}\n{done.out}\n{done.err}"
    return done


def refused(done: Done, *words: str) -> None:
    """Fails unless `done` is one line of refusal, exit code 2, that says all of `words`."""
    assert done.code == 2, f"exit code {done.code}\n{done.out}\n{done.err}"
    assert "Traceback" not in done.err, done.err
    assert done.last.startswith("llava-jax"), done.err
    for word in words:
        assert word in done.last, f"{word!r} is not in: {done.last}"


def train_words(config: str, workdir: Path, settings: dict[str, Any]) -> list[str]:
    """The words of a training command; `settings` by their dotted names."""
    changes = [f"--config.{name}={value}" for name, value in settings.items()]
    return ["train", "--config", config, "--workdir", str(workdir), "--quiet", *changes]


def metrics(workdir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # written at this very moment
    return rows


def losses(workdir: Path) -> list[float]:
    """The loss of every step."""
    return [row["loss"] for row in metrics(workdir)]


def report(workdir: Path) -> dict[str, Any]:
    """The run's data_report.json."""
    return json.loads((workdir / "data_report.json").read_text())


def stop_at(process: subprocess.Popen, workdir: Path, step: int, number: signal.Signals) -> Done:
    """Sends a signal once `step` is logged, and waits for the end."""
    end = time.monotonic() + TIMEOUT
    while len(metrics(workdir)) < step:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            out, err = process.communicate()
            raise AssertionError(f"ended before step {step}:\n{out}\n{err}")
        time.sleep(0.02)
    process.send_signal(number)
    return finish(process)
