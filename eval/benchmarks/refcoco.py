"""RefCOCO / RefCOCO+ / RefCOCOg: where is what the expression names? Right if IoU >= 0.5.

Not in the LLaVA-1.5 paper. Scorer: lmms-eval refcoco/utils_rec.py: the first "[x1, y1, x2, y2]" of
the answer, as fractions of the image, else the box [0, 0, 0, 0].
"""

import pickle
import re
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, by_id, find, find_optional, read_checked
from llava_jax.eval.questions import Question, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, percent
from llava_jax.reader import is_number
from llava_jax.util import read_json

Box = list[float]
# The words LLaVA-1.5 was trained on for this (llava_v1_5_mix665k).
PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: {}."
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
_NUMBER = r"\s*(-?\d+(?:\.\d+)?)"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\s*\]")


class RefCoco(Task):
    name = "refcoco"
    headline = "acc@0.5"
    data_files = "refs(unc).p, or refs(umd).p (--set refs=umd), with instances.json; or jsonl with bbox_xyxy_norm"
    id_keys = ("question_id", "id")
    takes_split = True
    options = ("refs",)

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        truth = _read_truth(data, settings).items()
        return [question(i, PROMPT.format(r["expression"]), r["image"]) for i, r in truth]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        truth = _read_truth(data, settings)
        asked = {key: row["expression"] for key, row in truth.items()}
        joined, coverage = self.join(truth, answers, settings, asked=asked)
        samples = {}
        for key, row in truth.items():
            box = read_box(joined.text(key))
            overlap = iou(row["box"], box)
            center = key in joined and center_inside(row["box"], box)
            samples[key] = Sample(
                float(overlap >= 0.5), joined.text(key), row["box"], box, row["expression"], row["image"],
                details={"iou": overlap, "center": center},
            )  # fmt: skip
        overlaps = [s.details["iou"] for s in samples.values()]
        totals = {f"acc@{t}": percent(float(x >= t) for x in overlaps) for t in THRESHOLDS}
        totals["mean_iou"] = percent(overlaps)
        totals["center_acc"] = percent(float(s.details["center"]) for s in samples.values())
        return Result(self, totals, samples, coverage)


def _read_truth(data: Path, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    """Question id -> expression, box (x1, y1, x2, y2 as fractions of the image) and image."""
    refs = find_optional(data, ("refs(*).p",), "refs file", settings.options.get("refs"))
    if refs is not None:
        return _from_refs(refs, data, settings.split or "val")
    path = find(data, ("samples.jsonl", "*refcoco*.json*"), "samples file")
    truth = {}
    rows = read_checked(path, {"id": ID, "expression": str, "bbox_xyxy_norm": list})
    for key, r in by_id(rows, "id", path).items():
        box = r["bbox_xyxy_norm"]
        if len(box) != 4 or not all(map(is_number, box)):
            raise DataError(f"{path}: {r['id']}: {box!r} is not a box of four numbers")
        if not (box[0] < box[2] and box[1] < box[3] and min(box) >= -0.1 and max(box) <= 1.1):
            what = "is empty, or not fractions of the image"
            raise DataError(f"{path}: {r['id']}: the box {box} {what}, which no answer can meet")
        image = str(r.get("image", ""))
        truth[key] = {"expression": r["expression"], "box": box, "image": image}
    return truth


def read_box(text: str) -> Box:
    """The first four numbers in square brackets, or four zeros."""
    match = _BOX.search(text)
    return [float(x) for x in match.groups()] if match else [0, 0, 0, 0]


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two x1, y1, x2, y2 boxes; 0.0 where the union has no area."""
    wide, high = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0, wide) * max(0, high)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union else 0.0


def center_inside(truth: Box, box: Box) -> bool:
    """Whether the centre of `box` lies in `truth`."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return truth[0] <= x <= truth[2] and truth[1] <= y <= truth[3]


class _PlainUnpickler(pickle.Unpickler):
    """Reads the owners' pickles, which hold only dicts, lists and strings; refuses all else."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a refs file")


def _from_refs(path: Path, data: Path, split: str) -> dict[str, dict[str, Any]]:
    """One question per sentence of the refs of `split` (val, testA, testB, test)."""
    try:
        with open(path, "rb") as f:
            refs = _PlainUnpickler(f, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, ValueError) as e:
        raise DataError(f"{path}: not a refs pickle ({e})") from None
    where = find(data, ("instances.json", "instances*.json"), "instances file")
    instances = read_json(where, DataError)
    sizes = {i["id"]: i for i in instances["images"]}
    boxes = {a["id"]: a["bbox"] for a in instances["annotations"]}
    truth = {}
    for ref in refs:
        if ref["split"] != split:
            continue
        image = sizes[ref["image_id"]]
        x, y, w, h = boxes[ref["ann_id"]]
        width, height = image["width"], image["height"]
        box = [x / width, y / height, (x + w) / width, (y + h) / height]
        row = {"box": box, "image": image["file_name"]}
        for sentence in ref["sentences"]:
            truth[str(sentence["sent_id"])] = {"expression": sentence["raw"], **row}
    if truth:
        return truth
    raise DataError(f"{path}: no refs of split {split!r}", fix="--split val, testA, testB or test")
