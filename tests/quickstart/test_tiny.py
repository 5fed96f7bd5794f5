"""The small checkpoint that comes along still answers as well as when it was made."""

import numpy as np
from PIL import Image

import llava_jax
from llava_jax.convert.io.hub import SHIPPED
from llava_jax.quickstart.dataset import question_rows, talk_record
from llava_jax.quickstart.scenes import render, sample
from llava_jax.train.evaluate import Question, answers, questions_of, score


def test_it_is_small():
    size = sum(p.stat().st_size for p in SHIPPED["tiny"].rglob("*") if p.is_file())
    assert size < 3e6


def test_it_answers_about_pictures_it_never_saw(tmp_path):
    scenes, seed = sample(20, 4_242_424), 9
    paths = [str(tmp_path / f"{i}.png") for i in range(len(scenes))]
    for picture, path in zip(render(scenes), paths, strict=True):
        Image.fromarray(picture).save(path)
    questions = [
        Question(row["image"], row["text"], row["answer"], row["kind"])
        for row in question_rows(scenes, paths, seed)
    ]
    result = score(questions, answers(llava_jax.load("tiny"), questions, quiet=True))
    assert result["mean"] >= 0.95, result["wrong"]
    assert np.isclose(result["mean"], np.mean(list(result["kinds"].values())))


def test_it_keeps_up_a_conversation(tmp_path):
    """Nine questions of every kind in one chat, half of them as people type them."""
    model, right, asked = llava_jax.load("tiny"), 0, 0
    scenes = sample(8, 5_151_515)
    for i, (picture, objects) in enumerate(zip(render(scenes), scenes.objects(), strict=True)):
        path = str(tmp_path / f"{i}.png")
        Image.fromarray(picture).save(path)
        turns = questions_of(talk_record(f"{i}", objects, path, 7, every_kind=True), "")
        talk = model.chat(max_new_tokens=80)
        said = [talk.say(turn.words, None if n else path).text for n, turn in enumerate(turns)]
        right += sum(answer == turn.answer for answer, turn in zip(said[1:], turns[1:]))
        asked += len(turns) - 1
    assert asked == 64
    assert right / asked >= 0.95
