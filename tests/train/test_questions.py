"""Questions made of training records: only what has an answer, about the images it shows."""

from llava_jax.train.evaluate import Question, questions_of


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
        Question("folder/a.png", "What?", "red", "colour"),
        Question("folder/a.png", "Where?", "left", "place"),
    ]


def test_no_image_and_several():
    turns = (("human", "What?"), ("gpt", "red"))
    assert questions_of(record(*turns), "f") == [Question(None, "What?", "red")]
    (two,) = questions_of(record(*turns, image=["a.png", "b.png"]), "f")
    assert two.image == ["f/a.png", "f/b.png"]


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
    first, second = ("What?", "a ball"), ("Which colour?", "red")
    assert [q.before for q in asked] == [(), (first,), (first, second)]
    assert [m["content"] for m in asked[1].messages()] == ["What?", "a ball", "Which colour?"]
    assert [q.before for q in questions_of(record(*turns, image="a.png"), "f")] == [(), (), ()]


def test_a_record_s_own_turns_go_before_the_setting():
    turns = (("human", "What?"), ("gpt", "red"), ("human", "Where?"), ("gpt", "left"))

    def follows(setting, **own):
        return bool(questions_of(record(*turns, **own), "f", setting)[1].before)

    assert not follows("conversation", turns="independent")
    assert follows("independent", turns="conversation")
    assert follows("conversation", turns=3)
    assert follows("conversation")
