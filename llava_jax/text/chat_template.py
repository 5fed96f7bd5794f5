"""Chat templates: which of ours a folder's Jinja text is, and ours as Jinja text.

A template is a program. It is never run: what it can say is read off its text, the literals that it
puts out, and compared with what our templates say.
"""

from __future__ import annotations

import json
import re

from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.conversation import TEMPLATES, Template

_BLOCK = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.S)
_LITERAL = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.S)
# Literals that are compared, looked up or handed to a filter, and so not put out.
_BEFORE = re.compile(r"(?:\[|==|!=|\bin|\w\(|,|attribute=)\s*$")
_AFTER = re.compile(r"\s*(?:\]|==|!=|\bin\b|\bnot\s+in\b)")
_CALLS = re.compile(r"(raise_exception|strftime_now)\s*\([^)]*\)", re.S)
_ROLE = r"(?:\[\s*['\"]role['\"]\s*\]|\.role)"
_ROLES = (
    (re.compile(_ROLE + r"\s*(?:\.upper\(\)|\|\s*upper)"), "USER ASSISTANT"),
    (re.compile(_ROLE + r"\s*(?:\.capitalize\(\)|\.title\(\)|\|\s*capitalize|\|\s*title)"), "User Assistant"),
    (re.compile(_ROLE), "user assistant system"),
)  # fmt: skip

# Name -> what must be said. The first whose system prompt is said, else the first that fits.
_MUST = {
    "vicuna_v1": ("USER", "ASSISTANT"),
    "llava_v1": ("USER", "ASSISTANT"),
    "llava_llama_2": ("[INST]", "[/INST]", "<<SYS>>"),
    "llama_2": ("[INST]", "[/INST]", "<<SYS>>"),
    "mistral_instruct": ("[INST]", "[/INST]"),
    "chatml_direct": ("<|im_start|>", "<|im_end|>", "user", "assistant"),
    "mpt": ("<|im_start|>", "<|im_end|>", "user", "assistant"),
    "llava_v0": ("Human", "Assistant", "###"),
    "plain": (),
}
_MARKS = ("<<SYS>>", "<</SYS>>", "[INST]", "[/INST]", "<s>", "</s>", IMAGE_TAG)


def recognise(text: str) -> str | None:
    """The name of the template of ours that a Jinja chat template is; None for a foreign one.

    Our own exports are known by their text, others by what they can say.

    A system prompt may be missing: Hugging Face's spelling of Vicuna's has none.
    """
    for name in (*_MUST, *TEMPLATES):  # v1 is vicuna_v1 by another name
        if text.strip() in (jinja(TEMPLATES[name], True), jinja(TEMPLATES[name], False)):
            return name
    said = spoken(text)
    fits = [name for name, must in _MUST.items() if _fits(said, TEMPLATES[name], must)]
    with_system = [
        n for n in fits if TEMPLATES[n].system and _squeezed(TEMPLATES[n].system) in said
    ]
    return next(iter([*with_system, *fits]), None)


def spoken(text: str) -> str:
    """Everything that a Jinja template can put out by itself, in its order, white space squeezed."""
    said, at = [], 0
    for block in _BLOCK.finditer(text):
        said.append(text[at : block.start()])
        said += _put_out(block[0])
        at = block.end()
    said.append(text[at:])
    return _squeezed(" ".join(said))


def _put_out(block: str) -> list[str]:
    """The literals that one {{ }} or {% %} puts out, and the roles it spells."""
    inside = _CALLS.sub("", block[2:-2].strip("-+ \n\t"))
    if block.startswith("{#") or (block.startswith("{%") and not inside.startswith("set ")):
        return []
    said = []
    for literal in _LITERAL.finditer(inside):
        if not (_BEFORE.search(inside[: literal.start()]) or _AFTER.match(inside[literal.end() :])):
            said.append(
                re.sub(
                    r"\\(n|t|.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), literal[0][1:-1]
                )
            )
    if block.startswith("{{"):
        bare = re.sub(_ROLE + r"\s*[!=]=", "", inside)  # compared, not put out
        for pattern, words in _ROLES:
            if pattern.search(bare):
                return [*said, words]
    return said


def _fits(said: str, template: Template, must: tuple[str, ...]) -> bool:
    """Whether `said` holds all of `must`, and nothing that the template does not say."""
    if not all(part in said for part in must):
        return False
    roles = [word.strip() for role in template.roles for word in (role, role.partition("\n")[0])]
    if template.style == "mpt":
        roles += ["<|im_start|>", "system", "user", "assistant"]
    known = [_squeezed(template.system), *roles, template.sep, template.sep2 or "", *_MARKS]
    for part in sorted(filter(None, map(str.strip, known)), key=len, reverse=True):
        said = said.replace(part, " ")
    return not said.replace(":", " ").strip()


def _squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# Ours as Jinja -----------------------------------------------------------------------------------

_HEAD = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] if messages[0]['content'] is string "
    "else messages[0]['content'][0]['text'] -%}{%- set turns = messages[1:] -%}"
)
_CONTENT = (
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
    "{%- set images = 0 -%}"
    "{%- else -%}"
    "{%- set text = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | join('') -%}"
    "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') "
    "| list | length -%}"
    "{%- endif -%}"
)


def jinja(template: Template, legacy: bool) -> str | None:
    """The Jinja text of a template; None for one with examples of its own, or tags around images.

    legacy: the tokenizer's. Where it is False a space follows each image, before the line
    break: so the ids become those of the original, which tokenizes what follows an image as a text
    of its own.
    """
    if template.examples or "mmtag" in template.version:
        return None
    t, gap = template, "\\n" if legacy else " \\n"
    shown = f"('{IMAGE_TAG}{gap}' * images) + text"
    mark = "<|im_start|>system\n" if t.style == "mpt" else ""
    lead = "" if t.style in ("llama_2", "plain") else f"{{{{- system + {_text(t.sep)} -}}}}"
    user, answer, opening = _turns(t, shown)
    given = f"{{%- set system = {_text(mark)} + system -%}}" if mark else ""
    return (
        f"{_HEAD}{given}{{%- else -%}}{{%- set system = {_text(t.system)} -%}}"
        f"{{%- set turns = messages -%}}{{%- endif -%}}{lead}"
        f"{{%- for message in turns -%}}{_CONTENT}"
        f"{{%- if message['role'] == 'assistant' -%}}{answer}"
        f"{{%- else -%}}{user}{{%- endif -%}}{{%- endfor -%}}"
        + (
            f"{{%- if add_generation_prompt -%}}{{{{- {_text(opening)} -}}}}{{%- endif -%}}"
            if opening
            else ""
        )
    )


def _turns(t: Template, shown: str) -> tuple[str, str, str]:
    """Jinja of a user's turn and of an answer, and the text that opens one."""
    user, said = t.roles
    if t.style == "llama_2":
        system = "('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '')"
        between = f"('' if loop.first else {_text(t.sep)})"
        asks = f"{{{{- {between} + '[INST] ' + {system} + {shown} + ' [/INST]' -}}}}"
        return asks, _answer(" ", f" {t.sep2}"), ""
    if t.style == "plain":
        return f"{{{{- {shown} + {_text(t.sep)} -}}}}", _answer("", t.sep2 or ""), ""
    colon, space = ("", "") if t.style == "mpt" else (":", " ")
    asks = f"{{{{- {_text(user + colon + space)} + {shown} + {_text(t.sep)} -}}}}"
    end = (t.sep2 or "") if t.style == "two" else t.sep
    return asks, _answer(said + colon + space, end), said + colon


def _answer(before: str, end: str) -> str:
    lead = f"{{{{- {_text(before)} -}}}}" if before else ""
    return f"{lead}{{%- generation -%}}{{{{- text + {_text(end)} -}}}}{{%- endgeneration -%}}"


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
