"""VQAv2, train2014: the questions of a picture are one conversation.

Answer: the owner's multiple_choice_answer, the most frequent of ten; LLaVA's rule is not published
(LLaVA issues 1283 and 1632). Order: that of the annotations.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax.datasets.prompts import SHORT
from llava_jax.datasets.source import File, Record, Source, about_image, capital

URL = "https://visualqa.org/download.html"


@dataclass(kw_only=True)
class VQAv2(Source):
    """VQAv2 and whatever is in its format: OK-VQA is a subclass."""

    name = "vqav2"
    published = 82_783
    files: ClassVar = {
        "questions": File("v2_OpenEnded_mscoco_train2014_questions.json", URL),
        "annotations": File("v2_mscoco_train2014_annotations.json", URL),
    }

    image: str = "coco/train2017/{:012d}.jpg"
    prompt: str = SHORT

    def records(self) -> Iterator[Record]:
        texts = {
            q["question_id"]: q["question"] for q in self.rows(self.path("questions"), "questions")
        }
        of: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
        for row in self.rows(self.path("annotations"), "annotations"):
            pair = texts[row["question_id"]], capital(self.answer(row))
            of[row["image_id"]].append(pair)
        for image_id, pairs in of.items():
            yield about_image(
                f"{self.name}_{image_id}", self.image.format(image_id), pairs, self.prompt
            )

    def answer(self, row: dict[str, Any]) -> str:
        """What is trained of an annotation."""
        return row["multiple_choice_answer"]


SOURCE = VQAv2
