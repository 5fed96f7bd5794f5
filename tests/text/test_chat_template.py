"""Jinja chat templates: ours give our prompts, known ones are recognised, foreign ones are not."""

import pytest

from llava_jax.text.chat_template import jinja, recognise, spoken
from llava_jax.text.conversation import ASSISTANT, TEMPLATES, USER, render

HF_VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% for content in message['content'] "
    "| selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}"
    "{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token}}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (HF_VICUNA, "vicuna_v1"),
        (LLAMA_2, "llava_llama_2"),
        (MISTRAL, "mistral_instruct"),
        (CHATML, "chatml_direct"),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "plain"),
        ("{% for m in messages %}{{ m.role.capitalize() }}: {{ m.content }}###{% endfor %}", None),
        (PHI, None),
        (HF_VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: Sure!'"), None),
        (HF_VICUNA.replace("{% for", "You are a radiologist. {% for", 1), None),
        (CHATML.replace("{% for", "{{ '<|im_start|>system\nYou are Q.' }}{% for", 1), None),
        (MISTRAL.replace("[INST]", "<start_of_turn>"), None),
        ("", "plain"),
        ("{{ broken", None),
    ],
)
def test_templates_are_recognised_by_what_they_say(text, name):
    assert recognise(text) == name


def test_what_is_compared_or_raised_is_not_said():
    assert (
        spoken("{% if m['role'] == 'user' %}{{ raise_exception('no') }}{% endif %}A {{ 'b' }}")
        == "A b"
    )


EXPORTED = sorted(n for n, t in TEMPLATES.items() if not t.examples and "mmtag" not in t.version)


@pytest.mark.parametrize("name", EXPORTED)
def test_our_own_are_recognised(name):
    same = recognise(jinja(TEMPLATES[name], legacy=False) or "")
    assert same is not None
    one, other = TEMPLATES[same], TEMPLATES[name]
    assert (one.style, one.roles, one.sep, one.sep2) == (
        other.style, other.roles, other.sep, other.sep2,
    )  # fmt: skip
    assert one.system == other.system


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_our_own_give_our_prompts(name, system):
    """As transformers runs them, in its sandbox."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    pytest.importorskip("jinja2")
    template = TEMPLATES[name]
    turns = [(USER, "<image>\nWhat is it?"), (ASSISTANT, "a disc"), (USER, "Where?")]
    if template.style == "plain":
        turns = turns[:2] if template.sep2 else turns[:1]
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    ]
    messages += [
        {"role": ("user", "assistant")[role], "content": [{"type": "text", "text": text}]}
        for role, text in turns[1:]
    ]
    if system is not None:
        if template.style in ("plain",):
            pytest.skip("plain has no system prompt")
        messages.insert(0, {"role": "system", "content": system})
        import dataclasses

        head = "<|im_start|>system\n" if template.style == "mpt" else ""
        template = dataclasses.replace(template, system=head + system)
    opened = [*turns, (ASSISTANT, None)] if template.style != "plain" else turns
    (text,), _ = utils.render_jinja_template(
        conversations=[messages],
        chat_template=jinja(TEMPLATES[name], legacy=True),
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
    )
    assert text == render(template, opened)
