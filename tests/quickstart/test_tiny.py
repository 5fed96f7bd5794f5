"""The small checkpoint that comes along still answers as well as when it was made."""

import numpy as np
from PIL import Image

import llava_jax
from llava_jax.convert.hub import SHIPPED
from llava_jax.quickstart.dataset import question_rows
from llava_jax.quickstart.scenes import render, sample
from llava_jax.train.evaluate import Question, exact_match


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
    result = exact_match(llava_jax.load("tiny"), questions, quiet=True)
    assert result["mean"] >= 0.95, result["wrong"]
    assert np.isclose(result["mean"], np.mean(list(result["kinds"].values())))
