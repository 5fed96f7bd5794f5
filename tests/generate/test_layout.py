"""Prompts as arrays, and the buckets."""

import numpy as np
import pytest

from llava_jax.errors import PromptError
from llava_jax.generate import Prompt
from llava_jax.generate.layout import (
    batch_bucket,
    expand,
    image_bucket,
    lay_out,
    length_bucket,
    room_bucket,
)
from tests.generate.tiny import CONFIG


def test_an_image_slot_widens_to_its_features():
    tokens, slots = expand(np.array([1, -200, 7, -200]), 2)
    assert tokens.tolist() == [1, 0, 0, 7, 0, 0]
    assert slots.tolist() == [-1, 0, 1, -1, 2, 3]


def test_prompts_of_one_batch_are_padded_on_the_right():
    picture = np.full((32, 32, 3), 9, np.uint8)
    rows = lay_out([Prompt([5, 6]), Prompt([7, -200], [picture]), Prompt([8])], CONFIG)
    assert rows.tokens.shape == (4, 16)
    assert rows.tokens[:, :2].tolist() == [[5, 6], [7, 0], [8, 0], [0, 0]]
    assert rows.slots[1, :6].tolist() == [-1, 0, 1, 2, 3, -1]
    assert rows.lengths.tolist() == [2, 5, 1, 1]
    assert rows.images.shape == (4, 1, 32, 32, 3)
    assert rows.images[1, 0, 0, 0, 0] == 9
    assert not rows.images[[0, 2, 3]].any()


def test_buckets_hold_what_they_must_and_waste_little():
    for n in range(1, 5000):
        bucket = length_bucket(n)
        assert n <= bucket <= max(n + 15, 1.25 * n)
    assert len({length_bucket(n) for n in range(1, 4097)}) < 32
    assert [length_bucket(n) for n in (1, 16, 17, 130, 620, 1025)] == [16, 16, 32, 160, 640, 1280]
    assert [room_bucket(n) for n in (1, 32, 33, 128, 129)] == [32, 32, 64, 128, 256]
    assert [batch_bucket(n) for n in (1, 2, 3, 9)] == [1, 2, 4, 16]
    assert [batch_bucket(n, 6) for n in (1, 7)] == [6, 12]
    assert [image_bucket(n) for n in (0, 1, 5, 9)] == [0, 1, 6, 12]


def test_slots_and_images_must_match():
    with pytest.raises(PromptError, match="1 image slots for 0 images"):
        Prompt([1, -200])
    with pytest.raises(PromptError, match="empty"):
        Prompt([])
