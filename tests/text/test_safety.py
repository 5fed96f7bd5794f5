"""Text that people type never becomes a special token or an image slot, whatever it says."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.conversation import TEMPLATES
from llava_jax.text.prompt import build_prompt
from llava_jax.text.sample import ExampleMaker

TRAPS = (
    "<image>", "</s>", "<s>", "<unk>", "<im_start>", "<im_end>", "<im_patch>", "[INST]", "[/INST]",
    "<<SYS>>\n", "\n<</SYS>>\n\n", "###", "### Human: ", "USER: ", " ASSISTANT: ", "<|im_end|>",
    "<|im_start|>assistant\n", "<Image>", "<image-placeholder>", "-200", "IMAGE_TOKEN_INDEX", "▁",
    " ", "  ", "\n", "\0", "<0x0A>", "</s", ">", "<image", "\ud800", "🌤️", "鬻", "a cat",
)  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(TRAPS), st.text(max_size=3)), min_size=1, max_size=9)
texts = texts.map("".join).filter(str.strip)
# Half of a surrogate pair is no text in UTF-8: such a record is refused.
trainable = texts.filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))
quick = settings(
    max_examples=1000,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def count_special(tokenizer, ids):
    return sum(i in set(tokenizer.special_tokens.values()) for i in ids)


@pytest.mark.parametrize("name", ["im_tok", "legacy_im_tok"])
@quick
@given(text=texts)
def test_encoded_text_holds_no_special_ids(name, request, text):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_bos=False)
    assert count_special(tokenizer, ids) == 0
    assert all(i >= 0 for i in ids)


@quick
@given(
    template=st.sampled_from([n for n in TEMPLATES if TEMPLATES[n].style != "plain"]),
    system=texts,
    first=texts,
    answer=texts,
    second=texts,
)
def test_prompts_hold_the_special_ids_of_their_structure_only(
    im_tok, template, system, first, answer, second
):
    def build(*said):
        image = {"type": "image", "image": "x"}
        return build_prompt(
            [
                {"role": "system", "content": said[0]},
                {"role": "user", "content": [image, {"type": "text", "text": said[1]}]},
                {"role": "assistant", "content": said[2]},
                {"role": "user", "content": said[3]},
            ],
            im_tok,
            template,
            use_im_start_end=True,
        )

    tame, wild = build("a", "a", "a", "a"), build(system, first, answer, second)
    assert wild.ids.tolist().count(IMAGE_TOKEN) == len(wild.images) == 1
    assert count_special(im_tok, wild.ids) == count_special(im_tok, tame.ids)


@quick
@given(question=trainable, answer=trainable, more=trainable)
def test_training_text_is_trained_where_it_is_the_answer(im_tok, question, answer, more):
    """Also where the original loses its way: the trained ids are the answers', each with its end."""
    turns = [("human", question), ("gpt", answer), ("human", more), ("gpt", "the cat")]
    record = {"id": 1, "conversations": [{"from": who, "value": v} for who, v in turns]}
    example = ExampleMaker(im_tok, max_length=None)(record)
    ids, labels = example.ids.tolist(), example.labels.tolist()
    assert IMAGE_TOKEN not in ids
    assert ids.count(im_tok.eos_id) == 2
    trained = [i for i in labels if i != IGNORE]
    first = trained[: trained.index(im_tok.eos_id)]
    # "ASSISTANT:" ends a token, so the answer's ids are those of " " + answer behind any word
    word = im_tok.encode("a:", add_bos=False)
    assert first == im_tok.encode("a: " + answer, add_bos=False)[len(word) :]
    assert im_tok.decode(trained[len(first) + 1 :]) == "the cat</s>"
