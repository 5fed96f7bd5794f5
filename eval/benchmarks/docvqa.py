"""DocVQA and InfographicVQA (validation: 5,349 and 2,801 questions; rrc.cvc.uab.es scores the tests).

Owner's rule: ANLS (see rules.anls), the mean over the questions.
"""

from pathlib import Path
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.errors import DataError
from llava_jax.eval.questions import SHORT
from llava_jax.eval.simple import Item, SimpleTask, asked_of
from llava_jax.eval.task import TaskSettings

_TABLES = ("validation*.parquet", "*.parquet", "*.jsonl")


class DocVQA(SimpleTask):
    name = "docvqa"
    headline = "anls"
    rule = "anls"
    data_files = "val_v1.0_withQT.json with documents/, or parquet of lmms-lab/DocVQA"
    files = ("val*.json", "DocVQA/validation*.parquet", *_TABLES, "test*.json")
    image_key = "image"
    other = ("answer_type", "image_url", "image_local_name")  # columns of InfographicVQA
    inside = "data"

    def item(self, row: dict[str, Any], number: int) -> Item:
        key = row["questionId"] if "questionId" in row else row["question_id"]
        if any(name in row for name in self.other):
            raise ValueError("it is of the other of DocVQA and InfographicVQA")
        truth = truths.texts(row.get("answers"))
        kinds = row.get("question_types") or row.get("answer_type") or []
        groups = {"type": ", ".join(kinds)} if kinds else {}
        image = row.get(self.image_key) or row["image"]
        return Item(str(key), row["question"] + SHORT, truth, (image,), groups=groups)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> list[dict[str, Any]]:
        """The server's list: questionId and answer of every question."""
        items = self.items(data, settings)
        keys = [i.key for i in items]
        joined, coverage = self.join(keys, answers, settings, **asked_of(items))
        if absent := coverage.missing:
            raise DataError(f"{answers}: {len(absent)} questions have no answer, first {absent[0]}")
        self.warn_of(coverage)
        pairs = ((int(k) if k.isdigit() else k, joined.text(k)) for k in keys)
        return [{"questionId": i, "answer": text} for i, text in pairs]


class InfoVQA(DocVQA):
    name = "infovqa"
    data_files = "infographicsVQA_val_v1.0_withQT.json with images/, or parquet of lmms-lab/DocVQA"
    files = ("*val*.json", "InfographicVQA/validation*.parquet", *_TABLES, "*test*.json")
    image_key = "image_local_name"
    other = ("ucsf_document_id", "docId")
