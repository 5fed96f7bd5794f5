"""Cutting and drawing turns, as rows of numbers that can be checked by eye."""

import numpy as np
import pytest

from llava_jax.errors import PromptError, SampleError
from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.example import Example, sample_turns

X = IMAGE_TOKEN
_ = IGNORE


def example(ids, labels=None, turns=None) -> Example:
    return Example(ids, [f"{i}.png" for i in range(ids.count(X))], labels, turns, "7")


def test_length_counts_image_features():
    assert example([1, X, 15, X]).length(10) == 22
    assert example([1]).length(10) == 1


def test_what_is_longer_is_cut_but_never_inside_an_image():
    whole = example([1, X, 15, 16, 2], [_, _, 15, 16, 2], [0, 0, 1, 1, 1])
    assert whole.truncated(None, 3) is whole
    assert whole.truncated(7, 3) is whole
    cut = whole.truncated(6, 3)
    assert cut.ids.tolist() == [1, X, 15, 16]
    assert cut.labels.tolist() == [_, _, 15, 16]
    assert cut.turns.tolist() == [0, 0, 1, 1]
    assert (cut.images, cut.notes) == (("0.png",), {"truncated": 1})
    assert whole.notes == {}
    two = example([1, X, 5, X, 6], [_, _, 5, _, 6])
    lengths = [len(two.truncated(n, 10).ids) for n in (0, 1, 10, 11, 12, 21, 22, 23)]
    assert lengths == [0, 1, 1, 2, 3, 3, 4, 5]
    assert two.truncated(21, 10).images == ("0.png",)
    assert two.truncated(22, 10).images == ("0.png", "1.png")


def test_selected_ids_keep_their_images():
    part = example([1, X, 0, X, 5], [_, _, 0, _, 5], [0, 0, 1, 1, 1])
    part = part.select(np.array([True, False, False, True, True]))
    assert part.ids.tolist() == [1, X, 5]
    assert part.labels.tolist() == [_, _, 5]
    assert part.turns.tolist() == [0, 1, 1]
    assert part.images == ("1.png",)


def test_drawn_turns_keep_the_prefix_and_are_renumbered():
    ids = [1, X, 10, 11, 20, 21, 30, 31]
    whole = example(ids, ids, [0, 0, 1, 1, 2, 2, 3, 3])
    assert sample_turns(whole, 0, None) is whole
    assert sample_turns(whole, 3, None) is whole
    plain = example(ids, ids)
    assert sample_turns(plain, 1, None) is plain
    seen = set()
    for seed in range(20):
        part = sample_turns(whole, 2, np.random.RandomState(seed))
        assert part.turns.tolist() == [0, 0, 1, 1, 2, 2]
        assert part.ids.tolist() == part.labels.tolist()
        assert part.ids[:2].tolist() == [1, X]
        seen.add(tuple(part.ids[2:].tolist()))
    assert seen == {(10, 11, 20, 21), (10, 11, 30, 31), (20, 21, 30, 31)}


def test_slots_and_images_must_match():
    with pytest.raises(SampleError, match="sample 7: 1 image slots for 0 images"):
        Example([1, X, 5], labels=[_, _, 5], id="7")
    with pytest.raises(PromptError, match="1 image slots for 0 images"):
        Example([1, X])
    with pytest.raises(PromptError, match="empty"):
        Example([])
