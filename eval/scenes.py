"""Benchmark-shaped sets made of the quickstart's pictures, to try a run with no data at all.

Files and fields are the owners' (VQAv2, POPE, MME, ScienceQA, MMBench with its rotations), so that a
run and its scores go through the same code as the real sets; the numbers compare with nothing.
"""

import base64
import csv
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.eval.benchmarks.mmbench import ROTATION
from llava_jax.eval.files import write_json

Object = tuple[str, str, str]  # colour, shape, place
SIZE = 64


def write_scene_sets(out: Path, count: int = 40, seed: int = 0) -> list[Path]:
    """Writes the five sets under `out`, one folder each, with `count` pictures.

    Returns:
      The folders, named as the tasks are.
    """
    from llava_jax.quickstart.scenes import render, sample

    scenes = sample(count, seed)
    pictures = [_png(p) for p in render(scenes, SIZE)]
    objects = list(scenes.objects())
    makers = {
        "vqav2": _vqav2,
        "pope": _pope,
        "mme": _mme,
        "scienceqa": _scienceqa,
        "mmbench": _mmbench,
    }
    folders = []
    for name, make in makers.items():
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        make(folder, pictures, objects, random.Random(f"{name} {seed}"))
        folders.append(folder)
    return folders


def _png(pixels) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _picture(folder: Path, name: str, picture: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture)
    return name


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def _absent(objects: list[Object], rng: random.Random) -> tuple[str, str]:
    from llava_jax.quickstart.scenes import COLORS, SHAPES

    present = {o[:2] for o in objects}
    return rng.choice([(c, s) for c in COLORS for s in SHAPES if (c, s) not in present])


def _color_question(objects: list[Object], rng: random.Random) -> tuple[str, str]:
    color, _, place = rng.choice(objects)
    return f"What color is the shape at the {place}?", color


def _colors(right: str, count: int, rng: random.Random) -> list[str]:
    """`count` colours in a random order, the right one among them."""
    from llava_jax.quickstart.scenes import COLORS

    chosen = [right, *rng.sample([c for c in COLORS if c != right], count - 1)]
    rng.shuffle(chosen)
    return chosen


def _vqav2(folder: Path, pictures: list[bytes], objects: list[list[Object]], rng) -> None:
    questions, annotations = [], []
    for i, (picture, seen) in enumerate(zip(pictures, objects)):
        _picture(folder, f"images/COCO_val2014_{i:012d}.jpg", picture)
        number = str(len(seen))
        for n, (question, answer, kind) in enumerate(
            [
                (*_color_question(seen, rng), "other"),
                ("How many shapes are there?", number, "number"),
            ]
        ):
            key = {"question_id": 10 * i + n, "image_id": i}
            questions.append({**key, "question": question})
            # Nine agree and one does not, so that answers are normalised.
            given = [answer] * 9 + ["unsure"]
            annotations.append(
                {
                    **key,
                    "question_type": " ".join(question.split()[:2]).lower(),
                    "answer_type": kind,
                    "multiple_choice_answer": answer,
                    "answers": [
                        {"answer": a, "answer_confidence": "yes", "answer_id": k}
                        for k, a in enumerate(given, 1)
                    ],
                }
            )
    common = {"data_subtype": "val2014", "info": {"description": "quickstart scenes"}}
    write_json(folder / "v2_questions.json", {**common, "questions": questions})
    write_json(folder / "v2_annotations.json", {**common, "annotations": annotations})


def _pope(folder: Path, pictures: list[bytes], objects: list[list[Object]], rng) -> None:
    names = [
        _picture(folder, f"val2014/COCO_val2014_{i:012d}.jpg", p) for i, p in enumerate(pictures)
    ]
    for split in ("random", "popular", "adversarial"):
        rows = []
        for name, seen in zip(names, objects):
            there, gone = rng.choice(seen)[:2], _absent(seen, rng)
            for (color, shape), label in ((there, "yes"), (gone, "no")):
                row = {"question_id": len(rows) + 1, "image": Path(name).name}
                rows.append({**row, "text": f"Is there a {color} {shape}?", "label": label})
        _jsonl(folder / f"coco_pope_{split}.json", rows)


def _mme(folder: Path, pictures: list[bytes], objects: list[list[Object]], rng) -> None:
    from llava_jax.quickstart.scenes import COLORS

    for i, (picture, seen) in enumerate(zip(pictures, objects)):
        color, shape, place = rng.choice(seen)
        other = rng.choice([c for c in COLORS if c != color])
        gone = _absent(seen, rng)
        pairs = {
            "existence": (f"Is there a {color} {shape}?", f"Is there a {gone[0]} {gone[1]}?"),
            "color": (
                f"Is the shape at the {place} {color}?",
                f"Is the shape at the {place} {other}?",
            ),
        }
        for task, (yes, no) in pairs.items():
            _picture(folder, f"{task}/{i:04d}.png", picture)
            lines = f"{yes} Please answer yes or no.\tYes\n{no} Please answer yes or no.\tNo\n"
            (folder / task / f"{i:04d}.txt").write_text(lines, encoding="utf-8")


def _scienceqa(folder: Path, pictures: list[bytes], objects: list[list[Object]], rng) -> None:
    problems = {}
    for i, (picture, seen) in enumerate(zip(pictures, objects)):
        question, answer = _color_question(seen, rng)
        choices = _colors(answer, 3, rng)
        _picture(folder, f"images/{i}/image.png", picture)
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
        problems[str(len(pictures) + i)] = {
            **problems[str(i)],
            "question": f"Which of these is the color {answer}?",
            "image": None,
        }
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"test": list(problems)})


def _mmbench(folder: Path, pictures: list[bytes], objects: list[list[Object]], rng) -> None:
    names = "index question hint A B C D answer category image source l2-category comment split"
    with open(folder / "mmbench_dev_20230712.tsv", "w", newline="", encoding="utf-8") as f:
        table: csv.DictWriter[str] = csv.DictWriter(f, names.split(), delimiter="\t", restval="")
        table.writeheader()
        for i, (picture, seen) in enumerate(zip(pictures, objects)):
            table.writerows(_rotations(i, picture, seen, rng))


def _rotations(i: int, picture: bytes, seen: list[Object], rng) -> Iterator[dict[str, Any]]:
    question, answer = _color_question(seen, rng)
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
