"""Records and pictures as real files hold them beside the good ones: odd (trained) and bad (left out).

Each maker changes one good record. `ODD` says which note the data report must count for it, `BAD`
a part of the reason that the report must give.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.rehearsal.sources import Record, conversation, paragraph


@dataclass(frozen=True)
class Odd:
    """A record that is trained. `note`: the counter of data_report.json that it raises, or none."""

    kind: str
    change: Callable[[Record, np.random.Generator], Any]
    note: str = ""
    pictures: bool = True  # made from a record with a picture


@dataclass(frozen=True)
class Bad:
    """A record that cannot be trained; `why` stands in the reason of the report."""

    kind: str
    change: Callable[[Record, np.random.Generator], Any]
    why: str
    pictures: bool = True


def _turns(record: Record, *turns: tuple[str, str]) -> Record:
    return {**record, "conversations": [{"from": who, "value": text} for who, text in turns]}


def _several_pictures(record: Record, rng) -> Record:
    image = record["image"]
    pairs = [("<image>\n<image>\nWhat differs?", "The colour."), ("And here?\n<image>", "Nothing.")]
    names = [image, *(image.replace(".jpg", f"_{k}.jpg") for k in "bc")]
    return {**record, "image": names, "conversations": conversation(pairs)}


def _many_turns(record: Record, rng) -> Record:
    pairs = [(f"Question {n}?", "Yes" if n % 2 else "No") for n in range(40)]
    pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
    return {**record, "conversations": conversation(pairs)}


def _without_tag(record: Record, rng) -> Record:
    turns = [
        {**t, "value": t["value"].replace("<image>", "").strip()} for t in record["conversations"]
    ]
    return {**record, "conversations": turns}


def _empty_answer(record: Record, rng) -> Record:
    return _turns(
        record, ("human", "<image>\nA?"), ("gpt", ""), ("human", "And now?"), ("gpt", "A bus.")
    )


ODD = (
    Odd("several pictures", _several_pictures),
    Odd("many turns", _many_turns),
    Odd("picture without tag", _without_tag, "image without tag"),
    Odd("empty answer", _empty_answer, "empty answers"),
    Odd(
        "last question unanswered",
        lambda r, _: {**r, "conversations": [*r["conversations"], {"from": "human", "value": "?"}]},
        "unanswered question",
    ),
    Odd(
        "answer first",
        lambda r, _: {
            **r,
            "conversations": [{"from": "gpt", "value": "Hello!"}, *r["conversations"]],
        },
        "leading answer",
        pictures=False,
    ),
    Odd("number as id", lambda r, _: {**r, "id": 7}),
    Odd("no id", lambda r, _: {k: v for k, v in r.items() if k != "id"}),
    Odd("null image", lambda r, _: {**r, "image": None}, pictures=False),
    Odd(
        "odd characters",
        lambda r, _: _turns(
            r,
            ("human", "A\u2028B </s> <s> \U0001f600 tag: <image>"),
            ("gpt", "\u4f60\u597d </s> é"),
        ),
        "tag without image",
        pictures=False,
    ),
    Odd(
        "user and assistant",
        lambda r, _: _turns(r, ("user", "<image>\nWhat is it?"), ("assistant", "A cup.")),
    ),
)

BAD = (
    Bad("not a record", lambda r, _: "a string", "no list of conversations"),
    Bad("no conversations", lambda r, _: {"id": r["id"], "image": r["image"]}, "no list"),
    Bad("empty conversation", lambda r, _: {**r, "conversations": []}, "empty"),
    Bad(
        "turn without text",
        lambda r, _: {**r, "conversations": [{"from": "human"}, {"from": "gpt", "value": "a"}]},
        "no text",
    ),
    Bad("unknown speaker", lambda r, _: _turns(r, ("human", "a"), ("bing", "b")), "bing"),
    Bad(
        "two questions in a row",
        lambda r, _: _turns(r, ("human", "<image>\na"), ("human", "b"), ("gpt", "c")),
        "alternate",
    ),
    Bad("no answer", lambda r, _: _turns(r, ("human", "<image>\na"), ("gpt", " ")), "answer"),
    Bad("image is an object", lambda r, _: {**r, "image": {"path": "a.jpg"}}, "path"),
    Bad("path out of the folder", lambda r, _: {**r, "image": "../secret.jpg"}, "leaves"),
    Bad(
        "more tags than pictures",
        lambda r, _: {
            **_turns(r, ("human", "<image> <image> <image> Which?"), ("gpt", "a")),
            "image": [r["image"], r["image"]],
        },
        "2 images",
    ),
    Bad(
        "question past every position",
        lambda r, rng: _turns(r, ("human", paragraph(rng, 400)), ("gpt", "Yes.")),
        "nothing to train",
        pictures=False,
    ),
)

BAD_PICTURES = {
    "missing": "does not exist",
    "cut off": "damaged",
    "a web page": "not an image",
    "no bytes": "no bytes",
    "saved under its own ending": "does not exist",  # ocr_vqa: 1234.gif where the file says .jpg
}
GOOD_PICTURES = ("gif named jpg", "png named jpg", "grey", "palette with alpha", "cmyk")


def draw(path: Path, rng: np.random.Generator, kind: str = "") -> None:
    """Writes one small picture, or what stands in its place for a kind of the lists above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "missing":
        return
    pixels = np.full((*rng.integers(24, 65, 2), 3), rng.integers(0, 256, 3), np.uint8)
    height, width = pixels.shape[:2]
    pixels[height // 4 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    picture = Image.fromarray(pixels)
    if kind in ("gif named jpg", "png named jpg"):
        picture.save(path, format=kind[:3].upper())
    elif kind == "saved under its own ending":
        picture.save(path.with_suffix(".gif"))
    elif kind == "grey":
        picture.convert("L").save(path, quality=80)
    elif kind == "palette with alpha":
        picture.convert("RGBA").quantize(8).save(path, format="PNG")
    elif kind == "cmyk":
        picture.convert("CMYK").save(path, format="JPEG")
    else:
        picture.save(path, quality=80)
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "a web page":
        path.write_text("<!DOCTYPE html><html><body>404 Not Found</body></html>")
    elif kind == "no bytes":
        path.write_bytes(b"")
