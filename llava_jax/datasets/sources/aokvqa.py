"""A-OKVQA, train, as multiple choice: each picture k times, where k is its number of choices.

The paper repeats each question k times to balance out how few multiple-choice questions there are
(arXiv 2310.03744, appendix; 16,540 pictures x 4 = 66,160). Which order the choices have each time is
not published: here they are rotated by one, so the right letter is each of the letters once.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar

from llava_jax.datasets.prompts import LETTER
from llava_jax.datasets.source import File, Record, Source, about_image, asked


@dataclass(kw_only=True)
class AOKVQA(Source):
    name = "aokvqa"
    published = 66_160
    files: ClassVar = {
        "train": File("aokvqa_v1p0_train.json", "https://allenai.org/project/a-okvqa/home")
    }

    image: str = "coco/train2017/{:012d}.jpg"
    prompt: str = LETTER

    def records(self) -> Iterator[Record]:
        of: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows(self.path("train")):
            of[row["image_id"]].append(row)
        for image_id, questions in of.items():
            self.at = f"{self.path('train').name}[image_id {image_id!r}]"
            for turn in range(max(len(q["choices"]) for q in questions)):
                pairs = [rotated(q, turn) for q in questions]
                name = f"aokvqa_{image_id}_{turn}"
                yield about_image(name, self.image_path(image_id), pairs, self.prompt)


def rotated(row: dict[str, Any], by: int) -> tuple[str, str]:
    """(question with its choices, letter of the right one); the choices begin with number `by`."""
    choices, right = row["choices"], row["correct_choice_idx"]
    count = len(choices)
    if not 0 <= right < count:
        raise ValueError(f"correct_choice_idx is {right} of {count} choices")
    lines = [f"{ascii_uppercase[i]}. {choices[(i + by) % count]}" for i in range(count)]
    return "\n".join([asked(row["question"]), *lines]), ascii_uppercase[(right - by) % count]


SOURCE = AOKVQA
