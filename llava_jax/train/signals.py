"""The signals that ask a run to stop. Imports no jax: the supervisor hears them too."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

AGAIN = 2.0
"""Signals within so many seconds are one request: a terminal, a scheduler and a supervisor may each
send one for the same Ctrl-C."""


@contextlib.contextmanager
def stop_signals(
    ask: Callable[[], None], again: Callable[[], None] | None = None
) -> Iterator[None]:
    """Within the context SIGTERM, SIGINT and SIGHUP (unless it is ignored, as under nohup) call `ask`,
    once. One that comes later than AGAIN seconds after that calls `again`; without, it acts as before.

    Raises ValueError outside the main thread.
    """
    before, asked = {}, 0.0

    def restore() -> None:
        for number, handler in before.items():
            # None: not set from Python; jax.distributed puts one for SIGTERM into C++.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def heard(number: int, frame: object) -> None:
        nonlocal asked
        now = time.monotonic()
        if not asked:
            asked = now
            ask()
        elif now - asked > AGAIN and again:
            again()
        elif now - asked > AGAIN:
            restore()
            os.kill(os.getpid(), number)

    for number in stopping():
        before[number] = signal.signal(number, heard)
    try:
        yield
    finally:
        restore()


def stopping() -> list[signal.Signals]:
    """The signals that stop a run."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    return numbers
