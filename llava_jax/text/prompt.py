"""Turns messages with images into an Example. Image slots come from structure, never from text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from llava_jax.errors import ConfigError, PromptError
from llava_jax.text.constants import IM_END, IM_START, IMAGE_TOKEN
from llava_jax.text.conversation import (
    ASSISTANT,
    SYSTEM_TEXT,
    USER,
    Piece,
    Template,
    find_template,
    template_pieces,
)
from llava_jax.text.example import Example
from llava_jax.text.labels import tokenise
from llava_jax.text.tokenizer import Part, Tokenizer

ROLES = {"user": USER, "assistant": ASSISTANT}
_IMAGE_KEYS = ("image", "path", "url")


def build_prompt(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: Template | str = "vicuna_v1",
    *,
    use_im_start_end: bool = False,
    open_turn: bool = True,
) -> Example:
    """Lays out messages and tokenises them in one pass; images are kept as the messages gave them.

    messages: [{"role": "user", "content": ...}, ...] with roles user and assistant in turns, and
        at most one system message, first, in place of the template's own (plain text, like all
        contents). Content is a string or
        a list of strings, {"type": "text", "text": str} and {"type": "image", "image": anything}
        (or "path", "url", "image_url"); each image gets a line of its own, where it is, unless it says
        "inline": True.
    open_turn: end with the assistant's open turn, ready to be continued. Without it the example
        has labels: what the assistant says is trained, or scored.

    Raises PromptError if roles or contents are malformed, ConfigError if the template is unknown or
    `use_im_start_end` meets a tokenizer without those tokens.
    """
    template = find_template(template) if isinstance(template, str) else template
    system, messages = _take_system(messages)
    first = int(system is not None)  # errors count messages as they were given
    slot = partial(slot_parts, tokenizer, template, use_im_start_end)
    images: list[Any] = []
    turns: list[tuple[int, list[Part] | None]] = []
    for i, message in enumerate(messages):
        where = f"message {i + first}"
        role = _role(message, i, where)
        turns.append((role, _read(message.get("content"), slot, images, where)))
    if open_turn:
        if not turns or turns[-1][0] != USER:
            raise PromptError("the last message must be the user's", fix="end with a user message")
        turns.append((ASSISTANT, None))
    ids, labels, _ = tokenise(tokenizer, _with_system(tokenizer, template, turns, system))
    return Example(ids, tuple(images), None if open_turn else labels)


def slot_parts(tokenizer: Tokenizer, template: Template, use_im_start_end: bool) -> list[Part]:
    """One image slot as the model expects it in a prompt, with the tokens around it."""
    slot: list[Part] = [IMAGE_TOKEN]
    if use_im_start_end:
        try:
            start, end = tokenizer.special_tokens[IM_START], tokenizer.special_tokens[IM_END]
        except KeyError as e:
            raise ConfigError(
                f"the model expects {e.args[0]} around images, but the tokenizer lacks it",
                fix=f"tokenizer.with_tokens([{IM_START!r}, {IM_END!r}])",
            ) from e
        slot = [start, *slot, end]
    return ["<Image>", *slot, "</Image>"] if "mmtag" in template.version else slot


def _read(
    content: Any, slot: Callable[[], list[Part]], images: list[Any], where: str
) -> list[Part]:
    """The parts of a message's content. Its images are added to `images`."""
    items = [content] if isinstance(content, str | Mapping) else content
    if not isinstance(items, Sequence) or not items:
        raise PromptError(f"{where} has no content")
    parts: list[Part] = []
    before: str | None = ""  # the text before an item, None after an image
    for i, item in enumerate(items):
        text = _text_of(item, where)
        inline = isinstance(item, Mapping) and text is None and bool(item.get("inline"))
        if text is None:
            images.append(_image_of(item, where))
        at_image = i and not inline and (text is None or before is None)
        if at_image and not ((before or "").endswith("\n") or (text or "").startswith("\n")):
            parts.append("\n")  # unless the text around an image brings its own line break
        parts += slot() if text is None else [text]
        before = "\n" if inline else text
    if all(part == "" for part in parts):
        raise PromptError(f"{where} is empty")
    return parts


def _text_of(item: Any, where: str) -> str | None:
    """The text of a part of a content, or None for an image."""
    if isinstance(item, str):
        return item
    kind = item.get("type") if isinstance(item, Mapping) else None
    if kind == "text" and isinstance(item.get("text"), str):
        return item["text"]
    if kind in ("image", "image_url"):
        return None
    raise PromptError(
        f"{where}: a content part is neither text nor image",
        fix='{"type": "text", "text": ...} or {"type": "image", "image": ...}',
    )


def _image_of(item: Any, where: str) -> Any:
    for key in _IMAGE_KEYS:
        if item.get(key) is not None:
            return item[key]
    nested = item.get("image_url")
    url = nested.get("url") if isinstance(nested, Mapping) else nested
    if url is None:
        raise PromptError(
            f"{where}: an image part holds no image",
            fix='give it there, {"type": "image", "image": FILE}, or leave the part out and pass images',
        )
    return url


def _role(message: Mapping[str, Any], i: int, where: str) -> int:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in ROLES:
        raise PromptError(f"{where} has role {role!r}", fix="roles are user and assistant")
    if ROLES[role] != i % 2:
        raise PromptError(f"{where} is from the {role}: user and assistant must alternate")
    return ROLES[role]


def _take_system(messages: Any) -> tuple[str | None, Sequence[Mapping[str, Any]]]:
    """The text of a leading system message, and the other messages."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise PromptError("messages must be a list of {'role', 'content'}")
    first = messages[0] if messages else None
    if not isinstance(first, Mapping) or first.get("role") != "system":
        return None, messages
    if not isinstance(first.get("content"), str):
        raise PromptError("the content of a system message must be a string")
    return first["content"], messages[1:]


def _with_system(
    tokenizer: Tokenizer, template: Template, turns: Sequence[tuple[int, Any]], system: str | None
) -> list[Piece]:
    """The prompt with the template's own system prompt, or another one as plain text."""
    if system is None:
        return template_pieces(template, turns)
    head = "<|im_start|>system\n" if template.style == "mpt" else ""
    content = [*tokenizer.split_markup(head), system]
    return [
        piece._replace(content=content) if piece.message == SYSTEM_TEXT else piece
        for piece in template_pieces(replace(template, system=head + system), turns)
    ]
