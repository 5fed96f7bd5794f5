"""How far a piece of work is: a bar on a terminal, plain lines in a file. Imports no jax."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 30.0
"""Where the output is not a terminal, the longest time without a line (steps allowing)."""


def progress(total: int, title: str, unit: str, *, quiet: bool = False, **more: Any) -> Any:
    """A tqdm bar, or what stands in for it where stderr is not a terminal. more: tqdm's options."""
    if quiet or sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(total=total, desc=title, unit=unit, disable=quiet, dynamic_ncols=True, **more)
    return Lines(total, title, initial=more.get("initial", 0))


class Lines:
    """The part of tqdm that we use, as lines: one for each tenth of the work, and LINE_SECONDS."""

    def __init__(self, total: int, title: str, initial: int = 0):
        self._total, self._title, self._done = total, title, initial
        self._words = ""
        self._last = time.monotonic()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands at the end of the next line."""
        self._words = text

    def update(self, more: int = 1) -> None:
        """`more` are done."""
        before, self._done = self._done, self._done + more
        tenth = self._total and self._done * 10 // self._total > before * 10 // self._total
        if tenth or time.monotonic() - self._last >= LINE_SECONDS:
            self._last = time.monotonic()
            words = f", {self._words}" if self._words else ""
            line = f"{self._title}: {self._done:,} of {self._total:,}{words}"
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing more to say."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
