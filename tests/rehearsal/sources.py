"""The ten sources of llava_v1_5_mix665k.json in small: their paths, prompts and shapes of a conversation.

Counts, folders and prompts: table 7 of the LLaVA-1.5 paper and the author's count of the file
(haotian-liu/LLaVA issue 702). All texts here are made up.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Record = dict[str, Any]

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Provide a one-sentence caption for the provided image."
REGION = "Provide a short description for this region."
BOX = "Provide the bounding box coordinate of the region this sentence describes."

NOUNS = "dog car bus tree cup table man woman child boat kite horse clock pizza bench".split()
COLOURS = "red green blue white black yellow brown".split()
PLACES = ("on the left", "on the right", "in the middle", "behind a fence", "near the road")
VERBS = "stands sits waits runs lies moves".split()
TASKS = ("write a poem about", "explain how to draw", "list three facts about", "translate")


@dataclass(frozen=True)
class Source:
    """One part of the mixture: records of the full file, and how one of its records is made."""

    name: str
    count: int
    make: Callable[[np.random.Generator, int], Record]


def phrase(rng: np.random.Generator) -> str:
    """A noun phrase with a place."""
    return f"a {rng.choice(COLOURS)} {rng.choice(NOUNS)} {rng.choice(PLACES)}"


def sentence(rng: np.random.Generator) -> str:
    """A sentence about something seen."""
    return f"There is {phrase(rng)} and it {rng.choice(VERBS)}."


def paragraph(rng: np.random.Generator, sentences: int) -> str:
    """Several sentences; a line break and a list now and then, as chats have."""
    made = [sentence(rng) for _ in range(sentences)]
    return ("\n- " if rng.random() < 0.2 else " ").join(made)


def conversation(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    """(question, answer) pairs as the file spells them."""
    speakers = ("human", "gpt")
    return [{"from": who, "value": text} for pair in pairs for who, text in zip(speakers, pair)]


def _with_image(
    id_: str, image: str, pairs: list[tuple[str, str]], tag: str = "<image>\n"
) -> Record:
    question, answer = pairs[0]
    pairs = [(tag + question, answer), *pairs[1:]]
    return {"id": id_, "image": image, "conversations": conversation(pairs)}


def _coco(i: int) -> str:
    return f"coco/train2017/{33471 + 7 * i:012d}.jpg"


def _llava(rng, i: int) -> Record:
    image, kind = _coco(i), rng.random()
    name = image[-16:-4]
    if kind < 0.35:  # conversation, several turns; the tag stands before or after the question
        pairs = [(f"What is the {rng.choice(NOUNS)} doing?", sentence(rng))]
        pairs += [(f"Is there {phrase(rng)}?", sentence(rng)) for _ in range(rng.integers(1, 5))]
        record = _with_image(name, image, pairs)
        if rng.random() < 0.5:
            record["conversations"][0]["value"] = pairs[0][0] + "\n<image>"
        return record
    if kind < 0.5:  # detail
        return _with_image(name, image, [("Describe the image in detail.", paragraph(rng, 6))])
    return _with_image(name, image, [(f"Why is there {phrase(rng)}?", paragraph(rng, 4))])


def _sharegpt(rng, i: int) -> Record:
    turns = [(f"Please {rng.choice(TASKS)} {phrase(rng)}.", paragraph(rng, 3))]
    turns += [(sentence(rng), paragraph(rng, 2)) for _ in range(rng.integers(0, 4))]
    if i % 6 == 0:  # some are far longer than the model's 2,048 positions
        turns += [(sentence(rng), paragraph(rng, 24)) for _ in range(12)]
    letters = "".join(rng.choice(list("abcdefghijkXYZ0123456789"), 7))
    return {"id": f"{letters}_{i}", "model": "", "conversations": conversation(turns)}


def _short_answers(rng, id_: str, image: str, count: int) -> Record:
    pairs = []
    for _ in range(count):
        noun = rng.choice(NOUNS)
        pair = (f"What color is the {noun}?", str(rng.choice(COLOURS)).capitalize())
        pairs.append(pair if rng.random() < 0.6 else (f"Is there a {noun}?", "Yes"))
    # The format prompt stands once, behind the first question, as in the file.
    pairs[0] = (f"{pairs[0][0]}\n{SHORT}", pairs[0][1])
    return _with_image(id_, image, pairs)


def _vqav2(rng, i: int) -> Record:
    return _short_answers(rng, f"{262148 + i}", _coco(1000 + i), int(rng.integers(2, 8)))


def _gqa(rng, i: int) -> Record:
    name = f"{2354786 + i}" if i % 3 else f"n{16100 + i}"
    return _short_answers(rng, f"gqa_{name}", f"gqa/images/{name}.jpg", int(rng.integers(3, 12)))


def _okvqa(rng, i: int) -> Record:
    return _short_answers(rng, f"okvqa_{i}", _coco(2000 + i), 1)


def _ocrvqa(rng, i: int) -> Record:
    title = " ".join(str(w).capitalize() for w in rng.choice(NOUNS, 3))
    pairs = [
        (f"Who is the author of this book?\n{SHORT}", f"J. {title.split()[0]}"),
        ("What is the title of this book?", f"{title}: A Guide"),
        ("What type of book is this?", "Travel"),
        ("Is this a pharmaceutical book?", "No"),
    ]
    isbn = f"{1437717772 + i:010d}" if i % 4 else f"B{i:09d}"
    return _with_image(isbn, f"ocr_vqa/images/{isbn}.jpg", pairs[: int(rng.integers(1, 5))])


def _aokvqa(rng, i: int) -> Record:
    options = [str(x) for x in rng.permutation(NOUNS)[:4]]
    lines = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options))
    question = f"What is seen {rng.choice(PLACES)}?\n{lines}\n{LETTER}"
    # Each question stands in the file once per choice, with the same id and picture.
    return _with_image(
        f"aokvqa_{i // 4}", _coco(3000 + i // 4), [(question, str(rng.choice(list("ABCD"))))]
    )


def _textcaps(rng, i: int) -> Record:
    words = ", ".join(str(w).upper() for w in rng.choice(NOUNS, 5))
    prompt = f"{CAPTION}\nReference OCR token: {words}"
    image = f"textvqa/train_images/{i:015x}.jpg"
    return _with_image(f"{i:015x}", image, [(prompt, sentence(rng))])


def _box(rng) -> str:
    x, y = rng.uniform(0, 0.5, 2)
    w, h = rng.uniform(0.1, 0.5, 2)
    return f"[{x:.2f}, {y:.2f}, {x + w:.2f}, {y + h:.2f}]"


def _regions(rng, id_: str, image: str, count: int) -> Record:
    """Descriptions of boxes, and boxes of descriptions."""
    pairs = []
    for n in range(count):
        box, text = _box(rng), phrase(rng).removeprefix("a ")
        ask_box, ask_text = (f"{BOX}\n", f"{REGION}\n") if n < 2 else ("", "")
        pairs.append(
            (f"{ask_text}{box}", text) if rng.random() < 0.5 else (f"{ask_box}{text}", box)
        )
    return _with_image(id_, image, pairs)


def _refcoco(rng, i: int) -> Record:
    return _regions(rng, f"refcoco_{i}", _coco(4000 + i), int(rng.integers(1, 10)))


def _vg(rng, i: int) -> Record:
    folder = "VG_100K" if i % 2 else "VG_100K_2"
    return _regions(rng, f"VG_{folder}_{i}", f"vg/{folder}/{2 + 3 * i}.jpg", 10)


SOURCES = (
    Source("llava", 157_712, _llava),
    Source("sharegpt", 40_688, _sharegpt),
    Source("vqav2", 82_783, _vqav2),
    Source("gqa", 72_140, _gqa),
    Source("okvqa", 8_998, _okvqa),
    Source("ocrvqa", 80_000, _ocrvqa),
    Source("aokvqa", 66_160, _aokvqa),
    Source("textcaps", 21_953, _textcaps),
    Source("refcoco", 48_447, _refcoco),
    Source("vg", 86_417, _vg),
)


def shares(total: int) -> dict[str, int]:
    """How many of `total` records come from each source: largest remainders, at least one of each."""
    whole = sum(s.count for s in SOURCES)
    exact = {s.name: total * s.count / whole for s in SOURCES}
    counts = {name: max(1, int(value)) for name, value in exact.items()}
    by_rest = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_rest * (total // len(by_rest) + 1):
        if sum(counts.values()) >= total:
            break
        counts[name] += 1
    return counts
