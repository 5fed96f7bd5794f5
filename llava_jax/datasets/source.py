"""What a set is to the builder: files of its owner, and records made of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from llava_jax.data.records import check_path
from llava_jax.datasets import stream
from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.util import Doubled

Record = dict[str, Any]
Pairs = Sequence[tuple[str, str]]
"""Questions with their answers."""


class File(NamedTuple):
    """A file of the owner: its path below the set's folder, and the page it comes from."""

    path: str
    url: str


@dataclass(kw_only=True)
class Source:
    """One set. A new one is a file with a class of this kind, called SOURCE, that has `records`.

    Fields are what a recipe may set; the ones of a subclass come on top of these:
    folder: where the owner's files are. seed: of what is drawn. image: how a picture's path below
    the image folder is written, a format string. prompt: the response-format prompt.
    """

    name: ClassVar[str]
    published: ClassVar[int | None] = None
    """How many records of it LLaVA-1.5 was trained on (haotian-liu/LLaVA issue 702)."""
    files: ClassVar[Mapping[str, File]] = {}

    folder: Path
    seed: int = 0
    image: str = ""
    prompt: str = ""

    skipped: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    at: str = field(default="", init=False, repr=False)
    told: stream.Told | None = field(default=None, init=False, repr=False)

    def records(self) -> Iterator[Record]:
        """The records, in an order that depends on files and seed alone.

        `skipped` counts what was left out, by reason.
        """
        raise NotImplementedError

    def path(self, which: str) -> Path:
        """The owner's file `which` of `files`. Raises SampleError that says where to get it."""
        file = self.files[which]
        path = self.folder / file.path
        if not path.exists():
            raise SampleError(f"{self.name}: no such file {path}", fix=f"get it from {file.url}")
        return path

    def inputs(self) -> list[Path]:
        """All files that are read."""
        return [self.path(which) for which in self.files]

    def image_path(self, *values: Any, **named: Any) -> str:
        """`image` with what names a picture. Raises ValueError for a value that it does not take."""
        try:
            return self.image.format(*values, **named)
        except (ValueError, TypeError, LookupError, AttributeError) as e:
            given = ", ".join(f"{v!r:.60}" for v in (*values, *named.values()))
            raise ValueError(f"image = {self.image!r} does not take {given} ({e})") from None

    def rows(self, path: Path, key: str | None = None) -> Iterator[Any]:
        """`stream.rows` of a file; an error about a row then names it."""
        for n, row in enumerate(stream.rows(path, key, told=self.told, doubled=True)):
            self.at = f"{path.name}[{n}]"
            yield _once(row)

    def entries(self, path: Path) -> Iterator[tuple[str, Any]]:
        """`stream.entries` of a file; an error about an entry then names it."""
        for key, value in stream.entries(path, told=self.told):
            self.at = f"{path.name}[{key!r}]"
            yield key, _once(value)


def _once(row: Any) -> Any:
    if isinstance(row, Doubled):
        raise ValueError(f"the key {row.key!r} is duplicated")
    return row


def placed(form: str, image: Any) -> str | list[str]:
    """The path or paths of a record, each written by the format string `form`.

    Raises SampleError for an address or a path that leaves its folder: behind a folder neither is seen.
    """
    if isinstance(image, list):
        return [str(placed(form, one)) for one in image]
    if not isinstance(image, str):
        raise ValueError(f"a picture is {image!r:.60}, not a path")
    check_path(image, "of this place")
    return form.format(image)


def check_names(values: tuple[Any, ...], where: str) -> None:
    """Raises ConfigError where a list of a recipe holds anything but names, or one of them twice."""
    if not all(isinstance(value, str) and value for value in values):
        raise ConfigError(f"{where} is {list(values)!r:.60}, not a list of names")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise ConfigError(f"{where} has {twice!r} twice", fix="weight says how often")


def asked(question: Any) -> str:
    """A question that is a text. Raises ValueError for null and other values."""
    if not isinstance(question, str):
        raise ValueError(f"a question is {question!r:.60}, not a text")
    return question


def conversation(pairs: Pairs) -> list[dict[str, str]]:
    """Questions and answers as turns of a record. Raises ValueError for what is no text."""
    for _, answer in pairs:
        if not isinstance(answer, str):
            raise ValueError(f"an answer is {answer!r:.60}, not a text")
    roles = ("human", "gpt")
    return [
        {"from": who, "value": text} for q, a in pairs for who, text in zip(roles, (asked(q), a))
    ]


def about_image(id_: str, image: str, pairs: Pairs, prompt: str = "") -> Record:
    """A record about one picture: the tag stands before the first question.

    prompt: stands behind the first question and not again, as in the published file, where the
    questions about a picture are one conversation.
    """
    question, answer = asked(pairs[0][0]), pairs[0][1]
    first = f"{IMAGE_TAG}\n{question}\n{prompt}" if prompt else f"{IMAGE_TAG}\n{question}"
    return {"id": id_, "image": image, "conversations": conversation([(first, answer), *pairs[1:]])}


def capital(text: Any) -> str:
    """A text with a capital at its start, as all short answers of the published file have it.

    Raises ValueError for what is no text.
    """
    if not isinstance(text, str):
        raise ValueError(f"an answer is {text!r:.60}, not a text")
    text = text.strip()
    return text[:1].upper() + text[1:]


def sentence(text: str) -> str:
    """A text with a capital at its start and a full stop, as the published file has descriptions."""
    text = capital(text)
    return text if text.endswith((".", "!", "?")) else f"{text}."
