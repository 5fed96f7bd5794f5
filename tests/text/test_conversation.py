import json

import pytest

from llava_jax.errors import ConfigError, LlavaError, PromptError
from llava_jax.text.conversation import (
    TEMPLATES,
    find_template,
    render,
    template_pieces,
)
from tests.conftest import json_lines

Q, A = (0, "Why?"), (1, "So.")


def after_system(name, messages):
    return render(name, messages).removeprefix(TEMPLATES[name].system)


def test_vicuna_v1():
    assert after_system("vicuna_v1", [Q, A, (0, "And?"), (1, None)]) == (
        " USER: Why? ASSISTANT: So.</s>USER: And? ASSISTANT:"
    )
    assert TEMPLATES["vicuna_v1"].system.endswith("polite answers to the user's questions.")
    assert TEMPLATES["llava_v1"].system.endswith("polite answers to the human's questions.")


def test_llava_v0():
    assert after_system("llava_v0", [Q, A, (0, "And?"), (1, None)]) == (
        "###Human: Why?###Assistant: So.###Human: And?###Assistant:"
    )


def test_built_in_example_comes_first():
    text = render("v0", [Q, (1, None)])
    assert text.endswith("social instability.\n###Human: Why?###Assistant:")
    assert text.count("###Human: ") == 2


def test_llama_2():
    system = TEMPLATES["llava_llama_2"].system
    assert render("llava_llama_2", [Q, A, (0, "And?"), (1, None)]) == (
        f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\nWhy? [/INST] So. </s><s>[INST] And? [/INST]"
    )
    assert (
        render("mistral_instruct", [Q, A, Q]) == "[INST] Why? [/INST] So. </s>[INST] Why? [/INST]"
    )


def test_mpt():
    assert after_system("mpt", [Q, A, (0, "And?"), (1, None)]) == (
        "<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\nSo.<|im_end|>"
        "<|im_start|>user\nAnd?<|im_end|><|im_start|>assistant\n"
    )


def test_plain():
    assert render("plain", [Q]) == "Why?\n"
    with pytest.raises(PromptError, match="plain"):
        render("plain", [Q, A])


def image_first(name, messages):
    """The demos' form of a first message with an image: its tags go, and one is put before it."""
    template, (role, text) = TEMPLATES[name], messages[0]
    if template.examples:  # the message is not the first of its prompt then
        return messages
    text = text.replace("<image>", "").strip()
    if "mmtag" in template.version:
        shown = [(0, "<Image><image></Image>"), (1, "Received.")]
        return [*shown, (role, text), *messages[1:]]
    return [(role, f"<image>\n{text}"), *messages[1:]]


def test_first_message_with_an_image():
    asked = [(0, "What <image> is it?"), (1, None)]
    assert render("vicuna_v1", image_first("vicuna_v1", asked)).endswith(
        "USER: <image>\nWhat  is it? ASSISTANT:"
    )
    assert after_system("v1_mmtag", image_first("v1_mmtag", asked)) == (
        " USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What  is it? ASSISTANT:"
    )


def test_llama_2_must_start_with_the_user():
    for messages in ([A], [(0, "")], [(0, None), A]):
        with pytest.raises(PromptError, match="first message"):
            render("llama_2", messages)


@pytest.mark.parametrize("name", [n for n in TEMPLATES if TEMPLATES[n].style != "plain"])
def test_pieces_join_to_the_text_and_know_the_answers(name):
    pieces = template_pieces(TEMPLATES[name], [Q, A])
    assert "".join(p.content for p in pieces) == render(name, [Q, A])
    assert [p.content for p in pieces if p.message == 0] == ["Why?"]
    assert [p.content for p in pieces if p.message == 1] == ["So."]
    answer = "".join(p.content for p in pieces if p.answer)
    assert answer.strip().startswith("So.")
    assert answer.endswith(TEMPLATES[name].stop_strings[0])


def test_unknown_template():
    with pytest.raises(ConfigError, match="vicuna_v2"):
        find_template("vicuna_v2")


def test_golden_templates(golden):
    wanted = json.loads((golden / "prompts" / "templates.json").read_text("utf-8"))
    assert wanted
    for name, want in wanted.items():
        have = TEMPLATES[name]
        assert (have.system, list(have.roles), have.sep, have.sep2, have.version) == (
            want["system"],
            want["roles"],
            want["sep"],
            want["sep2"],
            want["version"],
        )
        assert have.style.upper() == want["sep_style"]
        assert len(have.examples) == want["n_messages"] == want["offset"]


def test_golden_prompts(golden):
    for row in json_lines(golden / "prompts" / "prompts.jsonl"):
        messages = [tuple(m) for m in row["messages"]]
        if row["first_is_image_tuple"]:
            messages = image_first(row["template"], messages)
        if "error" in row:
            with pytest.raises(LlavaError):
                render(row["template"], messages)
        else:
            assert render(row["template"], messages) == row["prompt"], row["template"]
