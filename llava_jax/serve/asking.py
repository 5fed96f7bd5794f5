"""A request becomes prompts with pixels. Runs in threads of its own, at most a few at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_jax.errors import PromptError, counted
from llava_jax.generate import Detokenizer, Job
from llava_jax.generate.request import Request
from llava_jax.images.decode import decode_data_uri, is_data_uri
from llava_jax.serve.errors import ApiError
from llava_jax.serve.fetch import Fetcher
from llava_jax.serve.schema import ChatRequest, CompletionRequest, ImagePart, Message, Sampling
from llava_jax.settings import ServeSettings
from llava_jax.text.example import Example

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

_CHARACTERS_PER_TOKEN = 32  # no prompt of the context's tokens has more: a piece has 16 at most


def check_chat(body: ChatRequest, limits: ServeSettings, fetcher: Fetcher) -> dict[str, int]:
    """Counts messages, answers and pictures, before anything is decoded.

    Returns {address to fetch: number of the first picture that it is}. Raises ApiError.
    """
    _at_most(len(body.messages), limits.max_messages, "message", "messages")
    _at_most(body.n, limits.max_choices, "answer", "n")
    urls = body.image_urls()
    _at_most(len(urls), limits.max_images, "image", "messages")
    numbers: dict[str, int] = {}
    for number, url in enumerate(urls, 1):
        if not is_data_uri(url):
            fetcher.check(url, f"image {number}")
            numbers.setdefault(url, number)
    return numbers


def check_completion(body: CompletionRequest, limits: ServeSettings) -> None:
    """Counts prompts and answers. Raises ApiError."""
    _at_most(len(body.prompt) * body.n, limits.max_choices, "answer", "n")


def _at_most(count: int, most: int, noun: str, param: str) -> None:
    if count > most:
        what = f"the request has {counted(count, noun)}; the limit is {most:,}"
        raise ApiError(400, what, code="too_many", param=param)


def chat_jobs(
    model: LlavaModel,
    body: ChatRequest,
    adapter: str = "",
    fetched: Mapping[str, bytes] = MappingProxyType({}),
) -> list[Job]:
    """A job for each of `n` answers, through an adapter of the model. fetched: what is behind addresses among the pictures.

    Raises PromptError, ImageError or ConfigError.
    """
    messages = [_message(m) for m in body.messages]
    _check_text(model, [p for m in messages for p in _texts(m["content"])])
    form = body.response_format
    request = _request(
        model,
        messages,
        body,
        top_logprobs=body.top_logprobs,
        response_format=form and form.model_dump(by_alias=True),
        adapter=adapter,
    )
    example = model.example(request)
    _check_length(model, example)
    made: dict[int, np.ndarray] = {}
    for number, uri in enumerate(example.images, 1):
        name = f"image {number}"
        if id(uri) not in made:
            known = uri in fetched
            data = fetched[uri] if known else decode_data_uri(uri, model.limits, name)
            # A photograph is turned upright, as in `llava-jax chat`.
            made[id(uri)] = model.pixels(data, name=name, exif=True)
    ready = model.with_pixels(example, made)
    return [model.job(_numbered(request, i), ready, live=True) for i in range(body.n)]


def completion_jobs(model: LlavaModel, body: CompletionRequest, adapter: str = "") -> list[Job]:
    """A job for each of `n` answers to each prompt. Raises PromptError or ConfigError."""
    jobs = []
    for text in body.prompt:
        _check_text(model, [text])
        example = Example(np.array(model.tokenizer.encode(text), np.int32))
        _check_length(model, example)
        request = _request(model, text, body, top_logprobs=body.logprobs or 0, adapter=adapter)
        for i in range(body.n):
            job = model.job(_numbered(request, i), example, live=True)
            job.text = Detokenizer(
                model.tokenizer, request.stop
            )  # no template, so none of its stops
            jobs.append(job)
    return jobs


def _request(model: LlavaModel, messages: Any, body: Sampling, **more: Any) -> Request:
    vocab = model.config.language.vocab_size
    wrong = next((token for token in body.logit_bias if token >= vocab), None)
    if wrong is not None:
        what = f"logit_bias {wrong}: the vocabulary has {vocab} tokens"
        raise ApiError(400, what, code="bad_value", param="logit_bias")
    return Request.of(messages, (), {**body.settings(), **more}).seeded()


def _numbered(request: Request, i: int) -> Request:
    """The request of the i-th answer: the first has the seed itself."""
    from dataclasses import replace

    return request if not i else replace(request, seed=(request.seed or 0) % 2**32 + i)


def _message(message: Message) -> dict[str, Any]:
    role = "system" if message.role == "developer" else message.role
    content: Any = message.content
    if not isinstance(content, str):
        content = [
            {"type": "image", "image": part.image_url.url}
            if isinstance(part, ImagePart)
            else {"type": "text", "text": part.text}
            for part in content
        ]
    if role == "user" or isinstance(content, str):
        return {"role": role, "content": content}
    if any(part["type"] == "image" for part in content):
        raise PromptError(
            f"an image stands in a message of the {role}", fix="only users show images"
        )
    return {"role": role, "content": "".join(part["text"] for part in content)}


def _texts(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [part.get("text", "") for part in content]


def _check_text(model: LlavaModel, texts: Sequence[str]) -> None:
    """Before it is tokenised: text that cannot fit, whatever its tokens."""
    context = model.config.language.max_positions
    characters = sum(map(len, texts))
    if characters > context * _CHARACTERS_PER_TOKEN:
        what = f"the text has {characters:,} characters; the model has {context:,} positions"
        raise PromptError(what, fix="shorten the conversation")


def _check_length(model: LlavaModel, example: Example) -> None:
    """Before pictures are decoded: a prompt that leaves no room for an answer."""
    context, length = model.config.language.max_positions, example.length(model.config.image_span)
    if length >= context:
        raise PromptError(
            f"the prompt takes {length:,} positions; there are {context:,}, the answer included",
            fix="shorten the conversation or show fewer images",
        )
