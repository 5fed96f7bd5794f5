"""What the quickstart's sheet shows, however it is drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llava_jax.report.figure import smooth

TITLE = "LLaVA quickstart: what the model says"
PAPER, CARD, INK, SOFT, LINE = "#f4f5f7", "#ffffff", "#1c2430", "#6b7686", "#e3e7ec"
RIGHT, WRONG, ACCENT = "#1f8a4c", "#c9302c", "#2f5fd0"
WRONG_CARDS = 6


@dataclass(frozen=True)
class Result:
    """One question, what the model said, and what is true. `question` is without prompt suffixes."""

    kind: str
    question: str
    answer: str
    truth: str

    @property
    def right(self) -> bool:
        return self.answer == self.truth


@dataclass(frozen=True)
class Card:
    """A picture with everything that was asked about it, and perhaps a title."""

    picture: Image.Image
    results: Sequence[Result]
    title: str = ""


@dataclass(frozen=True)
class Curve:
    """The loss of one stage; losses: one per step, all positive."""

    title: str
    losses: Sequence[float]

    def points(self, count: int = 200) -> list[tuple[float, float]]:
        """(x, y) from 0 to 1, y upwards on a log scale: the smoothed losses, at most `count`."""
        log = np.log(smooth(self.losses))
        at = np.unique(np.linspace(0, len(log) - 1, count).round().astype(int))
        low, high = log.min(), log.max()
        x, y = at / max(len(log) - 1, 1), (log[at] - low) / max(high - low, 1e-9)
        return [(float(a), float(b)) for a, b in zip(x, y)]

    @property
    def words(self) -> str:
        """Its first and last value and the number of steps between them."""
        first, last = smooth(self.losses)[0], smooth(self.losses)[-1]
        return f"loss {number(first)} to {number(last)} in {len(self.losses):,} steps"


@dataclass(frozen=True)
class Sheet:
    """Everything on the sheet.

    cards: example pictures with all their answers. scores: exact match by kind, 0 to 1. note: the
    line under the title. wrong: what it got wrong, with `wrong_note` about how much that is.
    facts: (name, value), such as size and time. command: what to run next.
    """

    cards: Sequence[Card]
    scores: dict[str, float]
    note: str
    wrong: Sequence[Card] = ()
    wrong_note: str = ""
    curves: Sequence[Curve] = ()
    facts: Sequence[tuple[str, str]] = ()
    command: str = ""


def make_cards(rows: Sequence[dict[str, Any]], titles: bool = False) -> list[Card]:
    """The rows about one picture on one card.

    rows: as in "wrong" of llava_jax.train.evaluate.score. titles: name the picture's file.
    """
    by_picture: dict[str, list[Result]] = {}
    for row in rows:
        turn = len(row["before"]) + 1
        where = f"(question {turn} of a conversation) " if turn > 1 else ""
        question = where + row["text"].split("\n")[0]
        result = Result(row["kind"], question, row["said"], row["answer"])
        by_picture.setdefault(row["image"], []).append(result)
    return [
        Card(Image.open(path), results, "/".join(Path(path).parts[-2:]) if titles else "")
        for path, results in by_picture.items()
    ]


def wrong_note(*scores: dict[str, Any]) -> str:
    """How many answers were wrong and where to find them; scores: of single questions, follow-ups."""
    counts = [
        f"{score['n'] - score['right']:,} of {score['n']:,} {what}"
        for score, what in zip(scores, ("questions", "follow-up questions"))
        if score["n"]
    ]
    wrong = any(score["wrong"] for score in scores)
    return " and ".join(counts) + (". The first 50 of each are in report.json." if wrong else ".")


def number(value: float) -> str:
    """Two significant digits, never as a power of ten: 6.2, 0.013, 0.00041."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(abs(value))))}f}"
