"""An Example as readable text: its prompt, and which of its tokens are trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from llava_jax.text.constants import IGNORE, IMAGE_TAG, IMAGE_TOKEN
from llava_jax.text.example import Example
from llava_jax.text.tokenizer import SPACE, Tokenizer
from llava_jax.util import printable

_TRAINED, _IMAGE, _HEAD, _RESET = "\033[1;32m", "\033[36m", "\033[2m", "\033[0m"
_OPEN, _CLOSE = "⟦", "⟧"  # around trained text where there are no colours


def wants_colour(stream=None) -> bool:
    """Whether to colour what goes to `stream` (default stdout): a terminal, and no NO_COLOR."""
    stream = stream or sys.stdout
    return not os.environ.get("NO_COLOR") and getattr(stream, "isatty", bool)()


def show_example(
    example: Example,
    tokenizer: Tokenizer,
    *,
    image_tokens: int = 576,
    colour: bool | None = None,
    table: bool = False,
) -> str:
    """The prompt of an example, trained tokens in green (between ⟦ and ⟧ without colours).

    table: one line per token as well, with position, id, piece, whether trained, and turn.
    colour: None asks `wants_colour`.
    """
    colour = wants_colour() if colour is None else colour
    tokens = _tokens(example)
    head = [
        summary(example, image_tokens),
        *(f"image {i}: {path}" for i, path in enumerate(example.images)),
    ]
    parts = ["\n".join(_paint(printable(line), _HEAD, colour) for line in head)]
    parts.append("".join(_prompt(example, tokenizer, colour)))
    if table:
        parts.append("\n".join(_rows(tokens, tokenizer, image_tokens, colour)))
    return "\n\n".join(parts)


def summary(example: Example, image_tokens: int) -> str:
    """An example in a line: its id, tokens, positions, and how many are trained."""
    tokens = _tokens(example)
    return (
        f"sample {example.id}: {len(tokens)} tokens, {example.length(image_tokens)} positions with "
        f"images, {sum(token.trained for token in tokens)} trained"
    )


class _Token(NamedTuple):
    turn: int
    is_image: bool
    trained: bool
    id: int


def _tokens(example: Example) -> list[_Token]:
    none = np.zeros(len(example.ids), int)
    turns = none if example.turns is None else example.turns
    labels = none + IGNORE if example.labels is None else example.labels
    rows = zip(turns.tolist(), example.ids.tolist(), labels.tolist())
    return [_Token(turn, id_ == IMAGE_TOKEN, label != IGNORE, id_) for turn, id_, label in rows]


def pieces(example: Example, tokenizer: Tokenizer) -> Iterator[tuple[str, str]]:
    """(kind, text) of the prompt in its order. kind: "text", "trained", "image" (text: its path), or
    "turn", which begins an independent question (text: its number)."""
    paths = iter(example.images)
    last_turn = 0
    for (turn, is_image, trained), group in groupby(_tokens(example), key=lambda token: token[:3]):
        ids = [token.id for token in group]
        if turn != last_turn:
            yield "turn", str(turn)
            last_turn = turn
        if is_image:
            yield from (("image", printable(str(next(paths)))) for _ in ids)
        else:
            yield "trained" if trained else "text", printable(text_of(ids, tokenizer))


def _prompt(example: Example, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    for kind, text in pieces(example, tokenizer):
        if kind == "turn":
            yield "\n" + _paint(f"-- turn {text} --", _HEAD, colour) + "\n"
        elif kind == "image":
            yield _paint(f"<image {text}>", _IMAGE, colour)
        elif kind == "trained":
            yield _paint(text, _TRAINED, True) if colour else f"{_OPEN}{text}{_CLOSE}"
        else:
            yield text


def _rows(
    tokens: Sequence[_Token], tokenizer: Tokenizer, image_tokens: int, colour: bool
) -> Iterator[str]:
    yield _paint(f"{'position':>8}  {'id':>6}  {'trained':7}  {'turn':>4}  piece", _HEAD, colour)
    at = 0
    for turn, is_image, trained, id_ in tokens:
        piece = printable(tokenizer.token_text(id_), keep="")
        if is_image:
            piece += f" x {image_tokens}"
        row = f"{at:8}  {id_:6}  {'yes' if trained else '':7}  {turn or '':>4}  {piece}"
        yield _paint(row, _TRAINED if trained else _IMAGE, colour) if trained or is_image else row
        at += image_tokens if is_image else 1


def text_of(ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Text of ids from the middle of a prompt: no space is dropped, special tokens are shown."""
    out = bytearray()
    for id_ in ids:
        byte = None if id_ == IMAGE_TOKEN else tokenizer.byte_value(id_)
        if id_ == IMAGE_TOKEN:
            out += IMAGE_TAG.encode()
        elif byte is None:
            out += tokenizer.token_text(id_).replace(SPACE, " ").encode()
        else:
            out.append(byte)
    return out.decode("utf-8", "replace")


def _paint(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_RESET}" if colour and text else text
