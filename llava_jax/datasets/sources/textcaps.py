"""TextCaps, train: one caption for each picture, with the words that an OCR program read.

Form: the prompt, then "Reference OCR token: " with the words between commas, as published records
have it (one stands in the README of Video-LLaVA). Caption: the owner's first of five, which is the one
of that record; whether it always is was not published.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llava_jax.datasets.prompts import CAPTION, OCR
from llava_jax.datasets.source import File, Record, Source, about_image, sentence


@dataclass(kw_only=True)
class TextCaps(Source):
    name = "textcaps"
    published = 21_953
    files: ClassVar = {
        "captions": File("TextCaps_0.1_train.json", "https://textvqa.org/textcaps/dataset"),
        "ocr": File("TextVQA_Rosetta_OCR_v0.2_train.json", "https://textvqa.org/dataset"),
    }

    image: str = "textvqa/train_images/{}.jpg"
    prompt: str = CAPTION

    def records(self) -> Iterator[Record]:
        words = {r["image_id"]: r["ocr_tokens"] for r in self.rows(self.path("ocr"), "data")}
        seen = set()
        for row in self.rows(self.path("captions"), "data"):
            name = row["image_id"]
            if name in seen:
                continue
            seen.add(name)
            read = OCR.format(", ".join(words.get(name, ()))).strip()
            pair = f"{self.prompt}\n{read}", sentence(row["caption_str"])
            yield about_image(name, self.image_path(name), [pair])


SOURCE = TextCaps
