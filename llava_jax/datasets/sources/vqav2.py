"""VQAv2, train2014: the questions of a picture are one conversation.

Answer: the owner's multiple_choice_answer, the most frequent of ten; LLaVA's rule is not published
(LLaVA issues 1283 and 1632). Order: that of the annotations.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax.datasets.prompts import SHORT
from llava_jax.datasets.source import File, Record, Source, about_image, asked, capital

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
        texts: dict[int, str] = {}
        for q in self.rows(self.path("questions"), "questions"):
            if texts.setdefault(q["question_id"], text := asked(q["question"])) is not text:
                raise ValueError(f"question_id {q['question_id']} is there twice")
        of: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
        answered: set[int] = set()
        for row in self.rows(self.path("annotations"), "annotations"):
            if (question := texts.get(row["question_id"])) is None:
                raise ValueError(f"there is no question with question_id {row['question_id']}")
            if row["question_id"] in answered:
                raise ValueError(f"question_id {row['question_id']} has two annotations")
            answered.add(row["question_id"])
            of[row["image_id"]].append((question, capital(self.answer(row))))
        self.skipped["question without annotation"] += len(texts) - len(answered)
        for image_id, pairs in of.items():
            self.at = f"{self.path('annotations').name}[image_id {image_id!r}]"
            name = f"{self.name}_{image_id}"
            yield about_image(name, self.image_path(image_id), pairs, self.prompt)

    def answer(self, row: dict[str, Any]) -> str:
        """What is trained of an annotation."""
        return row["multiple_choice_answer"]


SOURCE = VQAv2
