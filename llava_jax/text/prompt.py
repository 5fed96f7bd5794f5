"""Messages with images to the ids of a prompt. Image slots come from structure, never from text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llava_jax.errors import ConfigError, PromptError, counted
from llava_jax.text.constants import IM_END, IM_START, IMAGE_TAG, IMAGE_TOKEN
from llava_jax.text.conversation import (
    ASSISTANT,
    SYSTEM_TEXT,
    USER,
    Piece,
    Template,
    find_template,
    lay_out,
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
    images: Sequence[Any] = (),
    markup: bool = False,
    use_im_start_end: bool = False,
    open_turn: bool = True,
) -> Example:
    """Lays out messages and tokenises them in one pass.

    messages: [{"role": "user", "content": ...}, ...] with roles user and assistant in turns, and
        at most one system message, first, in place of the template's own (plain text, like all
        contents). Content is a string or
        a list of strings, {"type": "text", "text": str} and {"type": "image", "image": anything}
        (or "path", "url", "image_url"); a slot stands where its image stands, in a line of its own.
    markup: the text is trusted: `<image>` in it is a slot for the next of `images`, and special
        tokens count. Without it both are plain text.
    open_turn: end with the assistant's open turn, ready to be continued. Without it the example
        has labels: what the assistant says is trained, or scored.

    Raises PromptError if roles, contents or the number of images do not fit, ConfigError if the
    template is unknown or `use_im_start_end` meets a tokenizer without those tokens.
    """
    template = find_template(template) if isinstance(template, str) else template
    system, messages = _take_system(messages)
    reader = _Reader(tokenizer, template, markup, use_im_start_end, iter(images))
    turns: list[tuple[int, list[Part] | None]] = []
    for i, message in enumerate(messages):
        role = _role(message, i)
        turns.append((role, reader.read(message.get("content"), f"message {i}")))
    reader.close()
    if open_turn:
        if not turns or turns[-1][0] != USER:
            raise PromptError("the last message must be the user's", fix="or pass open_turn=False")
        turns.append((ASSISTANT, None))
    found = tokenise(tokenizer, _with_system(tokenizer, template, turns, system))
    return Example(found.ids, tuple(reader.found), None if open_turn else found.labels)


def slot_parts(tokenizer: Tokenizer, template: Template, use_im_start_end: bool) -> list[Part]:
    """What one image slot looks like in a prompt: the slot, and what the model wants around it."""
    slot: list[Part] = [IMAGE_TOKEN]
    if use_im_start_end:
        try:
            start, end = tokenizer.special_tokens[IM_START], tokenizer.special_tokens[IM_END]
        except KeyError as e:
            raise ConfigError(
                f"the model wants {e.args[0]} around images, but the tokenizer lacks it",
                fix=f"tokenizer.with_tokens([{IM_START!r}, {IM_END!r}])",
            ) from e
        slot = [start, *slot, end]
    return ["<Image>", *slot, "</Image>"] if "mmtag" in template.version else slot


class _Reader:
    """Reads contents into parts, and collects their images in order."""

    def __init__(self, tokenizer, template, markup, use_im_start_end, given: Iterator[Any]):
        self.tokenizer, self.markup, self.given = tokenizer, markup, given
        self.use_im_start_end, self.template = use_im_start_end, template
        self.found: list[Any] = []

    def read(self, content: Any, where: str) -> list[Part]:
        items = [content] if isinstance(content, str | Mapping) else content
        if not isinstance(items, Sequence) or not items:
            raise PromptError(f"{where} has no content")
        groups = [self._read_item(item, where) for item in items]
        parts: list[Part] = []
        for i, (is_image, group) in enumerate(groups):
            if i and (is_image or groups[i - 1][0]) and not _breaks(groups[i - 1][1], group):
                parts.append("\n")
            parts += group
        if all(part == "" for part in parts):  # the id 0 is a token, `<unk>`
            raise PromptError(f"{where} is empty")
        return parts

    def _read_item(self, item: Any, where: str) -> tuple[bool, list[Part]]:
        """(whether it is an image, its parts)."""
        if isinstance(item, str):
            return False, self._read_text(item)
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind == "text" and isinstance(item.get("text"), str):
            return False, self._read_text(item["text"])
        if kind in ("image", "image_url"):
            self.found.append(_image_of(item, where))
            return True, slot_parts(self.tokenizer, self.template, self.use_im_start_end)
        raise PromptError(
            f"{where}: a content part is neither text nor image",
            fix='{"type": "text", "text": ...} or {"type": "image", "image": ...}',
        )

    def _read_text(self, text: str) -> list[Part]:
        if not self.markup:
            return [text]
        parts: list[Part] = []
        for part in self.tokenizer.split_markup(text, image_tags=True):
            if part == IMAGE_TOKEN:
                parts += slot_parts(self.tokenizer, self.template, self.use_im_start_end)
                self.found.append(next(self.given, _MISSING))
            else:
                parts.append(part)
        return parts

    def close(self) -> None:
        missing = sum(image is _MISSING for image in self.found)
        if missing:
            raise PromptError(
                f"{counted(missing, f'{IMAGE_TAG} tag')} without an image in the text"
            )
        left = len(list(self.given))
        if left:
            raise PromptError(f"{counted(left, 'image')} without an {IMAGE_TAG} tag in the text")


_MISSING = object()


def _breaks(before: list[Part], after: list[Part]) -> bool:
    """Whether the text around an image brings its own line break."""
    left = before[-1] if before and isinstance(before[-1], str) else ""
    right = after[0] if after and isinstance(after[0], str) else ""
    return left.endswith("\n") or right.startswith("\n")


def _image_of(item: Mapping[str, Any], where: str) -> Any:
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


def _role(message: Mapping[str, Any], i: int) -> int:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ROLES:
        raise PromptError(f"message {i} has role {role!r}", fix="roles are user and assistant")
    if ROLES[role] != i % 2:
        raise PromptError(f"message {i} is by the {role}: user and assistant must take turns")
    return ROLES[role]


def _take_system(messages: Any) -> tuple[str | None, Sequence[Mapping[str, Any]]]:
    """The text of a system message in front, and the other messages."""
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
    """The layout with the template's own system prompt, or another one as plain text."""
    if system is None:
        return lay_out(template, turns)
    head = "<|im_start|>system\n" if template.style == "mpt" else ""
    content = [*tokenizer.split_markup(head), system]
    return [
        piece._replace(content=content) if piece.message == SYSTEM_TEXT else piece
        for piece in lay_out(replace(template, system=head + system), turns)
    ]
