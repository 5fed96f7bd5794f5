"""Questions made of training records: only what has an answer, about the images it shows."""

from pathlib import Path

import numpy as np
import pytest

from llava_jax.text.constants import IGNORE
from llava_jax.text.prompt import build_prompt
from llava_jax.text.sample import ExampleMaker
from llava_jax.train.evaluate import Question, questions_of
from tests.generate.tiny import model


def record(*turns: tuple[str, str], **more) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in turns], **more}


def test_a_question_for_each_pair_of_turns():
    asked = questions_of(
        record(
            ("gpt", "hello"),
            ("human", "<image>\nWhat?"),
            ("gpt", "red"),
            ("human", "Where?"),
            ("gpt", "left"),
            ("human", "and?"),
            image="a.png",
            kinds=["colour", "place"],
        ),
        "folder",
    )
    assert asked == [
        Question("folder/a.png", "<image>\nWhat?", "red", "colour"),
        Question("folder/a.png", "<image>\nWhere?", "left", "place"),
    ]


def test_no_image_and_several():
    turns = (("human", "What?"), ("gpt", "red"))
    assert questions_of(record(*turns), "f") == [Question(None, "What?", "red")]
    several = record(("human", "<image><image>\nWhat?"), turns[1], image=["a.png", "b.png"])
    (two,) = questions_of(several, "f")
    assert two.image == ["f/a.png", "f/b.png"]
    assert two.words == "What?"


def test_a_follow_up_stands_after_what_the_record_says_before_it():
    turns = (
        ("human", "<image>\nWhat?"),
        ("gpt", "a ball"),
        ("human", "Which colour?"),
        ("gpt", "red"),
        ("human", "Where?"),
        ("gpt", "left"),
    )
    asked = questions_of(record(*turns, image="a.png"), "f", "conversation")
    first, second = ("<image>\nWhat?", "a ball"), ("Which colour?", "red")
    assert [q.before for q in asked] == [(), (first,), (first, second)]
    assert [m["content"] for m in asked[1].messages()][1:] == [["a ball"], ["Which colour?"]]
    assert [q.before for q in questions_of(record(*turns, image="a.png"), "f")] == [(), (), ()]


def test_a_record_s_own_turns_go_before_the_setting():
    turns = (("human", "What?"), ("gpt", "red"), ("human", "Where?"), ("gpt", "left"))

    def follows(setting, **own):
        return bool(questions_of(record(*turns, **own), "f", setting)[1].before)

    assert not follows("conversation", turns="independent")
    assert follows("independent", turns="conversation")
    assert follows("conversation", turns=3)
    assert follows("conversation")


def talk(*texts: str, images: tuple[str, ...] = ("a", "b")) -> dict:
    return record(*zip(("human", "gpt") * 2, texts), image=list(images))


@pytest.mark.parametrize("turns", ["conversation", "independent"])
@pytest.mark.parametrize(
    "sample",
    [
        talk("First <image>", "x", "Then\n<image>", "y"),
        talk("Compare <image> and <image>", "x", "Why?", "y"),
        talk("<image><image>\nWhat?", "x"),
        talk("No tag", "x", "Why?", "y", images=("a",)),
        talk("<image>", "x", "Is it <image>?", "y", images=("a",)),
        talk("<image>No answer", " ", "Why?", "y", images=("a",)),
        talk("What is an <image>?", "x", "Why?", "y", images=()),
    ],
)
def test_what_is_asked_is_what_was_trained_up_to_the_answer(sample, turns):
    tokenizer = model().tokenizer
    example = ExampleMaker(tokenizer, turns=turns)(sample)
    own = np.zeros(len(example.ids)) if example.turns is None else example.turns
    asked = questions_of(sample, "f", turns)
    assert asked
    assert example.labels is not None
    for n, question in enumerate(asked, 1):
        alone = np.isin(own, [0, n])
        ids, trained = example.ids[alone], example.labels[alone] != IGNORE
        begins = np.flatnonzero(trained & ~np.r_[False, trained[:-1]])
        begin = begins[n - 1 if example.turns is None else 0]
        prompt = build_prompt(question.messages(), tokenizer)
        assert prompt.ids.tolist() == ids[:begin].tolist()
        assert prompt.images == tuple(Path("f", i) for i in example.images[: len(prompt.images)])
