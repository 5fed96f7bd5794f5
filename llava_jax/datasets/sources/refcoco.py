"""RefCOCO, RefCOCO+ and RefCOCOg, train: regions of a picture, in conversations of under ten turns.

The paper dissects conversations into segments of fewer than ten turns (arXiv 2310.03744, appendix).
Each sentence about a region is one turn. Which of the three
sets it took, how they were merged and ordered is not published: here the sentences of all sets about
a picture are shuffled together, which records of the published file look like.
"""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from llava_jax.datasets.boxes import from_corner
from llava_jax.datasets.source import File, Record, Source, about_image, check_names
from llava_jax.datasets.sources.regions import region_pair
from llava_jax.errors import ConfigError, SampleError

TURNS = 9
URL = "https://github.com/lichengunc/refer"


@dataclass(kw_only=True)
class RefCOCO(Source):
    """refs: which of the three sets."""

    name = "refcoco"
    published = 48_447
    files: ClassVar = {
        "refcoco": File("refcoco/refs(unc).p", URL),
        "refcoco+": File("refcoco+/refs(unc).p", URL),
        "refcocog": File("refcocog/refs(umd).p", URL),
    }

    image: str = "coco/train2017/{:012d}.jpg"
    refs: tuple[str, ...] = ("refcoco", "refcoco+", "refcocog")

    def __post_init__(self):
        check_names(self.refs, "refcoco: refs")
        if unknown := set(self.refs) - set(self.files):
            raise ConfigError(f"refcoco: refs has {min(unknown)!r}, not {', '.join(self.files)}")

    def inputs(self) -> list[Path]:
        paths = [self.path(name) for name in self.refs]
        return paths + [path.with_name("instances.json") for path in paths]

    def records(self) -> Iterator[Record]:
        of: defaultdict[int, list[tuple[str, Any]]] = defaultdict(list)
        sizes: dict[int, tuple[int, int]] = {}
        for path in map(self.path, self.refs):
            self._read(path, of, sizes)
        for image_id, said in of.items():
            self.at = f"image_id {image_id!r}"
            rng = random.Random(f"{self.seed} refcoco {image_id}")
            rng.shuffle(said)
            made = [region_pair(text, box, *sizes[image_id], rng) for text, box in said]
            pairs = [pair for pair in made if pair]
            self.skipped["no area or no text"] += len(made) - len(pairs)
            for n, at in enumerate(range(0, len(pairs), TURNS)):
                name = f"refcoco_{image_id}_{n}"
                yield about_image(name, self.image_path(image_id), pairs[at : at + TURNS])

    def _read(self, path: Path, of: dict[int, list], sizes: dict[int, tuple[int, int]]) -> None:
        """Takes the sentences of train, with boxes in pixels, and sizes of pictures, from one set."""
        refs = [ref for ref in read_refs(path) if ref["split"] == "train"]
        instances = path.with_name("instances.json")
        wanted, boxes = {ref["ann_id"] for ref in refs}, {}
        for kind, row in self.entries(instances):
            if kind == "images":
                sizes[row["id"]] = row["width"], row["height"]
            elif kind == "annotations" and row["id"] in wanted:
                boxes[row["id"]] = from_corner(row["bbox"])
        for ref in refs:
            self.at = f"{path.name}[ref_id {ref['ref_id']}]"
            box = boxes[ref["ann_id"]]
            of[ref["image_id"]] += [(s.get("raw") or s["sent"], box) for s in ref["sentences"]]


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a refs file")


def read_refs(path: Path) -> list[dict[str, Any]]:
    """The refs of the owner's pickle, which holds only dicts, lists, strings and numbers.

    Raises SampleError for one that holds anything else: a pickle can run code.
    """
    try:
        with path.open("rb") as file:
            return _Plain(file, encoding="utf-8").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError) as e:
        raise SampleError(f"{path}: not a refs pickle ({e})") from None


SOURCE = RefCOCO
