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

LOCK = "run.lock"
BEAT = 5.0
"""Seconds between two heartbeats."""

_held: dict[Path, int] = {}  # how often by this process: a run may have a stage in its own folder


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[None]:
    """Keeps other runs out of `workdir`; the processes of one run hold it together.

    Raises ConfigError, naming the holder, where another run holds it, and where the processes of this
    run do not see the same folder.
    """
    path = workdir.absolute() / LOCK
    first, file = path not in _held, None
    if first:
        file = together(lambda: _take(path) if is_main() else None)
    _held[path] = _held.get(path, 0) + 1
    try:
        if first:
            together(lambda: _check_shared(path, file))
        with contextlib.nullcontext() if file is None else _alive(path):
            yield
    finally:
        _held[path] -= 1
        if not _held[path]:
            del _held[path]
            _release(file)


def _take(path: Path) -> IO[str]:
    import fcntl

    file, locked = path.open("a+"), True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _read(file)
        file.close()
        raise _refused(path, holder) from None
    except OSError:
        locked = False  # a file system without locks: the heartbeat alone decides
    holder = _read(file)
    here = locked and holder.get("host") == socket.gethostname()
    if holder and not here and _beats(path):
        file.close()
        raise _refused(path, holder)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    mine = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    file.truncate(0)
    file.write(json.dumps({**mine, "run": secrets.token_hex(8)}))
    file.flush()
    os.fsync(file.fileno())
    return file


def _release(file: IO[str] | None) -> None:
    if file is not None:
        file.truncate(0)  # the file stays: removing it would let two runs lock two files
        file.close()


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read() or "{}")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _refused(path: Path, holder: dict[str, Any]) -> ConfigError:
    by = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}"
    return ConfigError(
        f"{path.parent} is in use by {by}, since {holder.get('since', '?')}",
        fix="wait for that run, stop it, or name another --workdir",
    )


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


def _check_shared(path: Path, file: IO[str] | None) -> None:
    """Raises ConfigError unless all processes of the run see what the main one wrote."""
    (wrote, *_) = gather(_read(file) if file is not None else None)
    seen = wrote
    if file is None:
        seen = None
        if path.exists():
            with path.open() as theirs:
                seen = _read(theirs)
    if seen != wrote:
        raise ConfigError(
            f"{path.parent} on {socket.gethostname()} is not the folder that process 0 writes to",
            fix="name a --workdir that all hosts share",
        )
