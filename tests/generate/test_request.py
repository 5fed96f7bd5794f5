"""A request: what its fields take, and what a message may hold."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest

from llava_jax.errors import ImageError, PromptError
from llava_jax.generate.request import Request
from tests.generate.tiny import model


def test_one_image_and_one_stop_text_need_no_list():
    assert Request("what?", "a.png").images == ("a.png",)
    assert Request("what?", stop="x").stop == ("x",)
    assert Request("what?", stop=None).stop == ()


def test_a_request_can_be_copied_and_changed():
    request = Request("x", seed=5)
    assert copy.copy(request).seed == 5
    assert pickle.loads(pickle.dumps(Request("x", stop="a"))) == Request("x", stop=("a",))
    assert replace(request, seed=7).seed == 7


def said(**more):
    return {"role": "user", "content": "what?", **more}


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([said(images=["a.png"])], "message 0: 'images'"),
        ([said(), said(image=np.zeros((2, 2, 3)))], "message 1: 'image'"),
        ([said(content=[{"type": "text", "text": "a", "image": "a.png"}])], "message 0: 'image'"),
        ([said(content={"type": "text", "text": "a", "image": "a.png"})], "message 0: 'image'"),
    ],
)
def test_a_picture_that_would_not_be_seen_is_refused(messages, says):
    with pytest.raises(PromptError, match=says):
        Request(messages).message_list()


def test_an_empty_place_for_pictures_is_no_picture():
    parts = [{"type": "text", "text": "a", "image": None}]
    messages = [said(images=[], image=None), said(content=parts)]
    assert Request(messages).message_list() == messages


def test_a_batch_that_breaks_off_leaves_nothing_in_line():
    asked, told = [Request("what?"), Request("what?", b"no picture")], []
    with pytest.raises(ImageError):
        model().generate_batch(asked, batch_size=1)
    assert model().engine().queued == 0

    def interrupted(*counts):
        told.append(counts)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model().generate_batch(asked, batch_size=1, on_error="reply", progress=interrupted)
    assert told == [(1, 2)]
    assert model().engine().queued == 0
