"""What is asked and what comes back, in the user's terms. Imports no jax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from llava_jax.errors import ConfigError, PromptError, did_you_mean

MAX_NEW_TOKENS = 512

Image = Any
"""An image: a file name or path, encoded bytes or a binary file of them, a `data:` URI, a PIL image,
uint8[H, W, 3] RGB, or float32[S, S, 3] of the tower's size S, which is taken as already normalised."""

Messages = str | Sequence[Mapping[str, Any]]
"""The user's words, or a list of {"role": "user" | "assistant" | "system", "content": ...}; content is
text or a list of {"type": "text", "text": str} and {"type": "image", "image": Image}. Words are words:
`<image>` or `</s>` in them means nothing."""


@dataclass(frozen=True)
class Request:
    """One thing to ask. `images`, one or a list, stand before the first user message, a line each.

    temperature 0 is greedy; top_k 0 and top_p 1 keep every token. seed: None draws a new one.
    stop: a text or texts that end the answer, besides the template's own. system: in place of the
    template's system prompt. template: a name of llava_jax.text.conversation.TEMPLATES, by default the model's.
    """

    messages: Messages
    images: Image | Sequence[Image] = ()
    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    system: str | None = None
    template: str | None = None

    def __post_init__(self):
        stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if not all(isinstance(text, str) for text in stop):
            raise PromptError(f"stop holds what is no text: {stop!r}")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "images", tuple(image_list(self.images)))

    @classmethod
    def of(cls, messages: Messages, images: Any, settings: Mapping[str, Any]) -> Request:
        """A request from the words of a call. Raises ConfigError for a setting that is no field."""
        known = [f.name for f in fields(cls) if f.name not in ("messages", "images")]
        for name in settings:
            if name not in known:
                fix = did_you_mean(name, known, cutoff=0.5) or f"one of {', '.join(known)}"
                raise ConfigError(f"no setting {name!r}", fix=fix)
        return cls(messages, images, **settings)


@dataclass(frozen=True)
class Reply:
    """An answer.

    text: without special tokens and outer white space. ids: the new tokens, end token included.
    finish_reason: "stop" (end token or stop string), "length" (max_new_tokens, or the context is
    full), "cancelled" (a stream that was closed early) or "error" (see generate_batch).
    prompt_tokens: positions the prompt took, image features included. logprobs: one per id.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int = 0
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    seed: int = 0
    error: str | None = None


def image_list(images: Any) -> list[Image]:
    """None, one image or several -> a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]


def with_images(
    messages: Messages, images: Sequence[Image], system: str | None
) -> list[Mapping[str, Any]]:
    """A message list in which `images` stand before the words of the first user message.

    Raises PromptError for what is no list of messages, or one that asks nothing.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list | tuple) or not all(isinstance(m, Mapping) for m in messages):
        raise PromptError("messages must be a text or a list of {'role', 'content'}")
    rows = list(messages)
    if not rows:
        raise PromptError("there are no messages")
    if rows[-1].get("role") == "assistant":
        raise PromptError("the last message must be the user's, not the assistant's")
    if system is not None:
        if rows and rows[0].get("role") == "system":
            raise PromptError("there are two system prompts", fix="give system= or the message")
        rows.insert(0, {"role": "system", "content": system})
    if images:
        first = next((i for i, row in enumerate(rows) if row.get("role") == "user"), None)
        if first is None:
            raise PromptError("there is no user message for the images")
        words = rows[first].get("content")
        shown = [{"type": "image", "image": image} for image in images]
        said = [words] if isinstance(words, str) else list(words or [])
        rows[first] = {**rows[first], "content": [*shown, *said]}
    return rows
