"""Questions and answers about a scene, of nine kinds, made from what stands where.

Every function takes the scene's objects, a list of (colour, shape, place) words in reading order,
and a seeded `random.Random`; it returns (question, answer). Answers are as short as the prompt
that follows the question asks for, so that exact match is a fair score.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from llava_jax.quickstart.scenes import COLORS, PLACES, SHAPES

Object = tuple[str, str, str]
Turn = tuple[str, str]

SHORT = "\nAnswer the question using a single word or phrase."
"""LLaVA-1.5's response-format prompt for short answers (arXiv 2310.03744, table 7)."""
UNSURE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
"""Its VizWiz prompt, put before SHORT (table 8)."""
UNANSWERABLE = "Unanswerable"
DESCRIBE = "Describe the image concisely."
AS_JSON = "Describe the image as JSON."

_HINT_RATE = 0.3  # answerable questions that carry UNSURE too, so that it decides nothing by itself
_CHINESE = {
    **dict(zip(COLORS, ("红色", "绿色", "蓝色", "黄色", "紫色", "白色"))),
    **dict(zip(SHAPES, ("圆形", "正方形", "三角形"))),
    **dict(zip(PLACES, ("左上角", "右上角", "左下角", "右下角"))),
}


def unique(objects: list[Object], part: int) -> list[Object]:
    """The objects whose word number `part` (0 colour, 1 shape) no other object has."""
    words = [o[part] for o in objects]
    return [o for o in objects if words.count(o[part]) == 1]


def ask_color(objects: list[Object], rng: random.Random) -> Turn:
    named = unique(objects, 1)
    if named and rng.random() < 0.5:
        found, shape, _ = rng.choice(named)
        question = rng.choice(
            (f"What color is the {shape}?", f"Which color does the {shape} have?")
        )
    else:
        found, _, place = rng.choice(objects)
        question = f"What color is the shape at the {place}?"
    return _short(question, rng), found


def ask_shape(objects: list[Object], rng: random.Random) -> Turn:
    named = unique(objects, 0)
    if named and rng.random() < 0.5:
        color, found, _ = rng.choice(named)
        question = rng.choice((f"What shape is {color}?", f"Which shape is the {color} one?"))
    else:
        _, found, place = rng.choice(objects)
        question = f"What shape is at the {place}?"
    return _short(question, rng), found


def ask_count(objects: list[Object], rng: random.Random) -> Turn:
    form = rng.randrange(3)
    if form == 0:
        number, things = len(objects), "shapes"
    elif form == 1:
        word = _by_number([o[0] for o in objects], COLORS, rng)
        number, things = sum(o[0] == word for o in objects), f"{word} shapes"
    else:
        word = _by_number([o[1] for o in objects], SHAPES, rng)
        number, things = sum(o[1] == word for o in objects), f"{word}s"
    question = rng.choice((f"How many {things} are there?", f"How many {things} do you see?"))
    return question + SHORT, str(number)


def ask_yes_no(objects: list[Object], rng: random.Random) -> Turn:
    color, shape, place = rng.choice(objects)
    truth = rng.random() < 0.5
    form = rng.randrange(3)
    if form == 0:
        present = {o[:2] for o in objects}
        if not truth:
            color, shape = rng.choice(
                [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
            )
        question = f"Is there a {color} {shape}?"
    elif form == 1:
        if not truth:
            color = rng.choice([c for c in COLORS if c != color])
        question = f"Is the shape at the {place} {color}?"
    else:
        if not truth:
            present_at = {o[1:] for o in objects}
            shape, place = rng.choice(
                [(s, p) for s in SHAPES for p in PLACES if (s, p) not in present_at]
            )
        question = f"Is there a {shape} at the {place}?"
    return question + SHORT, "yes" if truth else "no"


def ask_position(objects: list[Object], rng: random.Random) -> Turn:
    by_color, by_shape = unique(objects, 0), unique(objects, 1)
    color, shape, place = rng.choice(objects)
    thing, form = f"{color} {shape}", rng.randrange(3)
    if form == 0 and by_color:
        color, _, place = rng.choice(by_color)
        thing = f"{color} shape"
    elif form == 1 and by_shape:
        _, thing, place = rng.choice(by_shape)
    question = rng.choice((f"Where is the {thing}?", f"In which corner is the {thing}?"))
    return _short(question, rng), place


def ask_unanswerable(objects: list[Object], rng: random.Random) -> Turn:
    """Asks about what is not there."""
    absent_color = rng.choice([c for c in COLORS if all(o[0] != c for o in objects)])
    absent_shape = [s for s in SHAPES if all(o[1] != s for o in objects)]
    empty = rng.choice([p for p in PLACES if all(o[2] != p for o in objects)])
    choices = [
        f"What color is the shape at the {empty}?",
        f"What shape is at the {empty}?",
        f"What shape is {absent_color}?",
        f"Where is the {absent_color} shape?",
    ]
    if absent_shape:
        missing = rng.choice(absent_shape)
        choices += [f"What color is the {missing}?", f"Where is the {missing}?"]
    return rng.choice(choices) + UNSURE + SHORT, UNANSWERABLE


def ask_chinese(objects: list[Object], rng: random.Random) -> Turn:
    form = rng.randrange(3)
    color, shape, place = (_CHINESE[word] for word in rng.choice(objects))
    if form == 0:
        return f"{place}的图形是什么颜色？", color
    if form == 1:
        return f"{place}是什么图形？", shape
    return "图中有几个图形？", f"{len(objects)}个"


def ask_json(objects: list[Object], rng: random.Random) -> Turn:
    del rng
    keys = ("color", "shape", "place")
    return AS_JSON, json.dumps([dict(zip(keys, o)) for o in objects])


def ask_caption(objects: list[Object], rng: random.Random) -> Turn:
    del rng
    parts = [f"a {color} {shape} at the {place}" for color, shape, place in objects]
    return DESCRIBE, " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)


KINDS: dict[str, Callable[[list[Object], random.Random], Turn]] = {
    "color": ask_color,
    "shape": ask_shape,
    "count": ask_count,
    "yes/no": ask_yes_no,
    "position": ask_position,
    "unanswerable": ask_unanswerable,
    "Chinese": ask_chinese,
    "JSON": ask_json,
    "caption": ask_caption,
}


def plain(turn: Turn) -> Turn:
    """The turn with its question as people type it, without the prompts that follow it."""
    question, answer = turn
    return question.partition("\n")[0], answer


def _short(question: str, rng: random.Random) -> str:
    return question + (UNSURE if rng.random() < _HINT_RATE else "") + SHORT


def _by_number(present: list[str], words: tuple[str, ...], rng: random.Random) -> str:
    """One of `words`, drawn so that each number of things that occurs is as likely as the others."""
    number = rng.choice(sorted({present.count(word) for word in words}))
    return rng.choice([word for word in words if present.count(word) == number])
