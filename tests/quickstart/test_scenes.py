"""Pictures and questions: reproducible, and never in disagreement."""

import random

import numpy as np
import pytest

from llava_jax.quickstart import questions
from llava_jax.quickstart.scenes import COLORS, PLACES, SHAPES, render, sample

LOOKS = {
    "red": (226, 58, 50),
    "green": (52, 176, 82),
    "blue": (58, 116, 234),
    "yellow": (245, 206, 58),
    "purple": (164, 82, 214),
    "white": (238, 239, 242),
}


def test_scenes_depend_on_the_seed_alone():
    first, again, other = sample(40, 3), sample(40, 3), sample(40, 4)
    assert np.array_equal(render(first), render(again))
    assert not np.array_equal(render(first), render(other))
    assert np.array_equal(render(first)[7], render(first[7:8])[0])


def test_each_picture_shows_its_objects_and_nothing_else():
    scenes = sample(300, 1)
    for picture, objects in zip(render(scenes), scenes.objects(), strict=True):
        by_place = {place: color for color, _, place in objects}
        for i, place in enumerate(PLACES):
            rows, columns = slice(i // 2 * 32, i // 2 * 32 + 32), slice(i % 2 * 32, i % 2 * 32 + 32)
            tile = picture[rows, columns].astype(int)
            bright = tile.max(axis=-1) > 110
            assert bright.any() == (place in by_place)
            if place in by_place:
                mean = tile[bright].mean(axis=0)
                distance = {c: np.abs(mean - rgb).sum() for c, rgb in LOOKS.items()}
                assert min(distance, key=distance.__getitem__) == by_place[place]


def test_shapes_differ_in_how_they_fill_their_box():
    scenes = sample(2000, 2)
    fills = {shape: [] for shape in SHAPES}
    for picture, objects in zip(render(scenes), scenes.objects(), strict=True):
        if len(objects) == 1:
            bright = picture.max(axis=-1) > 120
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            box = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
            fills[objects[0][1]].append(bright.sum() / box)
    means = {shape: np.mean(values) for shape, values in fills.items()}
    assert means["triangle"] < 0.62 < means["circle"] < 0.83 < means["square"]


def test_no_two_shapes_look_alike_and_all_words_occur():
    seen = set()
    for objects in sample(500, 5).objects():
        assert 1 <= len(objects) <= 3
        assert len({o[:2] for o in objects}) == len(objects)
        seen.update(objects)
    assert seen == {(c, s, p) for c in COLORS for s in SHAPES for p in PLACES}


@pytest.mark.parametrize("kind", questions.KINDS)
def test_questions_are_reproducible(kind):
    ask = questions.KINDS[kind]
    for objects in sample(50, 6).objects():
        assert ask(objects, random.Random(1)) == ask(objects, random.Random(1))


def test_answers_by_kind():
    two = [("red", "circle", "top left"), ("blue", "circle", "bottom right")]
    for seed in range(200):
        rng = random.Random(seed)
        question, answer = questions.ask_count(two, rng)
        first = question.split("\n")[0]
        if "circles" in first or "many shapes" in first:
            assert answer == "2"
        elif "red" in first or "blue" in first:
            assert answer == "1"
        else:
            assert answer == "0"
        question, answer = questions.ask_shape(two, rng)
        assert answer == "circle"
        question, answer = questions.ask_color(two, rng)
        assert answer == ("red" if "top left" in question else "blue")
        question, answer = questions.ask_position(two, rng)
        assert answer == ("top left" if "red" in question else "bottom right")
        question, answer = questions.ask_unanswerable(two, rng)
        assert answer == "Unanswerable"
        assert questions.UNSURE in question
        assert not any(w in question for w in ("top left", "bottom right", "red", "blue", "circle"))
    assert questions.ask_caption(two, random.Random(0)) == (
        questions.DESCRIBE,
        "a red circle at the top left and a blue circle at the bottom right",
    )
    assert questions.ask_json(two, random.Random(0))[1] == (
        '[{"color": "red", "shape": "circle", "place": "top left"}, '
        '{"color": "blue", "shape": "circle", "place": "bottom right"}]'
    )


def test_yes_and_no_are_both_true_answers():
    counts = {"yes": 0, "no": 0}
    for i, objects in enumerate(sample(400, 8).objects()):
        question, answer = questions.ask_yes_no(objects, random.Random(i))
        words = question.split("\n")[0]
        counts[answer] += 1
        if words.startswith("Is the shape"):
            color = next(o[0] for o in objects if o[2] in words)
            truth = words.endswith(f"{color}?")
        else:
            truth = any(
                s in words and (f"a {c} " in words or f"at the {p}?" in words)
                for c, s, p in objects
            )
        assert answer == ("yes" if truth else "no"), (question, objects)
    assert min(counts.values()) > 150


def test_answerable_questions_carry_the_unanswerable_hint_too():
    hinted = [
        questions.UNSURE in questions.ask_color(objects, random.Random(i))[0]
        for i, objects in enumerate(sample(300, 9).objects())
    ]
    assert 0.2 < np.mean(hinted) < 0.4
