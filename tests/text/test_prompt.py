import pytest

from llava_jax.errors import ConfigError, PromptError
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.conversation import TEMPLATES, render
from llava_jax.text.prompt import build_prompt
from llava_jax.text.show import text_of
from tests.text.conftest import trained_text

IMAGE = {"type": "image", "image": "cat.jpg"}


def user(*content):
    return {"role": "user", "content": list(content) if len(content) > 1 else content[0]}


def bot(text):
    return {"role": "assistant", "content": text}


def text_ids(tokenizer, template, messages):
    parts = tokenizer.split_markup(render(template, messages), image_tags=True)
    return tokenizer.encode_parts(parts)


CHATTY = [name for name in TEMPLATES if TEMPLATES[name].style != "plain" and "mmtag" not in name]


@pytest.mark.parametrize("name", ["tok", "legacy_tok"])
@pytest.mark.parametrize("template", CHATTY)
def test_ids_equal_the_rendered_text(template, name, request):
    tokenizer = request.getfixturevalue(name)
    messages = [user(IMAGE, "What is it?"), bot("A cat."), user("Where?")]
    prompt = build_prompt(messages, tokenizer, template)
    rows = [(0, "<image>\nWhat is it?"), (1, "A cat."), (0, "Where?"), (1, None)]
    assert prompt.ids.tolist() == text_ids(tokenizer, template, rows)
    assert prompt.images == ("cat.jpg",)
    assert prompt.labels is None


def test_plain_template(tok):
    prompt = build_prompt([user(IMAGE)], tok, "plain")
    assert prompt.ids.tolist() == tok.encode_parts([IMAGE_TOKEN, "\n"])


def test_mmtag_templates_wrap_images_in_text(tok):
    prompt = build_prompt([user(IMAGE, "What?")], tok, "v1_mmtag")
    assert "USER: <Image><image> </Image>\nWhat? ASSISTANT:" in text_of(prompt.ids, tok)


def test_slots_stand_where_images_stand(tok):
    other = {"type": "image", "path": "dog.jpg"}
    web = {"type": "image_url", "image_url": {"url": "data:x"}}
    prompt = build_prompt([user("Compare", IMAGE, "with\n", other, web, "now")], tok)
    assert prompt.images == ("cat.jpg", "dog.jpg", "data:x")
    assert prompt.ids.tolist().count(IMAGE_TOKEN) == 3
    # The tokenizer puts a space in front of every stretch of text.
    shown = text_of(prompt.ids, tok)
    assert "USER: Compare\n<image> \nwith\n<image> \n<image> \nnow ASSISTANT:" in shown


def test_images_in_later_turns(tok):
    prompt = build_prompt([user("Hi"), bot("Hello"), user(IMAGE, "What?")], tok)
    rows = [(0, "Hi"), (1, "Hello"), (0, "<image>\nWhat?"), (1, None)]
    assert prompt.ids.tolist() == text_ids(tok, "vicuna_v1", rows)


def test_start_and_end_tokens(im_tok, tok):
    prompt = build_prompt([user(IMAGE, "What?")], im_tok, use_im_start_end=True)
    at = prompt.ids.tolist().index(IMAGE_TOKEN)
    added = im_tok.added
    assert (prompt.ids[at - 1], prompt.ids[at + 1]) == (added["<im_start>"], added["<im_end>"])
    rows = [(0, "<im_start><image><im_end>\nWhat?"), (1, None)]
    assert prompt.ids.tolist() == text_ids(im_tok, "vicuna_v1", rows)
    with pytest.raises(ConfigError, match="<im_start>"):
        build_prompt([user(IMAGE)], tok, use_im_start_end=True)


def test_tags_in_text_are_text(tok):
    prompt = build_prompt([user(IMAGE, "Is <image> a </s> tag?")], tok)
    assert prompt.ids.tolist().count(IMAGE_TOKEN) == 1
    assert tok.eos_id not in prompt.ids


@pytest.mark.parametrize("template", ["vicuna_v1", "llava_llama_2", "mistral_instruct", "mpt"])
def test_system_message_is_plain_text(tok, template):
    messages = [{"role": "system", "content": "Be </s> brief."}, user("Hi")]
    prompt = build_prompt(messages, tok, template)
    shown = text_of(prompt.ids, tok)
    assert "Be </s> brief." in shown
    assert TEMPLATES[template].system[-40:] not in shown or not TEMPLATES[template].system
    assert tok.eos_id not in prompt.ids


def test_system_message_in_the_templates_own_words(tok):
    system = TEMPLATES["vicuna_v1"].system
    messages = [{"role": "system", "content": system}, user("Hi")]
    same = build_prompt([user("Hi")], tok).ids.tolist()
    assert build_prompt(messages, tok).ids.tolist() == same


def test_closed_turns(tok):
    messages = [user("Hi"), bot("Hello")]
    prompt = build_prompt(messages, tok, open_turn=False)
    assert text_of(prompt.ids, tok).endswith("USER: Hi ASSISTANT: Hello</s>")
    assert trained_text(prompt, tok) == " Hello</s>"
    with pytest.raises(PromptError, match="last message"):
        build_prompt(messages, tok)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi", "must be a list"),
        ([], "the last message must be the user's"),
        ([bot("Hi")], "message 0 is from the assistant"),
        ([user("a"), user("b")], "message 1 is from the user"),
        ([{"role": "tool", "content": "x"}], "message 0 has role 'tool'"),
        ([{"role": "user"}], "message 0 has no content"),
        ([user("")], "message 0 is empty"),
        ([user("", "")], "message 0 is empty"),
        ([user({"type": "image"})], "message 0: an image part holds no image"),
        ([user({"type": "audio"}, "x")], "message 0: a content part"),
        ([{"role": "system", "content": []}, user("a")], "system message"),
        ([{"role": "system", "content": "s"}, bot("Hi")], "message 1 is from the assistant"),
        ([{"role": "system", "content": "s"}, user("a"), bot("")], "message 2 is empty"),
        ([{"role": "system", "content": "s"}] * 2, "message 1 has role 'system'"),
    ],
)
def test_bad_messages(tok, messages, message):
    with pytest.raises(PromptError, match=message):
        build_prompt(messages, tok)


def test_unknown_template(tok):
    with pytest.raises(ConfigError, match="no template"):
        build_prompt([user("a")], tok, "vicuna")
