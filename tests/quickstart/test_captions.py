"""Reading captions back into what they say."""

import random

import pytest

from llava_jax.errors import SampleError
from llava_jax.quickstart import questions
from llava_jax.quickstart.captions import CaptionWords, phrases
from llava_jax.quickstart.scenes import sample


def test_captions_of_scenes_come_back_as_their_objects():
    for objects in sample(300, 0).objects():
        assert phrases(questions.ask_caption(objects, random.Random(0))[1]) == objects


def test_a_caption_without_a_place():
    assert phrases("an orange circle") == [("orange", "circle", "")]


@pytest.mark.parametrize("caption", ["", "two dogs", "a red circle at", "a red circle and so on"])
def test_other_captions_are_refused(caption):
    with pytest.raises(SampleError, match="caption"):
        phrases(caption)


def test_labels():
    captions = [
        "a red circle at the top left",
        "a blue square at the left and a red square at the top left",
    ]
    words = CaptionWords.of(captions)
    assert words == CaptionWords(("blue", "red"), ("circle", "square"), ("left", "top left"))
    assert words.labels(captions).tolist() == [[[0, 0], [2, 1]], [[1, 2], [2, 2]]]
