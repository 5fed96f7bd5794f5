"""Questions: what a benchmark asks a model, from LLaVA's own question files or made from the owner's."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_jax.eval.files import ID, expect, find_optional, read_rows

# Appended prompts of LLaVA-1.5 (paper Table 8, scripts/v1_5/eval).
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a benchmark.

    key: unique within the task, stable between runs (a resumed run goes by it).
    prompt: the user's words. The model sees "<image>\\n" before them, once, if there are images.
    images: file names under the image folder, or bytes of an encoded image.
    record: what the answer row holds besides `text` (question_id, prompt, …).
    """

    key: str
    prompt: str
    images: tuple[str | bytes, ...]
    record: dict[str, Any]


def question(
    number: Any, prompt: str, /, *images: str | bytes, key: str | None = None, **record: Any
) -> Question:
    """A question whose answer row holds its id, its prompt, and `record`. key: by default the id."""
    record = {"question_id": number, "prompt": prompt, **record}
    return Question(str(number) if key is None else key, prompt, images, record)


def same_question(first: str, second: str) -> bool:
    """Whether two prompts may be of one question: the first line of one is in the other."""
    asked = [t.replace("<image>", " ").strip().lower() for t in (first, second)]
    heads = [" ".join(t.split("\n")[0].split()) for t in asked]
    one, two = (" ".join(t.split()) for t in asked)
    return heads[0] in two or heads[1] in one


def numbered(key: str, seen: Counter[str]) -> str:
    """`key`, or "key#2", … where `seen` has it already; counts it."""
    seen[key] += 1
    return key if seen[key] == 1 else f"{key}#{seen[key]}"


def llava_questions(
    data: Path, patterns: Sequence[str], split: str | None = None
) -> list[Question] | None:
    """The questions of one of LLaVA's own question files (jsonl: question_id, image, text,
    category), or None where there is none. The key is the id, with "#2", … where ids repeat."""
    path = find_optional(data, patterns, "question file of LLaVA", split)
    if path is None:
        return None
    seen: Counter[str] = Counter()
    questions = []
    for line, row in read_rows(path):
        optional = {n: str for n in ("image", "category") if row.get(n) is not None}
        expect(row, f"{path} line {line}", {"question_id": ID, "text": str, **optional})
        images = (row["image"],) if row.get("image") else ()
        more = {"category": row["category"]} if "category" in row else {}
        key = numbered(str(row["question_id"]), seen)
        questions.append(question(row["question_id"], row["text"], *images, key=key, **more))
    return questions
