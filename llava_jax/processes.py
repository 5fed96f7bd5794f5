"""Work in several processes, each fed by a pipe: a killed one is named and replaced, never waited for.

Not multiprocessing: it would run a user's script once more in every process, or fork one that has jax's
threads, and its pools do not say which work a process died of.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Chunk = TypeVar("Chunk")


class Lost(NamedTuple):
    """What stands in for a result whose process ended or took too long."""

    why: str


def cores() -> int:
    """How many processes can run at a time here."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_processes(
    job: str, setup: tuple[Any, ...], chunks: Iterable[Chunk], count: int, seconds: float
) -> Iterator[tuple[Chunk, Any]]:
    """(chunk, result) of each chunk, in the order in which they are done; result may be Lost.

    job: "module:function". In each of `count` processes, function(*setup) gives what is then called
    with chunks. seconds: the longest that a chunk may take. At most 2 * count results wait to be
    taken, so memory is bounded. An exception of the job is raised here. Leaving the loop ends all.
    """
    results: queue.Queue[Any] = queue.Queue(2 * count)
    source, lock, stop = iter(chunks), threading.Lock(), threading.Event()
    running: set[_Process] = set()

    def feed() -> None:
        process = None
        try:
            while not stop.is_set():
                with lock:
                    chunk = next(source, _END)
                if chunk is _END:
                    break
                if process is None:
                    running.add(process := _Process(job, setup))
                result = process.ask(chunk, seconds)
                if isinstance(result, Lost):
                    running.discard(process)
                    process = process.end()
                _put(results, (chunk, result), stop)
        except BaseException as error:  # of `chunks`, or in starting a process
            _put(results, error, stop)
        finally:
            if process:
                process.end()
            _put(results, _END, stop)

    threads = [threading.Thread(target=feed, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        left = count
        while left:
            item = results.get()
            if item is _END:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            elif isinstance(item[1], BaseException):
                raise item[1]
            else:
                yield item
    finally:
        stop.set()
        for process in list(running):  # nobody waits for work that is not wanted any more
            process.kill()
        for thread in threads:
            thread.join()


_END = object()


def _put(results: queue.Queue[Any], item: Any, stop: threading.Event) -> None:
    """Puts an item into a queue that may be full, unless nobody takes from it any more."""
    while not stop.is_set():
        try:
            return results.put(item, timeout=0.2)
        except queue.Full:
            continue


class _Process:
    """One process that runs `serve`."""

    def __init__(self, job: str, setup: tuple[Any, ...]):
        home = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from llava_jax.processes import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._send((job, setup))

    def ask(self, chunk: Any, seconds: float) -> Any:
        """The result of a chunk; an exception that the job raised; Lost."""
        self._send(chunk)
        out: Any = self._process.stdout
        deadline, data, wanted = time.monotonic() + seconds, bytearray(), None
        while wanted is None or len(data) < wanted + 8:
            ready, _, _ = select.select([out], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return Lost(f"it took more than {seconds:g} s")
            if not (more := os.read(out.fileno(), 1 << 20)):
                return Lost(_death(self._process.wait()))
            data += more
            if wanted is None and len(data) >= 8:
                wanted = int.from_bytes(data[:8], "big")
        return pickle.loads(bytes(data[8:]))  # noqa: S301, our own process wrote it

    def kill(self) -> None:
        """Ends it; who waits for its answer gets Lost."""
        self._process.kill()

    def end(self) -> None:
        """Ends it and frees what belongs to it."""
        self._process.kill()
        self._process.communicate()

    def _send(self, message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # said by who waits for the answer
            _write(self._process.stdin, message)


def _death(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    return f"its process was killed by {signal.Signals(-code).name}"


def _write(stream: Any, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(data).to_bytes(8, "big") + data)
    stream.flush()


def _read(stream: Any) -> Any:
    """The next message; _END where the other side is gone."""
    head = stream.read(8)
    body = stream.read(int.from_bytes(head, "big")) if len(head) == 8 else b""
    return pickle.loads(body) if body else _END  # noqa: S301, our own process wrote it


def serve() -> None:
    """The life of one process: what is to be done, then chunks in and results out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that asks
    source, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints is no result
    start = _read(source)
    if start is _END:
        return
    job, setup = start
    module, _, name = job.partition(":")
    work = None
    while (chunk := _read(source)) is not _END:
        try:
            if work is None:
                work = getattr(importlib.import_module(module), name)(*setup)
            result = work(chunk)
        except Exception as error:
            result = error
        _write(answers, result)
