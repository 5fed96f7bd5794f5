"""Shows a training example to people: its prompt, and which tokens of it are trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby

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


def explain(
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
    trained = sum(label != IGNORE for _, _, label in _tokens(example))
    positions = example.length(image_tokens)
    head = [
        f"sample {example.id}: {len(example.ids)} tokens, {positions} positions with images, "
        f"{trained} trained",
        *(f"image {i}: {path}" for i, path in enumerate(example.images)),
    ]
    text = "".join(_prompt(example, tokenizer, colour))
    parts = ["\n".join(_paint(printable(line), _HEAD, colour) for line in head), text]
    if table:
        parts.append("\n".join(_rows(example, tokenizer, image_tokens, colour)))
    return "\n\n".join(parts)


def _prompt(example: Example, tokenizer: Tokenizer, colour: bool) -> Iterator[str]:
    images = iter(example.images)
    rows = _tokens(example)
    keyed = ((turn, id_ == IMAGE_TOKEN, label != IGNORE, id_) for turn, id_, label in rows)
    last_turn = 0
    for (turn, is_image, trained), group in groupby(keyed, key=lambda row: row[:3]):
        ids = [int(row[3]) for row in group]
        if turn != last_turn:
            yield "\n" + _paint(f"-- turn {turn} --", _HEAD, colour) + "\n"
            last_turn = turn
        if is_image:
            for _ in ids:
                yield _paint(f"<image {printable(next(images, '?'))}>", _IMAGE, colour)
        elif trained:
            text = printable(text_of(ids, tokenizer))
            yield _paint(text, _TRAINED, True) if colour else f"{_OPEN}{text}{_CLOSE}"
        else:
            yield printable(text_of(ids, tokenizer))


def _rows(example: Example, tokenizer: Tokenizer, image_tokens: int, colour: bool) -> Iterator[str]:
    yield _paint(f"{'position':>8}  {'id':>6}  {'trained':7}  {'turn':>4}  piece", _HEAD, colour)
    at = 0
    for turn, id_, label in _tokens(example):
        is_image, trained = id_ == IMAGE_TOKEN, label != IGNORE
        piece = printable(tokenizer.token_text(int(id_)), keep="")
        if is_image:
            piece += f" x {image_tokens}"
        row = f"{at:8}  {id_:6}  {'yes' if trained else '':7}  {turn or '':>4}  {piece}"
        yield _paint(row, _TRAINED if trained else _IMAGE, colour) if trained or is_image else row
        at += image_tokens if is_image else 1


def _tokens(example: Example) -> list[tuple[int, int, int]]:
    """(turn, id, label) of each id."""
    none = [0] * len(example.ids)
    turns = none if example.turns is None else example.turns.tolist()
    labels = [IGNORE] * len(none) if example.labels is None else example.labels.tolist()
    return list(zip(turns, example.ids.tolist(), labels))


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
