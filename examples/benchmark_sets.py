"""Benchmark-shaped sets made of the quickstart's pictures, to try an evaluation with no data at all.

    python examples/benchmark_sets.py --out benchmarks
    llava-jax eval --model tiny --tasks vqav2,pope,mme,scienceqa,mmbench --data benchmarks --out scores

Files and fields are the owners' (VQAv2, POPE, MME, ScienceQA, MMBench with its rotations), so that a
run and its scores go through the same code as the real sets; the numbers compare with nothing.
"""

import argparse
import base64
import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from llava_jax.eval.benchmarks.mmbench import ROTATION
from llava_jax.quickstart import scenes
from llava_jax.util import write_json

SIZE = 64  # of a picture, in pixels

Shape = tuple[str, str, str]  # colour, shape, place


def write_sets(out: Path, count: int = 40, seed: int = 0) -> list[Path]:
    """Writes the five sets under `out`, one folder each, with `count` pictures.

    Returns:
      The folders, named as the tasks are.
    """
    sampled = scenes.sample(count, seed)
    pictures = [_png(pixels) for pixels in scenes.render(sampled, SIZE)]
    shapes = list(sampled.objects())
    folders = []
    for name, write in WRITERS.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, pictures, shapes, random.Random(f"{name} {seed}"))
        folders.append(folder)
    return folders


def _png(pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def _absent(shapes: list[Shape], rng: random.Random) -> tuple[str, str]:
    """A colour and shape that the picture does not show."""
    shown = {s[:2] for s in shapes}
    every = [(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES]
    return rng.choice([pair for pair in every if pair not in shown])


def _color_question(shapes: list[Shape], rng: random.Random) -> tuple[str, str]:
    color, _, place = rng.choice(shapes)
    return f"What color is the shape at the {place}?", color


def _colors(right: str, count: int, rng: random.Random) -> list[str]:
    """`count` colours in a random order, the right one among them."""
    chosen = [right, *rng.sample([c for c in scenes.COLORS if c != right], count - 1)]
    rng.shuffle(chosen)
    return chosen


def _vqav2(folder: Path, pictures: list[bytes], shapes: list[list[Shape]], rng) -> None:
    questions, annotations = [], []
    for i, (picture, shown) in enumerate(zip(pictures, shapes)):
        _write(folder / f"images/COCO_val2014_{i:012d}.jpg", picture)
        asked = [
            (*_color_question(shown, rng), "other"),
            ("How many shapes are there?", str(len(shown)), "number"),
        ]
        for n, (question, answer, kind) in enumerate(asked):
            key = {"question_id": 10 * i + n, "image_id": i}
            questions.append({**key, "question": question})
            # Nine agree and one does not, so that answers are normalised.
            answers = [
                {"answer": a, "answer_confidence": "yes", "answer_id": k}
                for k, a in enumerate([answer] * 9 + ["unsure"], 1)
            ]
            kinds = {"question_type": " ".join(question.split()[:2]).lower(), "answer_type": kind}
            row = {**key, **kinds, "multiple_choice_answer": answer, "answers": answers}
            annotations.append(row)
    meta = {"data_subtype": "val2014", "info": {"description": "quickstart scenes"}}
    write_json(folder / "v2_questions.json", {**meta, "questions": questions})
    write_json(folder / "v2_annotations.json", {**meta, "annotations": annotations})


def _pope(folder: Path, pictures: list[bytes], shapes: list[list[Shape]], rng) -> None:
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(len(pictures))]
    for name, picture in zip(names, pictures):
        _write(folder / "val2014" / name, picture)
    for split in ("random", "popular", "adversarial"):
        rows = []
        for name, shown in zip(names, shapes):
            for (color, shape), label in (
                (rng.choice(shown)[:2], "yes"),
                (_absent(shown, rng), "no"),
            ):
                row = {"question_id": len(rows) + 1, "image": name}
                rows.append({**row, "text": f"Is there a {color} {shape}?", "label": label})
        _write(folder / f"coco_pope_{split}.json", "".join(json.dumps(r) + "\n" for r in rows))


def _mme(folder: Path, pictures: list[bytes], shapes: list[list[Shape]], rng) -> None:
    for i, (picture, shown) in enumerate(zip(pictures, shapes)):
        color, shape, place = rng.choice(shown)
        other = rng.choice([c for c in scenes.COLORS if c != color])
        gone = " ".join(_absent(shown, rng))
        pairs = {
            "existence": (f"Is there a {color} {shape}?", f"Is there a {gone}?"),
            "color": tuple(f"Is the shape at the {place} {c}?" for c in (color, other)),
        }
        for task, (yes, no) in pairs.items():
            _write(folder / f"{task}/{i:04d}.png", picture)
            lines = f"{yes} Please answer yes or no.\tYes\n{no} Please answer yes or no.\tNo\n"
            _write(folder / f"{task}/{i:04d}.txt", lines)


def _scienceqa(folder: Path, pictures: list[bytes], shapes: list[list[Shape]], rng) -> None:
    problems: dict[str, dict[str, Any]] = {}
    for i, (picture, shown) in enumerate(zip(pictures, shapes)):
        question, answer = _color_question(shown, rng)
        choices = _colors(answer, 3, rng)
        _write(folder / f"images/{i}/image.png", picture)
        problems[str(i)] = {
            "question": question,
            "choices": choices,
            "answer": choices.index(answer),
            "hint": "" if i % 2 else "Look at the shapes.",
            "image": "image.png",
            "grade": f"grade{1 + i % 12}",
            "subject": ("natural science", "social science", "language science")[i % 3],
            "split": "test",
        }
        # And one without a picture.
        question = f"Which of these is the color {answer}?"
        text_only = {**problems[str(i)], "question": question, "image": None}
        problems[str(len(pictures) + i)] = text_only
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems)})


def _mmbench(folder: Path, pictures: list[bytes], shapes: list[list[Shape]], rng) -> None:
    names = "index question hint A B C D answer category image source l2-category comment split"
    with open(folder / "mmbench_dev_20230712.tsv", "w", newline="", encoding="utf-8") as f:
        table: csv.DictWriter[str] = csv.DictWriter(f, names.split(), delimiter="\t", restval="")
        table.writeheader()
        for i, (picture, shown) in enumerate(zip(pictures, shapes)):
            table.writerows(_rotations(i, picture, shown, rng))


def _rotations(i: int, picture: bytes, shown: list[Shape], rng) -> Iterator[dict[str, Any]]:
    question, answer = _color_question(shown, rng)
    choices = _colors(answer, 2 + i % 3, rng)
    for k in range(len(choices)):
        turned = choices[-k:] + choices[:-k] if k else choices
        yield {
            "index": i + k * ROTATION,
            "question": question,
            **dict(zip("ABCD", turned)),
            "answer": "ABCD"[turned.index(answer)],
            "category": "attribute_recognition",
            "l2-category": "finegrained_perception (instance-level)",
            "image": base64.b64encode(picture).decode(),
            "split": "dev",
        }


WRITERS = {
    "vqav2": _vqav2,
    "pope": _pope,
    "mme": _mme,
    "scienceqa": _scienceqa,
    "mmbench": _mmbench,
}


def main() -> None:
    """Writes the sets and prints the command that runs them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--count", type=int, default=40, help="pictures (default 40)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.count < 1 or args.seed < 0:
        parser.error("--count is at least 1, and --seed at least 0")
    names = ",".join(f.name for f in write_sets(args.out, args.count, args.seed))
    print(f"llava-jax eval --model M --tasks {names} --data {args.out} --out DIR")


if __name__ == "__main__":
    main()
