"""One run at a time in a work directory.

The operating system's file lock decides; it is released however its process ends. The file says who
holds it. Some network file systems lock within one host only, so the holder also touches the file
again and again: a heartbeat that another host sees.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llava_jax.errors import ConfigError
from llava_jax.train.distributed import gather, is_main, together
from llava_jax.util import naming, take_lock

LOCK = "run.lock"
BEAT = 5.0
"""Seconds between two heartbeats."""


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Makes `workdir` and keeps other runs out of it; the processes of one run hold it together.

    Raises ConfigError, naming the holder, where another run holds it, and where the processes of this
    run do not see the same folder.
    """
    path = workdir.absolute() / LOCK
    together(lambda: workdir.mkdir(parents=True, exist_ok=True))
    file = together(lambda: _take(path) if is_main() else None)
    try:
        together(lambda: _check_shared(path))
        with contextlib.nullcontext() if file is None else _alive(path):
            yield
    finally:
        if file is not None:
            file.truncate(0)  # the file stays: removing it would let two runs lock two files
            file.close()


def _take(path: Path) -> IO[str]:
    file = path.open("a")
    locked = take_lock(file)  # None: the heartbeat alone decides
    holder = _read(path)
    here = locked is not None and holder.get("host") == socket.gethostname()
    if locked is False or (holder and not here and _beats(path)):
        file.close()
        by = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
        raise ConfigError(
            f"{path.parent} is in use by {by}, since {holder.get('since', '?')}",
            fix="wait for that run, stop it, or name another --workdir",
        )
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with naming(path):
        file.truncate(0)
        file.write(json.dumps({**mine, "run": secrets.token_hex(8)}))
        file.flush()
        os.fsync(file.fileno())
    return file


def _read(path: Path) -> dict[str, Any]:
    """What the lock says; empty where it is not there or damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _beats(path: Path) -> bool:
    """Whether the file's time moves; waits for up to three heartbeats."""
    before = path.stat().st_mtime_ns
    end = time.monotonic() + 3 * BEAT
    while time.monotonic() < end:
        time.sleep(BEAT / 5)
        if path.stat().st_mtime_ns != before:
            return True
    return False


@contextlib.contextmanager
def _alive(path: Path) -> Iterator[None]:
    """Within the context, the lock's file is touched every BEAT seconds."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, name="run.lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _check_shared(path: Path) -> None:
    """Raises ConfigError unless all processes of the run see what the main one wrote."""
    seen = _read(path)
    if seen != gather(seen)[0]:
        raise ConfigError(
            f"{path.parent} on {socket.gethostname()} is not the folder that process 0 writes to",
            fix="name a --workdir that all hosts share",
        )
