"""What an evaluation asks and shows, to find it in training data: its questions, as text, and its pictures."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.datasets import prompts, stream
from llava_jax.errors import LlavaError
from llava_jax.images.decode import format_of
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.util import refuse_special

WORDS = 8
"""A question is looked for from so many words on: short ones are everybody's."""
_TEXTS = {".json", ".jsonl", ".ndjson", ".csv", ".tsv"}
_PROMPTS = re.compile(
    "|".join(
        re.escape(text.removeprefix("Please ").lower())
        for text in (prompts.SHORT, prompts.LETTER, prompts.CAPTION)
    )
)
_REGION = prompts.REGION.removeprefix("Please ").partition(":")[0].lower()  # then a box, no words
_TITLE = re.compile(r"\s*(question|q|human|user)\s*:", re.IGNORECASE)


class Files(NamedTuple):
    """Files of an evaluation: texts with questions, and pictures, below `root`."""

    root: Path
    texts: list[Path]
    pictures: list[Path]


def files_of(name: str) -> Files:
    """The files below a folder, or of one that is named. Raises LlavaError where there is nothing.

    A picture is told by its content, a file of questions by its name, unless it is named itself.
    """
    path = Path(name)
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.is_file())
        texts = [p for p in found if p.suffix.lower() in _TEXTS]
        others = [p for p in found if p.suffix.lower() not in _TEXTS]
        return Files(path, texts, [p for p in others if _may_show(p)])
    if not path.exists():
        raise LlavaError(f"--against {name}: no such file or folder")
    refuse_special(path, LlavaError)
    if _may_show(path):
        return Files(path.parent, [], [path])
    return Files(path.parent, [path], [])


def _may_show(path: Path) -> bool:
    """Whether a file is a picture, or is called one."""
    with path.open("rb") as file:
        known = format_of(file.read(64))
    return known is not None or bool(
        re.fullmatch(r"\.(jpe?g|jpe|jfif|png|webp|gif|bmp)", path.suffix, re.IGNORECASE)
    )


def questions_of(path: Path) -> Iterator[str]:
    """The questions of a JSON, JSON lines, CSV or TSV file that are long enough, as `normal` writes them."""
    if path.suffix.lower() in (".csv", ".tsv"):
        csv.field_size_limit(sys.maxsize // 2**32)  # pictures may be inside
        mark = "\t" if path.suffix.lower() == ".tsv" else ","
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            values: Iterable[Any] = (
                [cell for cell in row if " " in cell] for row in csv.reader(file, delimiter=mark)
            )
            for value in values:
                yield from _texts(value)
        return
    for value in stream.rows(path):
        yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from normal(value)
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def normal(text: str) -> Iterator[str]:
    """Each line of a text that may be a question: without tags, titles and format prompts, small letters,
    words alone. A box is none."""
    for line in text.replace(IMAGE_TAG, "\n").split("\n"):
        plain = _PROMPTS.sub(" ", _TITLE.sub("", line, count=1).lower())
        words = re.findall(r"\w+", plain)
        if len(words) >= WORDS and _REGION not in plain:
            yield " ".join(words)
