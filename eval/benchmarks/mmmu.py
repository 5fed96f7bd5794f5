"""MMMU (validation: 900 questions of 30 subjects; up to seven pictures; options or open).

Owner's rule: MMMU-Benchmark/MMMU@bb0b95a mmmu/utils/eval_utils.py. Options: "(B)" anywhere, else B
between blanks, else, in more than five words, an option's text; of several the last. Where nothing is
found the owner guesses at random (its seed is of one order of questions): here a guess counts as its
mean, 1 / options. Open: any of the numbers or the shortest tail after "is ", "so ", "=", … equals
the truth as a number rounded to two decimals, or holds it as text; a truth of one letter needs a
blank beside it. The answer is lower-cased before it is cut into sentences at capitals, so the owner
only ever cuts at line ends.
"""

import ast
import re
from contextlib import suppress
from typing import Any

from llava_jax.eval import truths
from llava_jax.eval.questions import LETTER, SHORT
from llava_jax.eval.rules import LETTERS
from llava_jax.eval.simple import Item, SimpleTask, choices

_IMAGE = re.compile(r"<image ([1-7])>")  # a set's columns; validation_Math_7 has named thirty
_KEYS = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)


class MMMU(SimpleTask):
    name = "mmmu"
    data_files = "parquet files of MMMU/MMMU (validation-*.parquet of each subject; images inside)"
    parts = ("subject", 30)
    files = ("**/validation*.parquet", "*.parquet", "*.jsonl")

    def item(self, row: dict[str, Any], number: int) -> Item:
        options = truths.options(row["options"])
        # The pictures stand before the question, in the order of their first mention.
        named = "".join([row["question"], *map(str, options)])
        order = dict.fromkeys(_IMAGE.findall(named)) or {"1": None}
        images = tuple(row[f"image_{n}"] for n in order)
        asked = row["question"]
        prompt = choices(asked, options, LETTER) if options else asked + SHORT
        truth = row["answer"]
        if isinstance(truth, str) and truth.startswith("["):
            with suppress(ValueError, SyntaxError):  # an interval, "[0, 1)"
                truth = ast.literal_eval(truth)
        letters = LETTERS[: len(options)]
        if options and isinstance(truth, list):
            truth = [truths.letter(t, letters) for t in truth]
        elif options:
            truth = truths.letter(truth, letters)
        else:
            truth = None if truth == "?" else truths.texts(truth)
        key = str(row["id"])
        subject = re.sub(r"^(validation|dev|test)_|_\d+$", "", key)
        kind = "multiple-choice" if options else "open"
        return Item(key, prompt, truth, images, options, {"subject": subject, "type": kind})

    def judged(self, text: str, item: Item) -> tuple[float, Any]:
        if not item.options:
            found = parse_open(text)
            return float(_open_right(item.truth, found)), sorted(map(str, found))
        read = parse_choice(text, item.options)
        truths = item.truth if isinstance(item.truth, list) else [item.truth]
        if read is None:
            return len(truths) / len(item.options), "Z"
        return float(read in truths), read


def parse_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The letter that the owner reads, or None where it guesses."""
    for c in ",.!?;:'":
        text = text.strip(c)
    text, letters = f" {text} ", LETTERS[: len(options)]
    for form in ("({})", " {} "):
        if found := {c: text.rfind(form.format(c)) for c in letters if form.format(c) in text}:
            return max(found, key=lambda c: found[c])
    low = text.lower()
    if len(text.split()) > 5:
        held = {c: low.rfind(o.lower()) for c, o in zip(letters, options) if o.lower() in low}
        if held:
            return max(held, key=lambda c: held[c])
    return None


def parse_open(text: str) -> set[str | float]:
    """What the owner reads out of a free answer: texts and numbers."""
    text = text.strip().strip(".").lower()
    lines, tails = re.split(r"\.\s(?=[A-Z])|\n", text), []
    for n, line in enumerate(lines):
        keys = [*_KEYS, "="] if n == len(lines) - 1 else _KEYS
        found = [line.split(k)[-1].strip() for k in keys if k in line]
        # An empty tail is replaced by the next one, as the owner's truth test does.
        best = ""
        for tail in found:
            best = tail if not best or len(tail) < len(best) else best
        if best and best not in tuple(":,.!?;'"):
            tails.append(best)
    tails = tails or [text]
    numbers = [x for t in tails for pattern in _NUMBERS for x in pattern.findall(t)]
    return {x for t in [*tails, *numbers] for x in _normalized(t)}


def _normalized(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _open_right(truth: Any, found: set[str | float]) -> bool:
    truths = truth if isinstance(truth, list) else [truth]
    wanted = [x for t in truths for x in _normalized(str(t))]
    texts = [w for w in wanted if isinstance(w, str)]
    return any(any(t in f for t in texts) if isinstance(f, str) else f in wanted for f in found)
