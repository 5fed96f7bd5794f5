"""Beam search by the user's API; its rules are compared in tests/parity/test_generate_hf.py."""

import gc
import weakref

import pytest

from llava_jax.errors import ConfigError
from llava_jax.generate import Engine
from tests.generate.tiny import model, params, tokenizer


def test_beam_search_gives_the_best_first_and_refuses_by_name():
    several = model().generate_n("what?", n=2, num_beams=2, max_new_tokens=4)
    means = [sum(reply.logprobs) / len(reply.ids) for reply in several]
    assert means == sorted(means, reverse=True)
    assert several[0].text == tokenizer().decode(several[0].ids, skip_special=True).strip()
    for bad, says in (
        ({"n": 3, "num_beams": 2}, "n is 3"),
        ({"n": 0}, "n is 0"),
        (
            {"n": 1, "num_beams": 2, "temperature": 0.5},
            "temperature cannot be given with num_beams",
        ),
        ({"n": 1, "num_beams": 2, "response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 1, "num_beams": 2, "length_penalty": "a"}, "length_penalty"),
    ):
        with pytest.raises(ConfigError, match=says):
            model().generate_n("what?", **bad)
    with pytest.raises(ConfigError, match="num_beams"):
        model().stream("what?", num_beams=2)


def test_the_memory_of_an_engine_goes_with_its_last_reference(monkeypatch):
    made = []

    def engine(*args, **how):
        assert not any(one() for one in made)
        new = Engine(*args, **how)
        made.append(weakref.ref(new))
        return new

    monkeypatch.setattr("llava_jax.model.Engine", engine)
    gc.disable()
    try:
        model()._engines.clear()
        model().generate("what?", num_beams=2, max_new_tokens=4)
        model().engine(2)
        model().engine(4)
        model().drop_params()
        assert [one() for one in made] == [None] * 3
    finally:
        gc.enable()
        model().generator.set_params(params(model().config))
