"""Writes the quickstart's data as anyone's LLaVA data lies on disk: JSON files and an image folder.

captions.json      stage 1: one caption per picture
instruct.json      stage 2: seven short questions per picture, for some also its caption or its JSON,
                   each trained as if alone; for every second picture also a conversation
heldout.jsonl      one question of every kind on each of some pictures of another seed
heldout_talks.json a conversation about each of the first HELD_OUT_TALKS of these pictures
images/, heldout/  the pictures, PNG
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.quickstart import questions
from llava_jax.quickstart.scenes import Scenes, render, sample
from llava_jax.util import read_json, write_json

LONG_KINDS = ("JSON", "caption")
SHORT_KINDS = tuple(kind for kind in questions.KINDS if kind not in LONG_KINDS)
HELD_OUT_SEED = 1_000_003  # added to the seed: no picture of the training set comes back
HELD_OUT_TALKS = 100
DONE = "dataset.json"
_TALK_EVERY = 2  # pictures for each that has a conversation too
_TALK_TURNS = (3, 6)  # the fewest and the most
_LONG_TALK_EVERY = 20  # pictures for each that also has a conversation with every kind of question
_LONG_EVERY = 4  # more long answers, with their many easy tokens, would drown the short ones


def make_dataset(folder: str | Path, *, train: int, held_out: int, seed: int = 0) -> Path:
    """Writes `train` and `held_out` pictures with their questions into `folder`; returns it.

    A folder that already holds this very data set is left as it is.
    """
    folder = Path(folder)
    settings = {"train": train, "held_out": held_out, "seed": seed, "version": 6}
    done = folder / DONE
    if done.exists() and read_json(done) == settings:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)

    scenes = sample(train, seed)
    paths = write_pictures(render(scenes), folder, "images")
    for name, records in (
        ("captions", caption_records(scenes, paths)),
        ("instruct", instruct_records(scenes, paths, seed)),
    ):
        write_json(folder / f"{name}.json", list(records), ensure_ascii=False)

    scenes = sample(held_out, seed + HELD_OUT_SEED)
    paths = write_pictures(render(scenes), folder, "heldout")
    with (folder / "heldout.jsonl").open("w", encoding="utf-8") as file:
        for row in question_rows(scenes, paths, seed + HELD_OUT_SEED):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    talks = (
        talk_record(f"talk-{i:05d}", objects, paths[i], seed + HELD_OUT_SEED, every_kind=True)
        for i, objects in zip(range(HELD_OUT_TALKS), scenes.objects())
    )
    write_json(folder / "heldout_talks.json", list(talks), ensure_ascii=False)
    write_json(done, settings)
    return folder


def write_pictures(pictures: np.ndarray, folder: Path, name: str) -> list[str]:
    """Saves uint8[N, H, W, 3] as folder/name/00000.png, ...; the paths relative to `folder`."""
    (folder / name).mkdir(exist_ok=True)
    paths = [f"{name}/{i:05d}.png" for i in range(len(pictures))]

    def save(pair: tuple[np.ndarray, str]) -> None:
        Image.fromarray(pair[0]).save(folder / pair[1], compress_level=1)

    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(save, zip(pictures, paths), chunksize=64):
            pass
    return paths


def caption_records(scenes: Scenes, paths: list[str]) -> Iterable[dict]:
    """Stage 1: "Describe the image concisely." and the caption."""
    for i, objects in enumerate(scenes.objects()):
        turn = questions.ask_caption(objects, random.Random(0))
        yield _record(f"caption-{i:05d}", paths[i], [("caption", turn)])


def instruct_records(scenes: Scenes, paths: list[str], seed: int) -> Iterable[dict]:
    """Stage 2: every short kind, now and then a long one, and conversations about some pictures.

    `kinds` names the kind of each question.
    """
    for i, objects in enumerate(scenes.objects()):
        rng = random.Random(f"{seed}-{i}")
        kinds = [*SHORT_KINDS]
        if i % _LONG_EVERY == 0:
            kinds.append(LONG_KINDS[i // _LONG_EVERY % 2])
        turns = [(kind, questions.KINDS[kind](objects, rng)) for kind in kinds]
        yield _record(f"scene-{i:05d}", paths[i], turns)
        if i % _TALK_EVERY == 0:
            yield talk_record(f"talk-{i:05d}", objects, paths[i], seed)
    for i, objects in enumerate(scenes.objects()):
        if i % _LONG_TALK_EVERY == 0:
            yield talk_record(f"long-talk-{i:05d}", objects, paths[i], seed, every_kind=True)


def talk_record(
    name: str, objects: list[questions.Object], path: str, seed: int, *, every_kind: bool = False
) -> dict:
    """A conversation about a scene: questions of any kind, half of them as people type them.

    Those carry no prompt that asks for a format. `turns` makes the record one sample, not several.
    every_kind: a long conversation, with one question of each kind.
    """
    rng = random.Random(f"{name}-{seed}")
    kinds = rng.choices(SHORT_KINDS, k=rng.randint(*_TALK_TURNS))
    if every_kind:
        kinds = rng.sample([*questions.KINDS], len(questions.KINDS))
    elif rng.random() < 1 / _LONG_EVERY:
        at = rng.randrange(len(kinds) - 1)
        kinds[at : at + 2] = [rng.choice(LONG_KINDS)]
    turns = [(kind, questions.KINDS[kind](objects, rng)) for kind in kinds]
    turns = [(k, questions.plain(turn) if rng.random() < 0.5 else turn) for k, turn in turns]
    return {**_record(name, path, turns), "turns": "conversation"}


def question_rows(scenes: Scenes, paths: list[str], seed: int) -> Iterable[dict]:
    """Held-out questions with their answers, one of each kind per picture."""
    number = 0
    for i, objects in enumerate(scenes.objects()):
        rng = random.Random(f"{seed}-{i}")
        for kind, ask in questions.KINDS.items():
            text, answer = ask(objects, rng)
            row = {"question_id": number, "image": paths[i], "kind": kind}
            yield {**row, "text": text, "answer": answer}
            number += 1


def _record(name: str, path: str, turns: list[tuple[str, questions.Turn]]) -> dict:
    conversations = []
    for number, (_, (question, answer)) in enumerate(turns):
        tag = "" if number else "<image>\n"
        conversations.append({"from": "human", "value": tag + question})
        conversations.append({"from": "gpt", "value": answer})
    kinds = [kind for kind, _ in turns]
    return {"id": name, "image": path, "kinds": kinds, "conversations": conversations}
