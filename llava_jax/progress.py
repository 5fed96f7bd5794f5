"""How far a piece of work is: a bar on a terminal, plain lines in a file. Imports no jax."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 30.0
"""Where the output is not a terminal, the longest time without a line (steps allowing)."""
TENTH_SECONDS = 1.0
"""The shortest time between two lines, so that quick work is one line."""


def progress(total: int, title: str, unit: str, *, quiet: bool = False, **more: Any) -> Any:
    """A tqdm bar, or `Lines` in its place where stderr is not a terminal. more: tqdm's options."""
    if quiet or sys.stderr.isatty():
        from tqdm import tqdm

        return tqdm(total=total, desc=title, unit=unit, disable=quiet, dynamic_ncols=True, **more)
    return Lines(total, title, initial=more.get("initial", 0))


class Lines:
    """The part of tqdm that we use, as lines: one per tenth of the work, and one at its end."""

    def __init__(self, total: int, title: str, initial: int = 0):
        self._total, self._title, self._done, self._shown = total, title, initial, initial
        self._postfix = ""
        self._last = time.monotonic()

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        """What stands at the end of the next line."""
        self._postfix = text

    def update(self, more: int = 1) -> None:
        """`more` are done."""
        before, self._done = self._done, self._done + more
        tenth = self._total and self._done * 10 // self._total > before * 10 // self._total
        waited = LINE_SECONDS if not tenth else 0 if self._done == self._total else TENTH_SECONDS
        if time.monotonic() - self._last >= waited:
            self.refresh()

    def refresh(self) -> None:
        """Prints the line now, unless that was done already."""
        if self._done == self._shown:
            return
        self._last, self._shown = time.monotonic(), self._done
        postfix = f", {self._postfix}" if self._postfix else ""
        self.write(f"{self._title}: {self._done:,} of {self._total:,}{postfix}")

    def write(self, text: str) -> None:
        """Prints a text, above a bar where there is one."""
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing more to say."""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
