"""What a caller asks and what comes back. Imports no jax."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llava_jax.errors import ConfigError, PromptError
from llava_jax.generate.constrain import schema_of
from llava_jax.setting import fits, unknown
from llava_jax.settings import SAMPLING, SamplingSettings

MOST_TOP_LOGPROBS, MOST_BIAS = 20, 100  # OpenAI's limits

Image = Any
"""An image: a file name or path, encoded bytes or a binary file of them, a `data:` URI, a PIL image,
uint8[H, W, 3] RGB, or float32[S, S, 3] of the tower's size S, which is taken as already normalised."""

Messages = str | Sequence[Mapping[str, Any]]
"""The user's words, or a list of {"role": "user" | "assistant" | "system", "content": ...}; content is
text or a list of {"type": "text", "text": str} and {"type": "image", "image": Image}. Words are words:
`<image>` or `</s>` in them means nothing."""


@dataclass(frozen=True)
class Request(SamplingSettings):
    """One thing to ask. `images`, one or a list, stand before the first user message, a line each.

    logit_bias: {token id: what is added to its logit}. top_logprobs: of how many of the likeliest tokens
    the reply holds log-probabilities, at each place. response_format: OpenAI's, {"type": "json_object"} or
    {"type": "json_schema", "json_schema": {"schema": ...}}: the answer is JSON, on one line.
    adapter: the name of one that the model was loaded with; "": the model itself answers.
    The other fields are those of llava_jax.settings.SamplingSettings, by keyword.
    Raises ConfigError for a setting that is unknown, out of range or of the wrong type.
    """

    messages: Messages = field(kw_only=False)
    images: Image | Sequence[Image] = field(default=(), kw_only=False)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    response_format: Mapping[str, Any] | None = None
    adapter: str = ""

    def __new__(cls, messages: Messages = "", images: Any = (), **settings: Any):
        # Before __init__, which has a TypeError for an unknown name.
        known = ["images", *SAMPLING, "logit_bias", "top_logprobs", "response_format", "adapter"]
        for name in settings:
            if name not in known:
                raise unknown(name, known)
        return super().__new__(cls)

    def __post_init__(self):
        stop = () if self.stop is None else self.stop
        stop = (stop,) if isinstance(stop, str) else stop
        object.__setattr__(self, "stop", tuple(stop) if isinstance(stop, list) else stop)
        object.__setattr__(self, "images", tuple(image_list(self.images)))
        super().__post_init__()
        if not fits(int, self.top_logprobs) or not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            what = f"top_logprobs is {self.top_logprobs!r}"
            raise ConfigError(f"{what}, but must be a whole number from 0 to {MOST_TOP_LOGPROBS}")
        if not isinstance(self.logit_bias, Mapping):
            raise ConfigError(f"logit_bias is {self.logit_bias!r}, not {{token id: number}}")
        for token, bias in self.logit_bias.items():
            known = fits(int, token) and token >= 0
            if not known or not fits(float, bias) or not abs(bias) <= MOST_BIAS:
                what = f"logit_bias {token!r}: {bias!r}"
                raise ConfigError(f"{what} is not a token id and a number from -100 to 100")
        if schema_of(self.response_format) is not None and self.stop:
            raise ConfigError(
                "stop cannot be given with response_format: JSON ends by itself",
                fix="leave one of them out",
            )
        if self.prompt_lookup and (given := self.not_greedy()):
            raise ConfigError(
                f"{given[0]} cannot be given with prompt_lookup", fix="leave one of them out"
            )

    def not_greedy(self) -> list[str]:
        """The settings by which a token is not simply the likeliest one, or more than it is asked for."""
        names = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty")
        given = [name for name in names if getattr(self, name) != SAMPLING[name].default]
        more = ("logit_bias", "top_logprobs", "response_format")
        return [*given, *(name for name in more if getattr(self, name))]

    @classmethod
    def of(cls, messages: Messages, images: Any, settings: Mapping[str, Any]) -> Request:
        """A request from the arguments of a call."""
        return cls(messages, images, **settings)

    def seeded(self) -> Request:
        """The request with a seed: its own, or one drawn now."""
        if self.seed is not None:
            return self
        made = copy.copy(self)  # not `replace`, which would check every setting again
        object.__setattr__(made, "seed", secrets.randbits(32) if self.temperature else 0)
        return made

    def message_list(self) -> list[Mapping[str, Any]]:
        """The messages with the images in the first user message, and `system` in front.

        Raises PromptError for what is not a list of messages, or asks nothing.
        """
        messages = self.messages
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not isinstance(messages, list | tuple) or not all(
            isinstance(m, Mapping) for m in messages
        ):
            raise PromptError("messages must be a text or a list of {'role', 'content'}")
        rows = list(messages)
        if not rows:
            raise PromptError("there are no messages")
        for number, row in enumerate(rows):
            _check_pictures(number, row)
        if rows[-1].get("role") == "assistant":
            raise PromptError("the last message must be the user's, not the assistant's")
        if self.system is not None:
            if rows[0].get("role") == "system":
                raise PromptError("there are two system prompts", fix="give system= or the message")
            rows.insert(0, {"role": "system", "content": self.system})
        if self.images:
            first = next((i for i, row in enumerate(rows) if row.get("role") == "user"), None)
            if first is None:
                raise PromptError("there is no user message for the images")
            words = rows[first].get("content")
            said = [words] if isinstance(words, str | Mapping) else words
            if not isinstance(said, Sequence) or not said:
                number = first - (rows[0].get("role") == "system")
                raise PromptError(f"message {number} has no content")
            shown = [{"type": "image", "image": image} for image in self.images]
            rows[first] = {**rows[first], "content": [*shown, *said]}
        return rows


def _check_pictures(number: int, message: Mapping[str, Any]) -> None:
    """Raises PromptError for a picture beside the content, as Ollama and TRL have it: it would not be seen."""
    content = message.get("content")
    parts = content if isinstance(content, list | tuple) else [content]
    words = [p for p in parts if isinstance(p, Mapping) and p.get("type") == "text"]
    for row in (message, *words):
        for key in ("images", "image", "image_url", "videos", "video", "audio"):
            value = row.get(key)
            if value is not None and not (isinstance(value, list | tuple | str) and not value):
                raise PromptError(
                    f"message {number}: {key!r} is not read there",
                    fix="put {'type': 'image', 'image': ...} in the content",
                )


@dataclass(frozen=True)
class Reply:
    """An answer.

    text: without special tokens and outer white space. ids: the new tokens, end token included.
    finish_reason: "stop" (end token or stop string), "length" (max_new_tokens, or the context is
    full), "cancelled" (a stream that was closed early) or "error" (see generate_batch).
    prompt_tokens: positions the prompt took, image features included; cached_tokens: of them, those
    that an earlier request had read. logprobs: one per id. top_logprobs: for each id, (token, its
    log-probability) of the likeliest. seed: the one that was used. error: why it could not be asked.
    """

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int = 0
    logprobs: tuple[float, ...] = field(default=(), repr=False)
    seed: int = 0
    error: str | None = None
    cached_tokens: int = field(default=0, compare=False)
    top_logprobs: tuple[Sequence[tuple[int, float]], ...] = field(default=(), repr=False)


def image_list(images: Any) -> list[Image]:
    """None, one image or several -> a list."""
    if images is None:
        return []
    return list(images) if isinstance(images, list | tuple) else [images]
