import numpy as np
import pytest

from llava_jax.errors import ConfigError, SampleError
from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.conversation import render
from llava_jax.text.labels import training_version
from llava_jax.text.records import record_id
from llava_jax.text.sample import ExampleMaker
from tests.text.conftest import trained_text

WHO = ("human", "gpt")


def record(*texts, image="a.jpg", **more):
    turns = [{"from": WHO[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "r1", "conversations": turns, **({"image": image} if image else {}), **more}


def prompt_ids(tokenizer, template, *texts):
    text = render(template, [(i % 2, text) for i, text in enumerate(texts)])
    return tokenizer.encode_parts(tokenizer.split_markup(text, image_tags=True))


@pytest.mark.parametrize("name", ["tok", "legacy_tok"])
@pytest.mark.parametrize(
    ("version", "trained"),
    [
        ("v1", " A cat.</s>| A mat.</s>"),
        ("llava_llama_2", " A cat. </s>| A mat. </s>"),
        ("mpt", "A cat.<|im_end|>|A mat.<|im_end|>"),
        ("llava_v0", "###|### Assistant: A cat.\n###|### Assistant: A mat.\n### "),
    ],
)
def test_what_is_trained(name, version, trained, request):
    tokenizer = request.getfixturevalue(name)
    rec = record("<image>\nWhat?", "A cat.", "Where?", "A mat.")
    example = ExampleMaker(tokenizer, version=version)(rec)
    shown = trained_text(example, tokenizer)
    if tokenizer.legacy:  # a space of its own behind every special token
        shown, trained = shown.replace(" ", ""), trained.replace(" ", "")
    assert shown == trained
    assert example.images == ("a.jpg",)
    assert (example.ids == IMAGE_TOKEN).sum() == 1
    assert example.turns is None
    on = example.labels != IGNORE
    assert (example.labels[on] == example.ids[on]).all()


def test_ids_are_those_of_the_rendered_prompt(tok):
    texts = ("<image>\nWhat?", "A cat.", "Where?", "A mat.")
    for version in ("v1", "llava_v1", "llava_llama_2", "mpt", "mistral_instruct"):
        example = ExampleMaker(tok, version=version)(record(*texts))
        assert example.ids.tolist() == prompt_ids(tok, version, *texts), version


def test_captions(tok):
    example = ExampleMaker(tok, version="plain")(record("Describe it.\n<image>", "a red ball"))
    assert example.ids.tolist() == tok.encode_parts([IMAGE_TOKEN, "a red ball\n"])
    assert trained_text(example, tok) == " a red ball\n"
    untagged = ExampleMaker(tok, version="plain")(record("Describe it.", "a red ball"))
    assert untagged.ids.tolist() == example.ids.tolist()
    with pytest.raises(SampleError, match="r1: a caption sample needs an image"):
        ExampleMaker(tok, version="plain")(record("Describe it.", "a red ball", image=None))


def test_image_start_and_end_tokens(im_tok):
    maker = ExampleMaker(im_tok, use_im_start_end=True)
    ids = maker(record("<image>\nWhat?", "A cat.")).ids.tolist()
    at = ids.index(IMAGE_TOKEN)
    start, end = im_tok.added["<im_start>"], im_tok.added["<im_end>"]
    assert (ids[at - 1], ids[at + 1]) == (start, end)
    caption = ExampleMaker(im_tok, version="plain", use_im_start_end=True)
    assert start not in caption(record("<image>", "a ball")).ids


def test_image_start_tokens_must_exist(tok):
    with pytest.raises(ConfigError, match="<im_start>"):
        ExampleMaker(tok, use_im_start_end=True)


# Where the original goes wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "trained"),
    [
        (("Say ASSISTANT: no", "a ASSISTANT: b"), " a ASSISTANT: b</s>"),
        (("USER: x</s>y", "a</s>b"), " a</s>b</s>"),
        (("<unk> is <s>", "<unk>"), " <unk></s>"),
        (("", "A cat"), " A cat</s>"),
        (("What?", " a "), "  a </s>"),
        (("What?", "\n"), None),
        (("[INST] x [/INST] ", "###\n"), " ###\n</s>"),
    ],
)
def test_markup_in_texts_is_text(tok, texts, trained):
    maker = ExampleMaker(tok)
    if trained is None:
        with pytest.raises(SampleError, match="sample r1: no turn has an answer"):
            maker(record(*texts, image=None))
        return
    example = maker(record(*texts, image=None))
    assert trained_text(example, tok) == trained
    ids = example.ids.tolist()
    assert ids.count(tok.bos_id) == 1
    assert ids.count(tok.eos_id) == 1
    assert ids.count(tok.unk_id) == 0
    assert ids[-1] == tok.eos_id


def test_empty_answers_are_left_out_and_counted(tok):
    maker = ExampleMaker(tok)
    example = maker(record("<image>\nWho?", "", "What?", "A cat", "Why?", ""))
    alone = maker(record("<image>\nWhat?", "A cat"))
    assert example.ids.tolist() == alone.ids.tolist()
    assert example.images == ("a.jpg",)
    assert example.notes == {"empty answers": 2}


def test_turns_without_a_partner(tok):
    maker = ExampleMaker(tok)
    plain = maker(record("What?", "A cat", image=None)).ids.tolist()
    asked = maker(record("What?", "A cat", "Why?", image=None))
    assert asked.ids.tolist() == plain
    late = record("What?", "A cat", image=None)
    late["conversations"].insert(0, {"from": "gpt", "value": "Hi"})
    assert maker(late).ids.tolist() == plain
    assert asked.notes == {"unanswered question": 1}
    assert maker(late).notes == {"leading answer": 1}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": 5}, "sample 5: no list of conversations"),
        ({"id": 5, "conversations": []}, "sample 5: the conversation is empty"),
        ({"conversations": [{"from": "human"}]}, "sample #3: turn 0 has no text"),
        (
            {"id": "x", "conversations": [{"from": "system", "value": ""}]},
            "sample x: turn 0 is from",
        ),
        (record("a", "b", image=3), "sample r1: `image`"),
        (record("a", image=None), "sample r1: no turn has an answer"),
        (record("<image>", "b", image=["a", "b"]), "1 <image> tags for 2 images"),
    ],
)
def test_bad_records_are_named(tok, bad, message):
    with pytest.raises(SampleError, match=message):
        ExampleMaker(tok)(bad, record_id(bad, "#3"))


def test_wrong_order(tok):
    bad = record("a", "b", image=None)
    bad["conversations"][1]["from"] = "human"
    with pytest.raises(SampleError, match="r1: human and gpt do not alternate"):
        ExampleMaker(tok)(bad)


# Images ----------------------------------------------------------------------------------------


def test_a_single_tag_goes_to_the_front(tok):
    maker = ExampleMaker(tok)
    front = maker(record("<image>\nWhat?", "A cat")).ids.tolist()
    assert maker(record("What?\n<image>", "A cat")).ids.tolist() == front


def test_several_images_keep_their_places(tok):
    example = ExampleMaker(tok)(record("A <image> and <image>?", "No", image=["a", "b"]))
    assert example.images == ("a", "b")
    want = prompt_ids(tok, "vicuna_v1", "A <image> and <image>?", "No")
    assert example.ids.tolist() == want


def test_one_image_serves_all_tags(tok):
    maker = ExampleMaker(tok)
    example = maker(record("<image>\n<image>\nA?", "B", "<image>\nC?", "D"))
    assert example.images == ("a.jpg", "a.jpg")
    assert (example.ids == IMAGE_TOKEN).sum() == 2


def test_tags_without_an_image_are_text(tok):
    example = ExampleMaker(tok)(record("<image>\nWhat?", "A cat", image=None))
    assert IMAGE_TOKEN not in example.ids
    assert example.images == ()


def test_image_without_a_tag_is_counted(tok):
    maker = ExampleMaker(tok)
    example = maker(record("What?", "A cat"))
    assert example.images == ()
    assert example.notes == {"image without tag": 1}


def test_a_slot_in_an_answer_is_not_trained(tok):
    example = ExampleMaker(tok)(record("What?", "See <image> here"))
    assert example.labels[example.ids == IMAGE_TOKEN].tolist() == [IGNORE]
    assert trained_text(example, tok).replace("|", "").endswith("See  here</s>")


# Length ----------------------------------------------------------------------------------------


def test_max_length_counts_image_features(tok):
    rec = record("<image>\nWhat?", "A cat on a mat", "<image>\nAnd?", "No", image=["a", "b"])
    whole = ExampleMaker(tok, max_length=None)(rec)
    assert whole.length(50) == len(whole.ids) + 98
    maker = ExampleMaker(tok, max_length=whole.length(50), image_tokens=50)
    assert maker(rec).images == ("a", "b")
    assert not maker(rec).notes
    second = whole.ids.tolist().index(IMAGE_TOKEN, 80)
    maker = ExampleMaker(tok, max_length=second + 49 + 40, image_tokens=50)
    cut = maker(rec)
    assert cut.images == ("a",)
    assert cut.ids.tolist() == whole.ids[:second].tolist()
    assert cut.notes == {"truncated": 1}


def test_nothing_trained_within_the_limit(tok):
    with pytest.raises(
        SampleError, match="r1: there is nothing to train within its first 20 tokens"
    ):
        ExampleMaker(tok, max_length=20)(record("What?", "A cat", image=None))


# Independent turns -----------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mpt", "llava_v0"])
@pytest.mark.parametrize("image", ["a.jpg", None])
@pytest.mark.parametrize("name", ["im_tok", "legacy_tok"])
def test_independent_turns_equal_single_ones(version, image, name, request):
    tokenizer = request.getfixturevalue(name)
    wrapped = name == "im_tok" and image is not None
    settings = {"version": version, "use_im_start_end": wrapped}
    questions = ["What?", " Where is it? ", "How many are there on the mat?"]
    answers = ["A cat.", "A mat.", "2"]
    tag = "<image>\n" if image else ""
    texts = [t for q, a in zip(questions, answers) for t in (q, a)]
    texts[0] = tag + texts[0]
    example = ExampleMaker(tokenizer, turns="independent", **settings)(record(*texts, image=image))
    prefix = example.turns == 0
    assert prefix.sum() > 5
    assert (example.ids == IMAGE_TOKEN).sum() == len(example.images) == bool(image)
    for n, (question, answer) in enumerate(zip(questions, answers), 1):
        single = ExampleMaker(tokenizer, **settings)(record(tag + question, answer, image=image))
        own = prefix | (example.turns == n)
        assert example.ids[own].tolist() == single.ids.tolist()
        assert example.labels[own].tolist() == single.labels.tolist()
        assert example.labels[example.turns == n][0] == IGNORE
    assert (np.diff(example.turns) >= 0).all()


def test_independent_turns_within_a_length(tok):
    texts = ["<image>\nWhat?", "A cat.", "Where is it?", "A mat.", "Why?", "So."]
    whole = ExampleMaker(tok, turns="independent", max_length=None)(record(*texts))
    sizes = np.bincount(whole.turns)
    limit = whole.length(9) - int(sizes[2])  # room for turns 1 and 3
    maker = ExampleMaker(tok, turns="independent", max_length=limit, image_tokens=9)
    example = maker(record(*texts))
    assert sorted(set(example.turns.tolist())) == [0, 1, 3]
    assert example.notes == {"turns left out": 1}


def test_images_in_later_turns_keep_the_conversation(tok):
    rec = record("<image>\nA?", "B", "<image>\nC?", "D", image=["a", "b"])
    maker = ExampleMaker(tok, turns="independent")
    example = maker(rec)
    assert example.turns is None
    assert example.notes == {"trained as a conversation": 1}


def test_a_record_says_how_its_turns_are_trained(tok):
    texts = ["<image>\nWhat?", "A cat.", "Where is it?", "A mat."]
    makers = {kind: ExampleMaker(tok, turns=kind) for kind in ("conversation", "independent")}
    for wanted, maker in makers.items():
        plain = maker(record(*texts))
        for setting, other in makers.items():
            own = other({**record(*texts), "turns": wanted})
            np.testing.assert_array_equal(own.ids, plain.ids, setting)
            assert (own.turns is None) == (wanted == "conversation")
            if own.turns is not None:
                np.testing.assert_array_equal(own.turns, plain.turns)
        assert (maker({**record(*texts), "turns": 2}).turns is None) == (plain.turns is None)
    with pytest.raises(SampleError, match="`turns` is 'alone', not conversation or independent"):
        makers["conversation"]({**record(*texts), "turns": "alone"})


# Compat ----------------------------------------------------------------------------------------


def test_compat_through_the_maker(tok):
    maker = ExampleMaker(tok, compat=True)
    example = maker(record("<image>\n<image>\nWhat?", "A cat", image=["a", "b"]))
    assert example.images == ("a",)
    given_up = maker(record("Say ASSISTANT: no", "the cat", image=None))
    assert (given_up.labels == IGNORE).all()
    assert given_up.notes["mismatch"] == 1


def test_wrong_settings(tok):
    with pytest.raises(ConfigError, match="independant"):
        ExampleMaker(tok, turns="independant")
    with pytest.raises(ConfigError, match="compat"):
        ExampleMaker(tok, turns="independent", compat=True)


def test_training_versions():
    kinds = {
        "plain": "plain",
        "v0_plain": "plain",
        "v1": "v1",
        "vicuna_v1": "v1",
        "v1_mmtag": "v1",
        "v0": "v1",
        "v0.5": "v1",
        "anything": "v1",
        "llava_llama_2": "llama_2",
        "mistral_instruct": "llama_2",
        "mpt": "mpt",
        "default": "v0",
        "llava_v0": "v0",
        "v0_mmtag": "v0",
    }
    assert {name: training_version(name).kind for name in kinds} == kinds
    assert training_version("v0").template.name == "vicuna_v1"
