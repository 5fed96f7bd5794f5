"""Chat templates as Jinja: which of ours a checkpoint's template is, and ours for an export.

A Jinja template is a program, and one from a checkpoint is never run. The literals that it can output
are read from its text and compared with what our templates say.
"""

from __future__ import annotations

import json
import re
import string
from itertools import product

from llava_jax.text.constants import IM_END, IM_START, IMAGE_TAG
from llava_jax.text.conversation import TEMPLATES, Template

_BLOCK = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.S)
_LITERAL = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.S)
# Syntax around literals that are compared, looked up or passed to a filter, so never output.
_BEFORE = re.compile(r"(?:\[|==|!=|\bin|\w\(|,|attribute=)\s*$")
_AFTER = re.compile(r"\s*(?:\]|==|!=|\bin\b|\bnot\s+in\b)")
_ESCAPES = {"n": "\n", "t": "\t"}
_CALLS = re.compile(r"(raise_exception|strftime_now)\s*\([^)]*\)", re.S)
_ROLE = r"(?:\[\s*['\"]role['\"]\s*\]|\.role)"
_ROLES = (
    (re.compile(_ROLE + r"\s*(?:\.upper\(\)|\|\s*upper)"), "USER ASSISTANT"),
    (re.compile(_ROLE + r"\s*(?:\.capitalize\(\)|\.title\(\)|\|\s*capitalize|\|\s*title)"), "User Assistant"),
    (re.compile(_ROLE), "user assistant system"),
)  # fmt: skip

# Name -> the literals it must output. If several match: the first whose system prompt is output,
# else the first of all.
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
    """The name of our template that says what a Jinja chat template says; None for an unknown one.

    Our own exports are known by their text, others by what they can say. A system prompt may be
    missing: Hugging Face's spelling of Vicuna's template has none.
    """
    ways = list(product((True, False), repeat=2))
    for name in (*_MUST, *TEMPLATES):  # v1 is vicuna_v1 by another name
        if text.strip() in [jinja(TEMPLATES[name], *way) for way in ways]:
            return name
    said = spoken(text)
    systems = {name: _squeezed(TEMPLATES[name].system) for name in _MUST}
    fits = [name for name, must in _MUST.items() if _fits(said, TEMPLATES[name], must)]
    fits.sort(key=lambda name: not systems[name] or systems[name] not in said)
    return fits[0] if fits else None


def spoken(text: str) -> str:
    """All literal text that a Jinja template can output, in order, with white space squeezed."""
    said, at = [], 0
    for block in _BLOCK.finditer(text):
        said += [text[at : block.start()], *_outputs(block[0])]
        at = block.end()
    return _squeezed(" ".join([*said, text[at:]]))


def _outputs(block: str) -> list[str]:
    """The literals that one {{ }} or {% %} outputs, and the roles that it spells."""
    inside = _CALLS.sub("", block[2:-2].strip("-+ \n\t"))
    if block.startswith("{#") or (block.startswith("{%") and not inside.startswith("set ")):
        return []
    said = [
        re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), literal[0][1:-1])
        for literal in _LITERAL.finditer(inside)
        if not _BEFORE.search(inside[: literal.start()])
        and not _AFTER.match(inside[literal.end() :])
    ]
    if block.startswith("{{"):
        bare = re.sub(_ROLE + r"\s*[!=]=", "", inside)  # compared, not output
        said += [words for pattern, words in _ROLES if pattern.search(bare)][:1]
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
    return " ".join(text.split())


# Ours as Jinja -----------------------------------------------------------------------------------

_FORM = string.Template(
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system = messages[0]['content'] if messages[0]['content'] is string "
    "else messages[0]['content'][0]['text'] -%}{%- set turns = messages[1:] -%}$mark"
    "{%- else -%}{%- set system = $system -%}{%- set turns = messages -%}{%- endif -%}$lead"
    "{%- for message in turns -%}"
    "{%- if message['content'] is string -%}{%- set text = message['content'] -%}"
    "{%- set images = 0 -%}"
    "{%- else -%}"
    "{%- set text = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | join('') -%}"
    "{%- set images = message['content'] | selectattr('type', 'equalto', 'image') "
    "| list | length -%}"
    "{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "$before{%- generation -%}{{- text + $end -}}{%- endgeneration -%}"
    "{%- else -%}{{- $asks -}}{%- endif -%}{%- endfor -%}$opening"
)


def jinja(template: Template, legacy: bool, use_im_start_end: bool = False) -> str | None:
    """The Jinja text of a template; None for one with examples of its own, or text around images.

    legacy: as of the tokenizer. If False, a space stands between each image and its line break. It
    gives the ids of the original, which tokenises the text after an image as a text of its own; with
    `use_im_start_end` that text begins with a token, which gets no space.
    """
    if template.examples or "mmtag" in template.version:
        return None
    t, image = template, IMAGE_TAG if legacy else f"{IMAGE_TAG} "
    image = f"{IM_START}{IMAGE_TAG}{IM_END}" if use_im_start_end else image
    shown = f"('{image}\\n' * images) + text"
    mark = "<|im_start|>system\n" if t.style == "mpt" else ""
    opening = lead = ""
    if t.style == "plain":
        before, end = "", t.sep2 or ""
        asks = f"{shown} + {_text(t.sep)}"
    elif t.style == "llama_2":
        before, end = " ", f" {t.sep2}"
        system = "('<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' if loop.first and system else '')"
        between = f"('' if loop.first else {_text(t.sep)})"
        asks = f"{between} + '[INST] ' + {system} + {shown} + ' [/INST]'"
    else:
        colon, space = ("", "") if t.style == "mpt" else (":", " ")
        user, assistant = (role + colon for role in t.roles)
        before, end = assistant + space, (t.sep2 or "") if t.style == "two" else t.sep
        asks = f"{_text(user + space)} + {shown} + {_text(t.sep)}"
        lead = "{{- system + " + _text(t.sep) + " -}}"
        opening = "{%- if add_generation_prompt -%}{{- " + _text(assistant) + " -}}{%- endif -%}"
    return _FORM.substitute(
        mark=f"{{%- set system = {_text(mark)} + system -%}}" if mark else "",
        system=_text(t.system),
        lead=lead,
        before=f"{{{{- {_text(before)} -}}}}" if before else "",
        end=_text(end),
        asks=asks,
        opening=opening,
    )


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
