"""Boxes in pixels, on the padded square and in thousandths."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.datasets import boxes
from llava_jax.datasets.sources.regions import region_pair
from llava_jax.errors import SampleError


def test_a_box_is_normalised_after_padding_to_a_square():
    # 640 x 480: margins of 80 above and below, side 640.
    assert boxes.to_padded((64, 48, 320, 240), 640, 480) == (0.1, 0.2, 0.5, 0.5)
    # 3 x 6: 1 pixel on the left, 2 on the right, as expand2square divides an odd margin.
    assert boxes.to_padded((0, 0, 3, 6), 3, 6) == (1 / 6, 0, 4 / 6, 1)
    assert boxes.to_padded((-9, -9, 999, 999), 640, 480) == (0, 80 / 640, 1, 560 / 640)


def test_text_of_a_box_has_two_decimals_and_no_zero_at_the_end():
    assert boxes.box_text((0.284, 0.8, 0.476, 1)) == "[0.28, 0.8, 0.48, 1.0]"
    assert boxes.read_box("It is at [0.28, 0.8,0.48, 1.0].") == (0.28, 0.8, 0.48, 1.0)
    assert boxes.read_box("nowhere [1, 2, 3]") is None


@pytest.mark.parametrize("box", [(math.nan, 0, 9, 9), (5, 5, 5, 9), (9, 9, 5, 5), (-9, -9, 0, 0)])
def test_a_box_without_an_area_is_no_region(box):
    assert region_pair("a cat", box, 64, 48, random.Random(0)) is None


def test_thousandths_are_of_the_picture_itself():
    assert boxes.to_thousand((64, 48, 320, 240), 640, 480) == (100, 100, 500, 500)
    assert boxes.from_thousand((100, 100, 500, 500), 640, 480) == (64, 48, 320, 240)
    assert boxes.to_thousand((-1, 0, 700, 480), 640, 480) == (0, 0, 1000, 1000)


def test_a_picture_without_a_size_is_refused():
    with pytest.raises(SampleError, match="0 x 5 pixels"):
        boxes.to_padded((0, 0, 1, 1), 0, 5)


@given(st.integers(1, 2000), st.integers(1, 2000), st.tuples(*[st.floats(0, 1)] * 4))
def test_both_ways(width, height, share):
    box = (share[0] * width, share[1] * height, share[2] * width, share[3] * height)
    there = boxes.to_padded(box, width, height)
    assert boxes.from_padded(there, width, height) == pytest.approx(
        box, abs=1e-9 * max(width, height)
    )
    assert all(0 <= v <= 1 for v in there)
    back = boxes.from_thousand(boxes.to_thousand(box, width, height), width, height)
    assert back == pytest.approx(box, abs=0.0005 * max(width, height) + 1e-6)
