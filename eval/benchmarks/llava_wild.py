"""LLaVA-Bench (in the wild): 60 questions on 24 images, judged against GPT-4's answers.

Judge and summary: LLaVA eval_gpt_review_bench.py (gpt-4-0314, temperature 0.2) and
summarize_gpt_review.py. Numbers of different judges are not comparable.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.eval.files import find
from llava_jax.eval.judge.reviews import requests, score_reviews
from llava_jax.eval.questions import Question, llava_questions
from llava_jax.eval.task import DEFAULT, Result, Task, TaskSettings


class LlavaWild(Task):
    name = "llava_wild"
    headline = "all"
    max_new_tokens = 1024
    judge = True
    boxes = False
    prefix = "llava_bench_"
    files = ("questions.jsonl", "*questions.jsonl")
    data_files = "questions.jsonl, context.jsonl, answers_gpt4.jsonl, rule.json (to judge)"

    def questions(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Question]:
        return llava_questions(find(data, self.files, "questions file"), ("*",)) or []

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        """Summarises a file of stored reviews."""
        return score_reviews(self, answers, data, settings)

    def requests(self, answers: Path, data: Path) -> Iterator[tuple[dict[str, Any], str]]:
        """(review row, judge's message) per question; all must be answered."""
        return requests(answers, data, boxes=self.boxes, prefix=self.prefix)


TASK = LlavaWild()
