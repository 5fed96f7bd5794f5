"""A small job as people have it: records of their own about pictures of their own."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.rehearsal.odd import draw
from tests.rehearsal.sources import COLOURS, NOUNS, Record, conversation

Json = list[Any]


def record(n: int, image: str | None = "a.jpg", *, tag: str = "<image>\n", **more: Any) -> Record:
    """Record n: a question about one picture and its answer; without a picture for image=None."""
    question = f"{tag if image else ''}What is item {n}?"
    made: Record = {"id": f"own_{n}", "conversations": conversation([(question, "A red cup.")])}
    return made | ({"image": image} if image else {}) | more


def pictures(folder: Path, names: tuple[str, ...] = ("a.jpg", "b.jpg")) -> Path:
    """A folder of small pictures."""
    rng = np.random.default_rng(0)
    for name in names:
        draw(folder / name, rng)
    return folder


def write(path: Path, records: Json, **options: Any) -> Path:
    """A JSON list."""
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8", **options)
    return path


def job(folder: Path, count: int, *, per_picture: int = 4) -> Path:
    """`count` records about a quarter as many pictures, one in forty of them text alone: own.json."""
    rng, records = np.random.default_rng(5), []
    for n in range(count):
        image = f"shots/{n // per_picture:05d}.jpg"
        if n % per_picture == 0:
            draw(folder / "pictures" / image, rng)
        colour, noun = str(rng.choice(COLOURS)), str(rng.choice(NOUNS))
        tag = "" if n % 40 == 39 else "<image>\n"
        pairs = [(f"{tag}Which colour has the {noun} of order {n}?", colour)]
        made: Record = {"id": n, "conversations": conversation(pairs)}
        records.append(made | ({"image": image} if tag else {}))
    return write(folder / "own.json", records)
