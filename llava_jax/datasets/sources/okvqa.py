"""OK-VQA, train2014, in the format of VQAv2.

Answer: the most frequent `answer` of the ten (the form that the owner's scorer compares), the first
of those that are equally frequent; the owner names no main answer and LLaVA's rule is not published.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from llava_jax.datasets.source import File
from llava_jax.datasets.sources.vqav2 import VQAv2

URL = "https://okvqa.allenai.org/download.html"


@dataclass(kw_only=True)
class OKVQA(VQAv2):
    name = "okvqa"
    published = 8_998
    files: ClassVar = {
        "questions": File("OpenEnded_mscoco_train2014_questions.json", URL),
        "annotations": File("mscoco_train2014_annotations.json", URL),
    }

    def answer(self, row: dict[str, Any]) -> str:
        return Counter(a["answer"] for a in row["answers"]).most_common(1)[0][0]


SOURCE = OKVQA
