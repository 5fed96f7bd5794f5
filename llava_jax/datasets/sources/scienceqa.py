"""ScienceQA as LLaVA trains it: QCM-LEA, question, context and options to lecture, solution, answer.

Form: scripts/convert_sqa_to_llava.py of the original, with which it was compared: double spaces become
one, once; a backslash and n in lecture or solution is a line break; the tag stands after the question.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, ClassVar

from llava_jax.datasets.source import File, Record, Source, asked, conversation
from llava_jax.errors import SampleError

URL = "https://scienceqa.github.io"


@dataclass(kw_only=True)
class ScienceQA(Source):
    """split: train, val, test, minival or trainval."""

    name = "scienceqa"
    published = 12_726
    files: ClassVar = {
        "problems": File("problems.json", URL),
        "splits": File("pid_splits.json", URL),
    }

    image: str = "{id}/{file}"
    split: str = "train"

    def records(self) -> Iterator[Record]:
        ids = [pid for split, pid in self.entries(self.path("splits")) if split == self.split]
        if not ids:
            raise SampleError(f"{self.path('splits')}: there is no split {self.split!r}")
        wanted = set(ids)
        problems = {k: p for k, p in self.entries(self.path("problems")) if k in wanted}
        for pid in ids:
            self.at = f"problems.json[{pid!r}]"
            problem = problems[pid]
            question, answer = qcm_lea(problem)
            record: Record = {"id": pid}
            if problem["image"]:
                record["image"] = self.image_path(id=pid, file=problem["image"])
                question = f"{question}\n<image>"
            yield record | {"conversations": conversation([(question, answer)])}


def qcm_lea(problem: dict[str, Any]) -> tuple[str, str]:
    """(question, answer) of a problem."""
    options = " ".join(f"({a}) {c}" for a, c in zip(ascii_uppercase, problem["choices"]))
    context = problem["hint"].strip() or "N/A"
    question = f"Question: {asked(problem['question'])}\nContext: {context}\nOptions: {options}"
    lecture, solution = (problem[k].replace("\\n", "\n") for k in ("lecture", "solution"))
    right, count = problem["answer"], len(problem["choices"])
    if type(right) is not int or not 0 <= right < count:
        raise ValueError(f"answer is {right!r} of {count} choices")
    letter = ascii_uppercase[right]
    answer = f"{lecture} {solution} The answer is {letter}."
    return _tidy(question, "Question: "), _tidy(f"Answer: {answer}", "Answer: ")


def _tidy(text: str, title: str) -> str:
    """As the original's scripts leave it: the title goes, wherever it stands, if the text begins with it."""
    text = text.replace("  ", " ").strip()
    return text.replace(title, "") if text.startswith(title) else text


SOURCE = ScienceQA
