"""The cards of the sheet: example pictures with all their answers, and what was answered wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from llava_jax.quickstart import questions
from llava_jax.quickstart.cards import Answered, Card
from llava_jax.quickstart.dataset import question_rows, write_pictures
from llava_jax.quickstart.scenes import render, sample

EXAMPLES, EXAMPLE_SIZE, EXAMPLE_SEED = 6, 256, 2_000_003
WRONG_CARDS = 6


def answer_examples(model: Any, out: Path, seed: int) -> list[Card]:
    """Draws a few larger pictures into out/examples and asks every kind of question about each."""
    from llava_jax.model import Request

    scenes = sample(EXAMPLES, seed + EXAMPLE_SEED)
    paths = write_pictures(render(scenes, EXAMPLE_SIZE), out, "examples")
    rows = list(question_rows(scenes, paths, seed + EXAMPLE_SEED))
    requests = [Request(row["text"], str(out / row["image"]), max_new_tokens=96) for row in rows]
    replies = model.generate_batch(requests, batch_size=64)
    answers = [
        Answered(row["kind"], _first_line(row["text"]), reply.text.strip(), row["answer"])
        for row, reply in zip(rows, replies, strict=True)
    ]
    each = len(questions.KINDS)
    return [
        Card(Image.open(out / path), answers[i * each : (i + 1) * each])
        for i, path in enumerate(paths)
    ]


def wrong_cards(wrong: Sequence[dict[str, Any]]) -> list[Card]:
    """The first wrong answers, those about one picture on one card.

    wrong: rows of llava_jax.train.evaluate.score.
    """
    by_picture: dict[str, list[Answered]] = {}
    for row in wrong:
        if row["image"] in by_picture or len(by_picture) < WRONG_CARDS:
            turn = len(row["before"]) + 1
            where = f"(question {turn} of a conversation) " if turn > 1 else ""
            answered = Answered(
                row["kind"], where + _first_line(row["text"]), row["said"], row["answer"]
            )
            by_picture.setdefault(row["image"], []).append(answered)
    return [
        Card(Image.open(path), answers, "/".join(Path(path).parts[-2:]))
        for path, answers in by_picture.items()
    ]


def wrong_note(scores: dict[str, Any], follow_ups: dict[str, Any]) -> str:
    """How many answers were wrong, and where to find them."""
    counts = [
        f"{result['n'] - result['right']:,} of {result['n']:,} {what}"
        for result, what in ((scores, "questions"), (follow_ups, "follow-up questions"))
        if result["n"]
    ]
    wrong = bool(scores["wrong"] or follow_ups["wrong"])
    return " and ".join(counts) + (". The first 50 of each are in report.json." if wrong else ".")


def _first_line(text: str) -> str:
    return text.split("\n")[0]
