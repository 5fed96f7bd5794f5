"""The conversation templates of the original, as data, and the one function that applies them.

The wording is part of the trained models (llava/conversation.py of haotian-liu/LLaVA @ c121f04).
A prompt is a list of pieces that keeps apart what the template says from what people say, so that
ids, label masks and image slots follow from structure and never from searching the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from llava_jax.errors import ConfigError, PromptError

USER, ASSISTANT = 0, 1

Style = Literal["single", "two", "mpt", "llama_2", "plain"]


@dataclass(frozen=True)
class Template:
    """How messages become a prompt.

    single: `sep` after every turn; two: `sep` after even turns, `sep2` after odd ones; mpt: the
    role names hold their own markup; llama_2: [INST] brackets; plain: no roles at all (stage 1).
    version: the original's family name, which decides how training masks labels.
    examples: messages that always come first, as (role, text).
    """

    name: str
    style: Style
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str | None = None
    version: str = "Unknown"
    examples: tuple[tuple[int, str], ...] = ()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """Texts that end an answer. If one is the EOS token, that token ends the answer too."""
        ends = self.sep2 if self.style in ("two", "llama_2") else self.sep
        return (ends,) if ends else ()


TEMPLATE_TEXT, SYSTEM_TEXT = -1, -2


class Piece(NamedTuple):
    """A span of a prompt: template text, or the content of one message."""

    content: Any
    message: int  # index of the message this is, else TEMPLATE_TEXT or SYSTEM_TEXT
    answer: bool  # said by the assistant, end mark included: what is trained


def render(template: Template | str, messages: Sequence[tuple[int, str | None]]) -> str:
    """The prompt text of messages (role 0 or 1, text); None or "" leaves the turn open.

    Raises PromptError where the template does not allow the messages.
    """
    template = find_template(template) if isinstance(template, str) else template
    rows = [*template.examples, *messages]
    return "".join(p.content for p in template_pieces(template, rows, with_examples=False))


def template_pieces(
    template: Template, messages: Sequence[tuple[int, Any]], *, with_examples: bool = True
) -> list[Piece]:
    """The pieces of a prompt. A message's content may be anything; if falsy, its turn stays open.

    Message indices count from the first of `messages`; built-in examples count as template text.
    Raises PromptError where the template does not allow the messages.
    """
    examples = template.examples if with_examples else ()
    pieces = _STYLES[template.style](template, [*examples, *messages])
    return _hide_examples([piece for piece in pieces if piece.content], len(examples))


def _hide_examples(pieces: list[Piece], examples: int) -> list[Piece]:
    """Numbers messages from the first that is not built in; what comes before it is never trained."""
    if not examples:
        return pieces
    first = next((i for i, piece in enumerate(pieces) if piece.message >= examples), len(pieces))
    hidden = [
        p._replace(answer=False, message=min(p.message, TEMPLATE_TEXT)) for p in pieces[:first]
    ]
    return hidden + [
        p if p.message < 0 else p._replace(message=p.message - examples) for p in pieces[first:]
    ]


def _own(text: str | None, answer: bool = False) -> Piece:
    return Piece(text, TEMPLATE_TEXT, answer)


def _system(template: Template) -> Piece:
    return Piece(template.system, SYSTEM_TEXT, False)


def _roles(template: Template, messages: Sequence[tuple[int, Any]]) -> list[Piece]:
    """`ROLE: text` and an end, which alternates in style "two"; `ROLE:` alone for an open turn."""
    colon, space = ("", "") if template.style == "mpt" else (":", " ")  # mpt's roles hold their own
    ends = (template.sep, template.sep2 if template.style == "two" else template.sep)
    pieces = [_system(template), _own(template.sep)]
    for i, (role, content) in enumerate(messages):
        says = role == ASSISTANT
        pieces.append(_own(template.roles[role] + colon))
        if content:
            # the space belongs to the answer: its token is `▁` + the answer's first letters
            pieces += [_own(space, says), Piece(content, i, says), _own(ends[i % 2], says)]
    return pieces


def _llama_2(template: Template, messages: Sequence[tuple[int, Any]]) -> list[Piece]:
    if messages and (messages[0][0] != USER or not messages[0][1]):
        raise PromptError(
            f"template {template.name}: the first message must be the user's, not empty"
        )
    pieces = []
    for i, (_, content) in enumerate(messages):
        if not content:
            continue
        if i % 2:
            pieces += [_own(" ", True), Piece(content, i, True), _own(" ", True)]
            pieces.append(_own(template.sep2, True))
            continue
        # `sep` (a BOS) is between rounds; the first has the prompt's own BOS before it
        pieces.append(_own((template.sep if i else "") + "[INST] "))
        if i == 0 and template.system:
            pieces += [_own("<<SYS>>\n"), _system(template), _own("\n<</SYS>>\n\n")]
        pieces += [Piece(content, i, False), _own(" [/INST]")]
    return pieces


def _plain(template: Template, messages: Sequence[tuple[int, Any]]) -> list[Piece]:
    pieces = [_system(template)]
    for i, (role, content) in enumerate(messages):
        end = template.sep2 if i % 2 else template.sep
        if content and end is None:
            raise PromptError(f"template {template.name} has no second message")
        if content:
            pieces += [Piece(content, i, role == ASSISTANT), _own(end, role == ASSISTANT)]
    return pieces


_STYLES = {"single": _roles, "two": _roles, "mpt": _roles, "llama_2": _llama_2, "plain": _plain}


# The templates ------------------------------------------------------------------------------------

_USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_HUMAN_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
# No space before "The visual": the models were trained with it missing.
_MMTAG_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_LLAVA_LLAMA_2_SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
# Meta's default prompt; two spaces after "safe.".
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of "
    "answering something not correct. If you don't know the answer to a question, please don't "
    "share false information."
)
_MPT_SYSTEM = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_CHATML_SYSTEM = "<|im_start|>system\nAnswer the questions."

_EXAMPLE = (
    (USER, "What are the key differences between renewable and non-renewable energy sources?"),
    (
        ASSISTANT,
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
        "Non-renewable energy sources, on the other hand, are finite and will eventually be "
        "depleted, such as coal, oil, and natural gas. Here are some key differences between "
        "renewable and non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while "
        "non-renewable energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
        "emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
        "typically have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
        "remote locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
        "different situations and needs, while non-renewable sources are more rigid and "
        "inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, "
        "while non-renewable sources are not, and their depletion can lead to economic and social "
        "instability.\n",
    ),
)

_HUMAN = ("Human", "Assistant")
_UPPER = ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def _table() -> dict[str, Template]:
    t = Template
    rows = [
        t("default", "single", _HUMAN_SYSTEM, _HUMAN, "###", examples=_EXAMPLE),
        t("v0", "single", _HUMAN_SYSTEM, _HUMAN, "###", examples=_EXAMPLE),
        t("v1", "two", _USER_SYSTEM, _UPPER, " ", "</s>", "v1"),
        t("vicuna_v1", "two", _USER_SYSTEM, _UPPER, " ", "</s>", "v1"),
        t("llama_2", "llama_2", _LLAMA_2_SYSTEM, _UPPER, "<s>", "</s>", "llama_v2"),
        t("mistral_instruct", "llama_2", "", _UPPER, "", "</s>", "llama_v2"),
        t("chatml_direct", "mpt", _CHATML_SYSTEM, _CHATML, "<|im_end|>", version="mpt"),
        t("mistral_direct", "mpt", _CHATML_SYSTEM, _CHATML, "<|im_end|>", version="mpt"),
        t("plain", "plain", "", ("", ""), "\n"),
        t("v0_plain", "plain", "", ("", ""), "\n"),
        t("llava_v0", "single", _HUMAN_SYSTEM, _HUMAN, "###"),
        t("v0_mmtag", "single", _MMTAG_SYSTEM, _HUMAN, "###", version="v0_mmtag"),
        t("llava_v1", "two", _HUMAN_SYSTEM, _UPPER, " ", "</s>", "v1"),
        t("v1_mmtag", "two", _MMTAG_SYSTEM, _UPPER, " ", "</s>", "v1_mmtag"),
        t("llava_llama_2", "llama_2", _LLAVA_LLAMA_2_SYSTEM, _UPPER, "<s>", "</s>", "llama_v2"),
        t("mpt", "mpt", _MPT_SYSTEM, _CHATML, "<|im_end|>", version="mpt"),
    ]
    return {row.name: row for row in rows}


TEMPLATES: dict[str, Template] = _table()


def find_template(name: str) -> Template:
    """The template called `name`. Raises ConfigError for another name."""
    if name not in TEMPLATES:
        raise ConfigError(f"no template {name!r}", fix=f"one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
