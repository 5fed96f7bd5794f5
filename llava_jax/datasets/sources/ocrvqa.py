"""OCR-VQA, train: the questions about a cover are one conversation; a recipe draws 80,000 of them.

Answers are as the owner wrote them. Many of the covers' addresses are dead (LLaVA issue 1618):
`llava-jax data check --clean` leaves out those that are not on disk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.prompts import SHORT
from llava_jax.datasets.source import File, Record, Source, about_image, asked

TRAIN = 1  # of `split`: 1 train, 2 validation, 3 test


@dataclass(kw_only=True)
class OCRVQA(Source):
    name = "ocrvqa"
    published = 80_000
    files: ClassVar = {"dataset": File("dataset.json", "https://ocr-vqa.github.io")}

    image: str = "ocr_vqa/images/{}.jpg"
    prompt: str = SHORT

    def records(self) -> Iterator[Record]:
        for key, row in self.entries(self.path("dataset")):
            if row["split"] != TRAIN:
                continue
            pairs = [
                (asked(question), answer.strip())
                for question, answer in zip(row["questions"], row["answers"], strict=True)
                if answer.strip()
            ]
            if pairs:
                yield about_image(key, self.image_path(key), pairs, self.prompt)
            else:
                self.skipped["no answer"] += 1


SOURCE = OCRVQA
