"""MathVista (testmini: 1,000 questions; options, whole numbers, decimals and lists).

Owner's rule: lupantech/MathVista@53d5258 evaluation/extract_answer.py and calculate_score.py. A model extracts the answer
from the reply; what needs none is taken first (a reply that is an option or a number, and with the owner's
--quick_extract 'The answer is "X".'). Options: "(B)" or B is that option, else the option of the
smallest edit distance, the first of equals, so that even "" gets an option (the shortest). Whole
numbers are cut, not rounded ("2.9" is 2); decimals are rounded to `precision`. A reply that only a
model could read is read as it stands; `eval extract` has one extract it.
"""

import re
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import SHORT
from llava_jax.eval.rules import LETTERS, levenshtein
from llava_jax.eval.simple import Item, SimpleTask, choices

_QUICK = re.compile(r'The answer is "(.*)"\.')
_LETTER = re.compile(r"\(([a-zA-Z])\)")


class MathVista(SimpleTask):
    name = "mathvista"
    free_answers = True
    data_files = "testmini.json with images/, or testmini-*.parquet of AI4Math/MathVista"
    files = ("testmini*.json", "testmini*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        meta = row.get("metadata") or {}
        options = truths.options(row["choices"]) if row["question_type"] == "multi_choice" else ()
        image = row.get("decoded_image") or row["image"]
        precision = row.get("precision")
        asked = row["question"] + (f" (Unit: {row['unit']})" if row.get("unit") else "")
        prompt = choices(asked, options) if options else asked + SHORT
        kind, truth = row["answer_type"], truths.text(row["answer"])
        groups = {"answer_type": kind, "precision": str(int(precision or 0))}
        groups |= {k: str(meta[k]) for k in ("task", "category", "grade") if k in meta}
        key = str(row.get("pid") or row.get("id") or number)
        if truth is not None and options and truth not in options:
            raise ValueError(f"the answer {truth!r} is none of the choices")
        if truth is not None and not options and kind in ("integer", "float"):
            (int if kind == "integer" else float)(truth)  # ValueError where it is none
        return Item(key, prompt, truth, (image,), options, groups)

    def letters(self, item: Item) -> str:
        return ""  # what a model extracts is read by the owner's rule, and is no letter

    def inferred(self, text: str, item: Item) -> str | None:
        read = extracted(text, item)
        return text if read is None and not text.strip() else read

    def judged(self, text: str, item: Item) -> tuple[float, Any]:
        found = extracted(text, item)
        read = normalized(text if found is None else found, item)
        return float(read is not None and read == item.truth), read

    def result(self, items, samples, result):
        result = super().result(items, samples, result)
        result.tables.pop("per precision", None)
        return result


def extracted(text: str, item: Item) -> str | None:
    """The answer in a reply, by the rules that need no model; None where one is needed."""
    if text in item.options:
        return text
    kind = {"integer": int, "float": float}.get(item.groups["answer_type"])
    try:
        if kind:
            return str(kind(text))
    except (ValueError, OverflowError):
        pass
    found = _QUICK.search(text)
    return found[1] if found else None


def normalized(text: str, item: Item) -> str | None:
    """The extracted answer in the form of the truth; None where it is no number."""
    if item.options:
        text = text.strip()
        if found := _LETTER.findall(text):
            text = found[0].upper()
        if text in tuple(LETTERS[: len(item.options)]):
            return item.options[LETTERS.index(text)]
        return min(item.options, key=lambda o: levenshtein(text, o))
    kind = item.groups["answer_type"]
    try:
        if kind == "integer":
            return str(int(float(text)))
        return str(round(float(text), int(item.groups["precision"]))) if kind == "float" else text
    except (ValueError, OverflowError):
        return None
