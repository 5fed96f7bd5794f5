"""Answers by free greedy generation, scored by exact match: what a run's own questions tell."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Question:
    """One question about one image, alone in its conversation, and its only right answer."""

    image: str
    text: str
    answer: str
    kind: str = "all"


def questions_of(record: dict[str, Any], image_folder: str | Path) -> list[Question]:
    """Every turn of a LLaVA record as a question of its own; `kinds`, where given, names them."""
    turns = record["conversations"]
    image = str(Path(image_folder) / record["image"])
    kinds = record.get("kinds") or ["all"] * (len(turns) // 2)
    return [
        Question(image, turns[i]["value"].replace("<image>", "").strip(), turns[i + 1]["value"], k)
        for i, k in zip(range(0, len(turns), 2), kinds)
    ]


def exact_match(
    model: Any, questions: Sequence[Question], *, batch_size: int = 256, quiet: bool = False
) -> dict[str, Any]:
    """{"mean", "n", "kinds": {kind: share right}, "wrong": the first 50 wrong answers}.

    model: a LlavaModel. mean: over kinds, each weighed alike.
    """
    from llava_jax.model import Request

    longest = max((len(model.tokenizer.encode(q.answer)) for q in questions), default=0)
    requests = [Request(q.text, q.image, max_new_tokens=longest + 8) for q in questions]
    replies = model.generate_batch(requests, batch_size=batch_size, progress=not quiet)
    right, count, wrong = defaultdict(int), defaultdict(int), []
    for q, reply in zip(questions, replies):
        count[q.kind] += 1
        if reply.text.strip() == q.answer.strip():
            right[q.kind] += 1
        elif len(wrong) < 50:
            wrong.append({**dataclasses.asdict(q), "said": reply.text})
    kinds = {kind: right[kind] / count[kind] for kind in count}
    mean = sum(kinds.values()) / max(len(kinds), 1)
    return {"mean": mean, "n": len(questions), "kinds": kinds, "wrong": wrong}


def exact_match_on_holdout(config: Any, export: Path, *, quiet: bool = False) -> dict[str, Any]:
    """`exact_match` of the exported model on the images that config.data.holdout kept aside."""
    from llava_jax.data.order import holdout
    from llava_jax.data.records import read_all
    from llava_jax.model import load

    records, _ = read_all(config.data.path)
    _, aside = holdout(records, config.data.holdout, config.data.holdout_seed)
    questions = [q for i in aside for q in questions_of(records[i], config.data.image_folder)]
    return exact_match(load(export), questions, quiet=quiet)
