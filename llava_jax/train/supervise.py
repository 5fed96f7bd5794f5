"""`llava-jax train --supervise`: the processes of one machine, started again when one dies or hangs.

The supervisor imports no jax. It starts the same command line in --processes processes, gives each a pipe
to say in that it lives (`alive`, after every step), and starts all of them again once one ended by a
signal, by a bug, by a disk that failed, or has said nothing for --hang-minutes. Which checkpoint they go
on from is decided where every run decides it. Each process leads a session of its own, so that the
Ctrl-C of a terminal reaches the supervisor alone, which passes it on once; and has the end of another
pipe, whose closing says that the supervisor is gone (`follow`). Over several machines this is the job of
what started them: docs/scale.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llava_jax.chips import has_cuda, visible_gpus
from llava_jax.errors import ConfigError, LlavaError, counted
from llava_jax.train.signals import stop_signals
from llava_jax.util import LineFile

log = logging.getLogger(__name__)

RESTARTS = "restarts.jsonl"
COMMAND = (sys.executable, "-m", "llava_jax")
FINAL = {0: "finished", 2: "bad input", 65: "diverged", 75: "stopped"}
"""Exit codes (see llava_jax.cli) after which starting again would change nothing."""
PASSING = {71: "was refused memory", 74: "met a disk or network that failed"}
"""Those of what may pass by itself: the first new start waits too."""
REST = 4
"""So many times --hang-minutes may pass without a sign of life where no steps are made, and at the start."""
ORPHAN_SECONDS = 600.0
"""How long a process whose supervisor is gone has to save and end."""
GRACE = 2.0
"""Seconds that a process has for its last words, after another died or it hung, before SIGKILL."""
LOCAL_GPUS = "JAX_LOCAL_DEVICE_IDS"
_PIPE, _LEASH = "LLAVA_JAX_ALIVE", "LLAVA_JAX_SUPERVISED"


def alive(*, steps: bool = True) -> None:
    """Says to the supervisor, if there is one, that this process is getting on. Costs a system call.

    steps: whether the next sign follows after a step; without, it may take REST times as long: a
    batch of a validation, a file of an export.
    """
    if number := os.environ.get(_PIPE):
        with contextlib.suppress(OSError):  # the supervisor is gone: see `follow`
            os.write(int(number), b"." if steps else b"-")


def follow() -> None:
    """From now on this process, if it is supervised, stops as by SIGTERM once its supervisor is gone, and
    is ended where that takes longer than ORPHAN_SECONDS."""

    def wait(leash: int) -> None:
        with contextlib.suppress(OSError):
            os.read(leash, 1)  # nothing is ever written: it returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    if number := os.environ.pop(_LEASH, None):
        threading.Thread(target=wait, args=(int(number),), name="supervisor", daemon=True).start()


def supervise(args: argparse.Namespace, words: Sequence[str], workdir: Path) -> int:
    """Runs `llava-jax` with `words` until it ends by itself; its exit code.

    args: of llava_jax.train.cli. Raises LlavaError where processes died more often than
    args.max_failures without a newer checkpoint in between.
    """
    if args.processes < 1 or args.hang_minutes <= 0:
        raise ConfigError("--processes and --hang-minutes are positive numbers")
    workdir.mkdir(parents=True, exist_ok=True)
    record, failures, newest = LineFile(workdir / RESTARTS), 0, _newest(workdir)
    with _stop_asked() as stop:
        while True:
            group = Group(words, args.processes, 60 * args.hang_minutes)
            code, why = group.run(stop)
            if why is None:
                return code
            saved = _newest(workdir)
            failures, newest = (1 if saved != newest else failures + 1), saved
            at = time.strftime("%Y-%m-%dT%H:%M:%S")
            record.add(
                json.dumps({"time": at, "why": why, "checkpoint": saved, "failures": failures})
            )
            if failures > args.max_failures and code in PASSING:
                log.error("%s %s; it was started again %d times", why, PASSING[code], failures - 1)
                return code
            if failures > args.max_failures:
                raise LlavaError(
                    f"{why}; started again {counted(args.max_failures, 'time')} without a newer "
                    f"checkpoint than {saved or '0'}",
                    fix="look at the log above, mend that, and run the same command again",
                )
            log.warning(
                "%s; starting again from checkpoint %s (failure %d of at most %d without a newer one)",
                *(why, saved or "0", failures, args.max_failures),
            )
            stop.wait(pause(code, failures))
            if stop.asked:
                log.warning("stopped before the next start; the same command goes on")
                return 75


def share_gpus(count: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """For each process the numbers of its GPUs, as jax takes them from the environment; else each would
    take all. Empty for one process, and where jax uses none. Raises ConfigError for unequal shares."""
    platforms = env.get("JAX_PLATFORMS")
    cuda = {"cuda", "gpu"} & {*platforms.split(",")} if platforms else has_cuda()
    if count < 2 or not cuda:
        return []
    given = env.get(LOCAL_GPUS)
    gpus = given.split(",") if given else [str(number) for number in range(visible_gpus(env))]
    each, left = divmod(len(gpus), count)
    if left:
        raise ConfigError(
            f"--processes {count} cannot share {counted(len(gpus), 'GPU')} equally",
            fix="a number that divides them, or JAX_PLATFORMS=cpu",
        )
    return [",".join(gpus[i * each : (i + 1) * each]) for i in range(count)] if gpus else []


def pause(code: int, failures: int) -> float:
    """Seconds before the next start, after so many failures without a newer checkpoint."""
    if code in PASSING:
        return min(120.0, 5.0 * 2.0**failures)
    return min(60.0, 2.0 ** (failures - 1)) if failures > 1 else 0.0


def _newest(workdir: Path) -> str:
    """The newest checkpoints of a run and its stages: what changes while it gets on."""
    steps = sorted(
        workdir.glob("**/checkpoints/[0-9]*"), key=lambda p: (p.parent, len(p.name), p.name)
    )
    newest = {p.parent: p.name for p in steps if p.name.isdigit()}
    return ", ".join(newest.values())


class Group:
    """The processes of one start.

    words: arguments of llava-jax. silence: seconds without a sign of life that are a hang.
    """

    def __init__(self, words: Sequence[str], count: int, silence: float):
        self._silence, joined, gpus = silence, {}, share_gpus(count)
        leash, self._leash = os.pipe()
        if count > 1:
            with contextlib.closing(socket.socket()) as probe:
                probe.bind(("localhost", 0))
                joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{probe.getsockname()[1]}"}
            joined["JAX_NUM_PROCESSES"] = str(count)
        self._processes, self._pipes = [], []
        for index in range(count):
            ours, theirs = os.pipe()
            os.set_blocking(theirs, False)
            env = {**os.environ, **joined, _PIPE: str(theirs), _LEASH: str(leash)}
            env["PYTHONFAULTHANDLER"] = "1"
            if count > 1:
                env["JAX_PROCESS_ID"] = str(index)
            if gpus:
                env[LOCAL_GPUS] = gpus[index]
            command = [*COMMAND, *words]
            self._processes.append(
                subprocess.Popen(command, env=env, pass_fds=[theirs, leash], start_new_session=True)
            )
            os.close(theirs)
            self._pipes.append(ours)
        os.close(leash)

    def run(self, stop: Stop) -> tuple[int, str | None]:
        """(exit code, why they should be started again); None where they should not. None is left."""
        try:
            why = self._watch(stop)
        finally:
            self._end()
            for pipe in (*self._pipes, self._leash):
                os.close(pipe)
        codes = [process.returncode for process in self._processes]
        if stop.asked or why is None:
            # Of several, the one that says most: a process whose peer failed only knows that.
            code = max(codes, key=lambda code: (code != 0, code))
            return (code if code >= 0 else 128 - code), None
        return next((code for code in codes if code in PASSING), 1), why

    def _watch(self, stop: Stop) -> str | None:
        """Waits until all processes ended well, or one did not: then why."""
        heard = [Heard(self._silence) for _ in self._processes]
        told = 0
        while True:
            for pipe in select.select(self._pipes, [], [], 0.2)[0]:
                if said := os.read(pipe, 65536):
                    heard[self._pipes.index(pipe)].hear(said)
                else:
                    time.sleep(0.05)  # it ended, or closed the pipe: poll says which
            codes = [process.poll() for process in self._processes]
            if stop.asked > told:
                told = stop.asked
                self._signal(signal.SIGTERM)
            for index, code in enumerate(codes):
                if code is not None and code not in FINAL and not stop.asked:
                    return f"{self._name(index)} {_ending(code)}"
                if code is None and heard[index].silent:
                    self._processes[index].send_signal(signal.SIGABRT)  # prints its stacks
                    return f"{self._name(index)} said nothing for {heard[index].limit:g} s"
            if None not in codes:
                return None

    def _name(self, index: int) -> str:
        return f"process {index}" if len(self._processes) > 1 else "the run"

    def _signal(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _end(self) -> None:
        """Ends those that are left: without the one that died they can save nothing."""
        end = time.monotonic() + GRACE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
        self._signal(signal.SIGKILL)
        for process in self._processes:
            process.wait()


def _ending(code: int) -> str:
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


class Heard:
    """When a process last gave a sign of life. limit: seconds until the next must come."""

    def __init__(self, silence: float):
        # Nothing is heard while models are fetched, samples counted, weights read and steps compiled.
        self._silence, self.limit = silence, silence * REST
        self._last = time.monotonic()

    def hear(self, said: bytes) -> None:
        """Takes what it wrote by `alive`."""
        self._last = time.monotonic()
        self.limit = self._silence * (1 if said.endswith(b".") else REST)

    @property
    def silent(self) -> bool:
        return time.monotonic() - self._last > self.limit


class Stop:
    """How often the supervisor was asked to stop: each process gets as many SIGTERMs."""

    asked = 0

    def ask(self) -> None:
        self.asked += 1

    def wait(self, seconds: float) -> None:
        """Sleeps, until it is asked to stop."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.1)


@contextlib.contextmanager
def _stop_asked() -> Iterator[Stop]:
    """Within the context the signals that stop a run ask to stop."""
    stop = Stop()
    with stop_signals(stop.ask, stop.ask):
        yield stop
