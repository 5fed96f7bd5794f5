"""Files in the formats of the sets' owners, of any size; all texts and boxes are made up.

Written after the owners' documentation (the pages named in llava_jax/datasets/sources). Sizes and keys are
those of the real files where a rule depends on them; everything else is as short as can be.
"""

import json
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def write_list(path: Path, rows: Iterable[Any], key: str | None = None, **more: Any) -> None:
    """A list, or an object whose `key` holds it with `more` before; never whole in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        if key:
            file.write(json.dumps(more)[:-1] + (", " if more else "") + f'"{key}": ')
        for n, row in enumerate(rows):
            file.write(("[" if n == 0 else ", ") + json.dumps(row))
        file.write("]}" if key else "]")


def write_object(path: Path, rows: Iterable[tuple[str, Any]]) -> None:
    """An object, key by key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for n, (key, row) in enumerate(rows):
            file.write(("{" if n == 0 else ", ") + f"{json.dumps(key)}: {json.dumps(row)}")
        file.write("}")


def vqa(
    folder: Path, files: tuple[str, str], pictures: int, questions: int, answers: int = 10
) -> None:
    """VQAv2's and OK-VQA's two files: `questions` in all, dealt over the pictures."""

    def asked() -> Iterable[dict[str, Any]]:
        for n in range(questions):
            image = n % pictures
            yield {"image_id": image, "question": f"What is {n}?", "question_id": image * 1000 + n}

    def answered() -> Iterable[dict[str, Any]]:
        for q in asked():
            given = [
                {"answer": "yes" if i else "no", "raw_answer": "yes", "answer_id": i + 1}
                for i in range(answers)
            ]
            yield {
                "question_type": "what",
                "multiple_choice_answer": "yes",
                "answers": given,
                "image_id": q["image_id"],
                "answer_type": "yes/no",
                "question_id": q["question_id"],
            }

    info = {"info": {"version": "2.0"}, "data_type": "mscoco"}
    write_list(folder / files[0], asked(), "questions", **info)
    write_list(folder / files[1], answered(), "annotations", **info)


VQAV2 = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"
OKVQA = "OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"


def gqa(folder: Path, pictures: int, questions: int) -> None:
    rows = (
        (
            f"{n:08d}",
            {
                "semantic": [{"operation": "select", "dependencies": [], "argument": "thing (1)"}],
                "question": f"Is {n} here?",
                "imageId": str(n % pictures) if n % pictures % 5 else f"n{n % pictures}",
                "isBalanced": True,
                "groups": {"global": None, "local": "x"},
                "answer": "no",
                "types": {"detailed": "existC", "semantic": "obj", "structural": "verify"},
                "fullAnswer": "No, it is not.",
            },
        )
        for n in range(questions)
    )
    write_object(folder / "train_balanced_questions.json", rows)


def ocrvqa(folder: Path, pictures: int, train: int) -> None:
    """train: how many of the pictures are of the train split."""
    rows = (
        (
            f"{n:010d}",
            {
                "imageURL": f"http://images-amazon.com/images/P/{n:010d}.jpg",
                "questions": [
                    "Who wrote this book?",
                    "What is the title of this book?",
                    "Is it new?",
                ],
                "answers": [f"Author {n}", f"Title {n}", "No"],
                "title": f"Title {n}",
                "authorName": f"Author {n}",
                "genre": "Travel",
                "split": 1 if n < train else 2 + n % 2,
            },
        )
        for n in range(pictures)
    )
    write_object(folder / "dataset.json", rows)


def aokvqa(folder: Path, pictures: int, questions: int) -> None:
    rows = (
        {
            "split": "train",
            "image_id": n % pictures,
            "question_id": f"q{n}",
            "question": f"What is {n}?",
            "choices": ["man", "dog", "bus", "tree"],
            "correct_choice_idx": n % 4,
            "direct_answers": ["man"] * 10,
            "difficult_direct_answer": False,
            "rationales": ["It is."] * 3,
        }
        for n in range(questions)
    )
    write_list(folder / "aokvqa_v1p0_train.json", rows)


def textcaps(folder: Path, pictures: int) -> None:
    captions = (
        {
            "image_id": f"{n:016x}",
            "image_path": f"train/{n:016x}.jpg",
            "caption_id": 5 * n + i,
            "caption_str": f"A sign that says {n} {'again ' * i}".strip(),
            "reference_strs": ["A sign."] * 5,
        }
        for n in range(pictures)
        for i in range(5)
    )
    words = (
        {"image_id": f"{n:016x}", "ocr_tokens": ["STOP", str(n)], "ocr_info": []}
        for n in range(pictures)
    )
    write_list(folder / "TextCaps_0.1_train.json", captions, "data", dataset_type="train")
    write_list(folder / "TextVQA_Rosetta_OCR_v0.2_train.json", words, "data", dataset_type="train")


def refcoco(
    folder: Path, pictures: int, regions: int, name: str = "refcoco", by: str = "unc"
) -> None:
    """`regions` of each picture, three sentences each; the last picture is of val."""
    sizes = [{"id": n, "width": 640, "height": 480, "file_name": "x.jpg"} for n in range(pictures)]
    boxes, refs = [], []
    for n in range(pictures * regions):
        boxes.append({"id": n, "image_id": n // regions, "bbox": [10.0 + n % 100, 20, 64.0, 48.5]})
        sentences = [
            {"sent_id": 3 * n + i, "raw": f"thing {n} {i}", "sent": f"thing {n} {i}", "tokens": []}
            for i in range(3)
        ]
        split = "val" if n // regions == pictures - 1 else "train"
        refs.append(
            {
                "ref_id": n,
                "ann_id": n,
                "image_id": n // regions,
                "split": split,
                "sentences": sentences,
                "file_name": "COCO_train2014_000000000000_0.jpg",
            }
        )
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    (target / f"refs({by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    data = {"info": {}, "images": sizes, "annotations": boxes, "categories": []}
    (target / "instances.json").write_text(json.dumps(data))


def visual_genome(folder: Path, pictures: int, regions: int) -> None:
    images = (
        {
            "image_id": n + 1,
            "url": f"https://cs.stanford.edu/people/rak248/VG_100K{'_2' if n % 2 else ''}/{n + 1}.jpg",
            "width": 800,
            "height": 600,
            "coco_id": None,
            "flickr_id": None,
        }
        for n in range(pictures)
    )

    def of(n: int) -> list[dict[str, Any]]:
        return [
            {
                "region_id": n * 1000 + i,
                "image_id": n + 1,
                "x": 10 * i % 700,
                "y": 5,
                "width": 80,
                "height": 60,
                "phrase": f"region {i} of {n}",
            }
            for i in range(regions)
        ]

    write_list(folder / "image_data.json", images)
    write_list(
        folder / "region_descriptions.json",
        ({"id": n + 1, "regions": of(n)} for n in range(pictures)),
    )


def sharegpt(folder: Path, conversations: int) -> None:
    rows = (
        {
            "id": f"abc{n // 2}_{n % 2}",  # every second one goes on with the one before
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": f"Hello {n}"},
                {"from": "human", "value": "and?"},
            ],
        }
        for n in range(2 * conversations)
    )
    write_list(folder / "ShareGPT_V3_unfiltered_cleaned_split.json", rows)


def llava(path: Path, count: int) -> None:
    rows = (
        {
            "id": f"{n:012d}",
            "image": f"{n:012d}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is this?"},
                {"from": "gpt", "value": f"Number {n}."},
            ],
        }
        for n in range(count)
    )
    write_list(path, rows)


def scienceqa(folder: Path, count: int) -> None:
    problems = (
        (
            str(n),
            {
                "question": f"Which is {n}?",
                "choices": ["one", "two", "three"],
                "answer": n % 3,
                "hint": "" if n % 2 else "Look at it.",
                "image": "image.png" if n % 2 else None,
                "split": "train",
                "lecture": "Numbers\ncount." if n % 3 else "",
                "solution": f"It is {n}.",
            },
        )
        for n in range(count)
    )
    write_object(folder / "problems.json", problems)
    ids = [str(n) for n in range(count)]
    (folder / "pid_splits.json").write_text(json.dumps({"train": ids[:-1], "test": ids[-1:]}))


SMALL: dict[str, Callable[[Path], Any]] = {
    "llava_instruct": lambda f: llava(f / "llava_instruct_150k.json", 4),
    "sharegpt": lambda f: sharegpt(f, 3),
    "vqav2": lambda f: vqa(f, VQAV2, 3, 7),
    "gqa": lambda f: gqa(f, 6, 13),
    "okvqa": lambda f: vqa(f, OKVQA, 3, 4),
    "ocrvqa": lambda f: ocrvqa(f, 12, 8),
    "aokvqa": lambda f: aokvqa(f, 3, 4),
    "textcaps": lambda f: textcaps(f, 3),
    "refcoco": lambda f: [
        refcoco(f, 3, 4, name, by)
        for name, by in (("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd"))
    ],
    "visual_genome": lambda f: visual_genome(f, 3, 14),
    "scienceqa": lambda f: scienceqa(f, 7),
}
"""Set -> what writes its small files into a folder."""


def small(raw: Path) -> Path:
    """The small files of all sets, a folder each."""
    for name, make in SMALL.items():
        make(raw / name)
    return raw
