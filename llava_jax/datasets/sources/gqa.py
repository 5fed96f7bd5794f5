"""GQA, the balanced questions of train: those of a picture are one conversation, in the file's order."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.prompts import SHORT
from llava_jax.datasets.source import File, Record, Source, about_image, asked, capital


@dataclass(kw_only=True)
class GQA(Source):
    name = "gqa"
    published = 72_140
    files: ClassVar = {
        "questions": File(
            "train_balanced_questions.json",
            "https://cs.stanford.edu/people/dorarad/gqa/download.html",
        )
    }

    image: str = "gqa/images/{}.jpg"
    prompt: str = SHORT

    def records(self) -> Iterator[Record]:
        of: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        for _, row in self.entries(self.path("questions")):
            of[row["imageId"]].append((asked(row["question"]), capital(row["answer"])))
        for image_id, pairs in of.items():
            self.at = f"{self.path('questions').name}[imageId {image_id!r}]"
            yield about_image(f"gqa_{image_id}", self.image_path(image_id), pairs, self.prompt)


SOURCE = GQA
