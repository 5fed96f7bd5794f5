"""Batches, as rows of numbers that can be checked by eye."""

from dataclasses import replace

import numpy as np
import pytest

from llava_jax.data.batch import (
    Shape,
    bucket,
    choose_turns,
    collate,
    expand,
    first_fit,
    shape_of,
    without_id,
)
from llava_jax.errors import SampleError
from llava_jax.text.sample import Example

X = -200  # an image slot
_ = -100  # not trained


def example(ids, labels, turns=None, images=None) -> Example:
    ids = np.array(ids, np.int32)
    turns = np.zeros_like(ids) if turns is None else np.array(turns, np.int32)
    if images is None:
        images = tuple(f"{i}.png" for i in range((ids == X).sum()))
    return Example("7", ids, np.array(labels, np.int32), images, turns)


def lists(sample, *names):
    return [getattr(sample, n).tolist() for n in names]


def test_an_image_gets_its_places():
    sample = expand(example([1, X, 15, 16, 2], [_, _, _, 16, 2]), 3)
    tokens, slots, positions, at, targets = lists(
        sample, "tokens", "slots", "positions", "target_at", "targets"
    )
    assert tokens == [1, 0, 0, 0, 15, 16, 2]
    assert slots == [-1, 0, 1, 2, -1, -1, -1]
    assert positions == [0, 1, 2, 3, 4, 5, 6]
    assert at == [4, 5]
    assert targets == [16, 2]
    assert sample.images == ("0.png",)
    assert not sample.cut


def test_two_images_and_none():
    sample = expand(example([1, X, 5, X, 6], [_, _, _, _, 6]), 2)
    assert lists(sample, "tokens", "slots") == [
        [1, 0, 0, 5, 0, 0, 6],
        [-1, 0, 1, -1, 2, 3, -1],
    ]
    sample = expand(example([1, 5, 6], [_, 5, 6]), 2)
    assert lists(sample, "slots", "target_at", "targets") == [[-1, -1, -1], [0, 1], [5, 6]]
    assert sample.images == ()


def test_the_first_token_is_never_predicted():
    assert expand(example([5, 6], [5, 6]), 2).target_at.tolist() == [0]


def test_independent_turns_continue_the_prefix():
    #                      prefix    turn 1     turn 2
    ids = [1, X, 7, 10, 11, 2, 20, 21, 22, 2]
    labels = [_, _, _, _, 11, 2, 20, _, 22, 2]
    turns = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    sample = expand(example(ids, labels, turns), 2)
    tokens, turns, positions, at, targets = lists(
        sample, "tokens", "turns", "positions", "target_at", "targets"
    )
    assert tokens == [1, 0, 0, 7, 10, 11, 2, 20, 21, 22, 2]
    assert turns == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert positions == [0, 1, 2, 3, 4, 5, 6, 4, 5, 6, 7]
    # 20 opens turn 2, so it is predicted from the 7 that ends the prefix, not from turn 1's 2.
    assert list(zip(at, targets)) == [(4, 11), (5, 2), (3, 20), (8, 22), (9, 2)]


def test_choosing_turns_keeps_the_prefix_and_renumbers():
    ids = [1, X, 10, 11, 20, 21, 30, 31]
    turns = [0, 0, 1, 1, 2, 2, 3, 3]
    whole = example(ids, ids, turns)
    assert choose_turns(whole, 0, None) is whole
    assert choose_turns(whole, 3, None) is whole
    seen = set()
    for seed in range(20):
        part = choose_turns(whole, 2, np.random.RandomState(seed))
        assert part.turns.tolist() == [0, 0, 1, 1, 2, 2]
        assert part.input_ids.tolist() == part.labels.tolist()
        assert part.input_ids[:2].tolist() == [1, X]
        seen.add(tuple(part.input_ids[2:].tolist()))
    assert seen == {(10, 11, 20, 21), (10, 11, 30, 31), (20, 21, 30, 31)}


def test_cut_at_the_longest_length():
    sample = expand(example([1, X, 15, 16, 2], [_, _, 15, 16, 2]), 3, max_length=6)
    assert sample.cut
    assert lists(sample, "tokens", "targets") == [[1, 0, 0, 0, 15, 16], [15, 16]]
    with_two = example([1, X, 5, X, 6], [_, _, 5, _, 6])
    sample = expand(with_two, 3, max_length=7)  # an image is not cut in part
    assert lists(sample, "tokens", "slots") == [[1, 0, 0, 0, 5], [-1, 0, 1, 2, -1]]
    assert sample.images == ("0.png",)
    assert expand(with_two, 3, max_length=8).images == ("0.png", "1.png")


def test_without_an_id():
    part = without_id(example([1, X, 0, 5, 0], [_, _, 0, 5, 0], [0, 0, 1, 1, 1]), 0)
    assert part.input_ids.tolist() == [1, X, 5]
    assert part.labels.tolist() == [_, _, 5]
    assert part.turns.tolist() == [0, 0, 1]
    assert part.images == ("0.png",)
    whole = example([1, 5], [_, 5])
    assert without_id(whole, 0) is whole


def test_errors_name_the_sample():
    with pytest.raises(SampleError, match="sample 7: 1 image slots for 0 images"):
        expand(example([1, X, 5], [_, _, 5], images=()), 3)
    with pytest.raises(SampleError, match="sample 7: there is nothing to train in it"):
        expand(example([1, 5], [_, _]), 3)
    assert len(expand(example([1, 5], [_, _]), 3, idle=True).targets) == 0
    with pytest.raises(SampleError, match="sample 7: there is nothing to train within its first 3"):
        expand(example([1, X, 5], [_, _, 5]), 3, max_length=3)
    with pytest.raises(SampleError, match="sample 7: independent turns"):
        expand(example([1, 5, 6], [_, 5, 6], [1, 0, 1]), 3)
    with pytest.raises(SampleError, match="sample 7: needs 9 tokens, the largest bucket is 8"):
        bucket(9, (4, 8), "tokens", "7")


def sample_of(length: int, images: int = 0, name: str = "s"):
    ids = [1] + [X] * images + [5] * (length - 1 - 2 * images)
    labels = [_] * (1 + images) + ids[1 + images :]
    return expand(replace(example(ids, labels), id=name), 2)


def test_first_fit_puts_the_longest_first():
    samples = [sample_of(n) for n in (3, 6, 4, 7, 2)]
    assert [len(s) for s in samples] == [3, 6, 4, 7, 2]
    assert first_fit(samples, 10, 9) == [[3, 0], [1, 2], [4]]
    assert first_fit([sample_of(5, 1)] * 3, 99, 2) == [[0, 1], [2]]
    assert first_fit([], 10, 1) == []


def test_shapes_come_from_buckets():
    rows = [[sample_of(9, 2)], [sample_of(4)], []]
    assert shape_of(rows, 3, (4, 8, 16), (0, 1, 4), (2, 8)) == Shape(3, 16, 4, 8)
    assert shape_of([[]], 2, (4, 8), (0, 1), (2,)) == Shape(2, 4, 0, 2)
    with pytest.raises(SampleError, match=r"sample s: needs 9 .*data\.length_buckets"):
        shape_of(rows, 3, (4, 8), (0, 1, 4), (2, 8))


def test_collate_one_sample_a_row():
    samples = [
        expand(example([1, X, 5, 2], [_, _, 5, 2]), 2),
        expand(example([1, 6], [_, 6]), 2),
    ]
    picture = np.full((2, 2, 3), 9, np.uint8)
    batch = collate([[s] for s in samples], [[picture], []], Shape(3, 6, 1, 3), 2, 2)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        **{k: ((3, 6), "int32") for k in ("tokens", "slots", "positions", "segments", "turns")},
        "images": ((3, 1, 2, 2, 3), "uint8"),
        "target_at": ((3, 3), "int32"),
        "targets": ((3, 3), "int32"),
    }
    assert batch["tokens"].tolist() == [[1, 0, 0, 5, 2, 0], [1, 6, 0, 0, 0, 0], [0] * 6]
    assert batch["slots"].tolist() == [[-1, 0, 1, -1, -1, -1], [-1] * 6, [-1] * 6]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 4, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert batch["segments"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0], [0] * 6]
    assert batch["target_at"].tolist() == [[2, 3, 0], [0, 0, 0], [0, 0, 0]]
    assert batch["targets"].tolist() == [[5, 2, _], [6, _, _], [_, _, _]]
    assert batch["images"][:, 0, 0, 0, 0].tolist() == [9, 0, 0]


def test_collate_packs_samples_into_one_row():
    samples = [
        expand(example([1, X, 5], [_, _, 5]), 2),
        expand(example([1, 6], [_, 6]), 2),
        expand(example([1, X, X, 7], [_, _, _, 7]), 2),
    ]
    pictures = [np.full((2, 2, 3), c, np.uint8) for c in (1, 2, 3)]
    batch = collate([samples], [pictures], Shape(1, 14, 4, 4), 2, 2)
    assert batch["tokens"][0].tolist() == [1, 0, 0, 5, 1, 6, 1, 0, 0, 0, 0, 7, 0, 0]
    assert batch["slots"][0].tolist() == [-1, 0, 1, -1, -1, -1, -1, 2, 3, 4, 5, -1, -1, -1]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 0, 0]
    assert batch["segments"][0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0]
    assert batch["target_at"][0].tolist() == [2, 4, 10, 0]
    assert batch["targets"][0].tolist() == [5, 6, 7, _]
    assert batch["images"][0, :, 0, 0, 0].tolist() == [1, 2, 3, 0]
