"""Batches, as rows of numbers that can be checked by eye."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from llava_jax.batch import (
    Buckets,
    Shape,
    Size,
    batch_bucket,
    collate,
    expand,
    image_bucket,
    length_bucket,
    prompt_shape,
    room_bucket,
    size_of,
)
from llava_jax.errors import SampleError
from llava_jax.text.example import Example
from tests.generate.tiny import CONFIG

X = -200  # an image slot
_ = -100  # not trained


MODEL = SimpleNamespace(image_tokens=2, image_span=2, vision=SimpleNamespace(image_size=2))


def example(ids, labels, turns=None, images=None) -> Example:
    if images is None:
        images = tuple(f"{i}.png" for i in range(ids.count(X)))
    return Example(ids, images, labels, turns, "7")


def with_pixels(one: Example, *values: int) -> Example:
    """Images that hold one value each."""
    return replace(one, images=[np.full((2, 2, 3), v, np.uint8) for v in values])


def lists(sample, *names):
    return [sample[n].tolist() for n in names]


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


def test_two_images_and_none():
    sample = expand(example([1, X, 5, X, 6], [_, _, _, _, 6]), 2)
    assert lists(sample, "tokens", "slots") == [
        [1, 0, 0, 5, 0, 0, 6],
        [-1, 0, 1, -1, 2, 3, -1],
    ]
    sample = expand(example([1, 5, 6], [_, 5, 6]), 2)
    assert lists(sample, "slots", "target_at", "targets") == [[-1, -1, -1], [0, 1], [5, 6]]


def test_an_image_may_span_more_positions_than_it_has_entries():
    sample = expand(Example([1, X, 7, X, 8], ["a", "b"]), 2, 5)
    assert sample["slots"].tolist() == [-1, 0, 1, -1, 2, 3, -1]
    # The network adds where in the image each feature stands.
    assert sample["positions"].tolist() == [0, 1, 1, 6, 7, 7, 12]


def test_a_question_has_no_targets():
    assert lists(expand(Example([1, X, 7, X], ["a", "b"]), 2), "tokens", "slots") == [
        [1, 0, 0, 7, 0, 0],
        [-1, 0, 1, -1, 2, 3],
    ]
    assert set(expand(Example([1]), 2)) == {"tokens", "slots", "positions", "turns"}


def test_the_first_token_is_never_predicted():
    one = example([5, 6], [5, 6])
    assert expand(one, 2)["target_at"].tolist() == [0]
    assert one.target_count == 1


def test_an_image_is_no_target():
    one = example([1, X, 6], [_, X, 6])
    assert expand(one, 2)["targets"].tolist() == [6]
    assert one.target_count == 1


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


def test_errors_name_the_sample():
    with pytest.raises(SampleError, match="sample 7: independent turns"):
        expand(example([1, 5, 6], [_, 5, 6], [1, 0, 1]), 3)
    with pytest.raises(
        SampleError,
        match=r"sample 7: needs 9 positions, more than the largest of data.length_buckets, 8",
    ):
        Buckets((4, 8), (0,), (9,)).hold(Size(9, 0, 1), "7")


def sample_of(length: int, images: int = 0, name: str = "s"):
    ids = [1] + [X] * images + [5] * (length - 1 - 2 * images)
    labels = [_] * (1 + images) + ids[1 + images :]
    return replace(example(ids, labels), id=name)


def test_sizes_add_up_within_a_row():
    assert size_of([sample_of(9, 2), sample_of(4)], 2) == Size(13, 2, 7)
    assert size_of([], 2) == Size(0, 0, 0)
    assert Size(3, 0, 2).fits(Size(3, 0, 2))
    assert not Size(3, 1, 2).fits(Size(9, 0, 9))


def test_shapes_come_from_buckets():
    buckets = Buckets((4, 8, 16), (0, 1, 4), (2, 8))
    assert buckets.hold(Size(9, 2, 7)) == Size(16, 4, 8)
    assert Buckets((4, 8), (0, 1), (2,)).hold(Size(1, 0, 1)) == Size(4, 0, 2)
    with pytest.raises(SampleError, match=r"sample s: needs 9 .*data\.length_buckets"):
        buckets._replace(length=(4, 8)).hold(Size(9, 2, 7), "s")


def test_buckets_of_questions_hold_what_they_must_and_waste_little():
    for n in range(1, 5000):
        assert n <= length_bucket(n) <= max(n + 15, 1.25 * n)
    assert len({length_bucket(n) for n in range(1, 4097)}) < 32
    assert [length_bucket(n) for n in (1, 16, 17, 130, 620, 1025)] == [16, 16, 32, 160, 640, 1280]
    assert [length_bucket(n, 64) for n in (1, 65, 130, 620)] == [64, 128, 192, 640]
    assert [room_bucket(n) for n in (1, 32, 33, 128, 129)] == [32, 32, 64, 128, 256]
    assert [batch_bucket(n) for n in (1, 2, 3, 9)] == [1, 2, 4, 16]
    assert [batch_bucket(n, 6) for n in (1, 7)] == [6, 12]
    assert [image_bucket(n) for n in (0, 1, 5, 9)] == [0, 1, 6, 12]


def test_collate_one_sample_per_row():
    samples = [with_pixels(example([1, X, 5, 2], [_, _, 5, 2]), 9), example([1, 6], [_, 6])]
    batch = collate([[s] for s in samples], Shape(3, 6, 1, 3), MODEL)
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
        with_pixels(example([1, X, 5], [_, _, 5]), 1),
        example([1, 6], [_, 6]),
        with_pixels(example([1, X, X, 7], [_, _, _, 7]), 2, 3),
    ]
    batch = collate([samples], Shape(1, 14, 4, 4), MODEL)
    assert batch["tokens"][0].tolist() == [1, 0, 0, 5, 1, 6, 1, 0, 0, 0, 0, 7, 0, 0]
    assert batch["slots"][0].tolist() == [-1, 0, 1, -1, -1, -1, -1, 2, 3, 4, 5, -1, -1, -1]
    assert batch["positions"][0].tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5, 0, 0]
    assert batch["segments"][0].tolist() == [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 0, 0]
    assert batch["target_at"][0].tolist() == [2, 4, 10, 0]
    assert batch["targets"][0].tolist() == [5, 6, 7, _]
    assert batch["images"][0, :, 0, 0, 0].tolist() == [1, 2, 3, 0]


def test_rows_of_a_group_share_images_and_targets():
    first = with_pixels(example([1, X, 7, 8], [_, _, 7, 8]), 10)
    second = example([5, 6], [_, 6])
    third = with_pixels(example([1, X, 9], [_, _, 9]), 20)
    batch = collate([[first], [second, third], [third], []], Shape(4, 7, 2, 5, 2), MODEL)
    assert batch["slots"].tolist()[:3] == [
        [-1, 0, 1, -1, -1, -1, -1],
        [-1, -1, -1, 2, 3, -1, -1],
        [-1, 0, 1, -1, -1, -1, -1],
    ]
    assert batch["images"][:, :, 0, 0, 0].tolist() == [[10, 20], [20, 0]]
    assert batch["target_at"].tolist() == [[2, 3, 7, 11, 0], [2, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[7, 8, 6, 9, _], [9, _, _, _, _]]
    assert Shape(8, 7, 2, 5, 4).part(2) == Shape(2, 7, 2, 5, 1)
    assert Shape(8, 7, 2, 5).part(2) == Shape(2, 7, 2, 5)


def test_prompts_of_one_batch_are_padded_on_the_right():
    picture = np.full((32, 32, 3), 9, np.uint8)
    prompts = [Example([5, 6]), Example([7, X], [picture]), Example([8])]
    batch = collate([[p] for p in prompts], prompt_shape(prompts, CONFIG), CONFIG)
    assert batch["tokens"].shape == (4, 16)
    assert batch["tokens"][:, :2].tolist() == [[5, 6], [7, 0], [8, 0], [0, 0]]
    assert batch["slots"][1, :6].tolist() == [-1, 0, 1, 2, 3, -1]
    assert (batch["segments"] > 0).sum(1).tolist() == [2, 5, 1, 0]
    assert batch["images"].shape == (4, 1, 32, 32, 3)
    assert batch["images"][1, 0, 0, 0, 0] == 9
    assert not batch["images"][[0, 2, 3]].any()
    assert "targets" not in batch
