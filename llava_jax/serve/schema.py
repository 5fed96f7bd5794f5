"""What a request may say, as pydantic models: they check it, and make the OpenAPI document.

What would change the answer and is not known here is refused by name. null is as good as nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from llava_jax.generate.request import MOST_BIAS, MOST_TOP_LOGPROBS

MOST_STOPS, MOST_STOP_LENGTH, MOST_BIASED, MOST_FIELDS = 16, 256, 1024, 100
# Of OpenAI's fields those that say nothing about the answer.
_IDLE = (
    *("user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention"),
)


class Strict(BaseModel):
    """Nothing is converted, nothing unknown is passed over; null means that a field is not there."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if len(data) > MOST_FIELDS:  # each unknown one would be a finding in memory
            raise ValueError(f"an object has more than {MOST_FIELDS} fields")
        return {k: v for k, v in data.items() if v is not None}


class TextPart(Strict):
    """A text among the parts of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """A picture. There is one resolution, so that `detail` says nothing."""

    url: str = Field(description="data:image/...;base64,...; addresses and paths are refused")
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Strict):
    """A picture among the parts of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _as_it_was_answered(cls, data: Any) -> Any:
        # An answer's own message, sent back as it is, has these; empty, they say nothing.
        if isinstance(data, dict):
            return {k: v for k, v in data.items() if k not in ("annotations", "tool_calls") or v}
        return data


class StreamOptions(Strict):
    """include_usage: a last piece with the tokens. include_obfuscation: nothing is padded here."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class JsonSchema(Strict):
    """A schema and its name, which says nothing here. strict: always, whatever is said."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(Strict):
    """The form of an answer: text, JSON of any form, or JSON as a schema says."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError(
                "response_format: json_schema is for the type json_schema, and needed there"
            )
        return self


def _token_ids(value: Any) -> Any:
    """JSON's keys are strings; those of logit_bias mean ids of tokens."""
    if not isinstance(value, dict):
        return value
    if len(value) > MOST_BIASED:
        raise ValueError(f"logit_bias has more than {MOST_BIASED} tokens")
    if not all(isinstance(k, str) and k.isascii() and k.isdigit() and len(k) < 10 for k in value):
        raise ValueError("logit_bias has a key that is not the id of a token")
    return {int(k): v for k, v in value.items()}


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP_LENGTH)]


class Sampling(Strict):
    """What both routes share. Defaults are those of `llava-jax chat` (docs/settings.md)."""

    model: str
    max_tokens: int | None = Field(None, ge=1, description="512 without it")
    temperature: float | None = Field(None, ge=0, le=100, description="0 (greedy) without it")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=2**63)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Stop], Field(fail_fast=True), Field(max_length=MOST_STOPS), BeforeValidator(_as_list)
    ] = Field(default_factory=list, description="a text, or a list of them")
    logit_bias: Annotated[dict[int, Bias], BeforeValidator(_token_ids)] = Field(
        default_factory=dict, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,9}$"}}
    )
    n: int = Field(1, ge=1)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @model_validator(mode="before")
    @classmethod
    def _without_idle(cls, data: Any) -> Any:
        return {k: v for k, v in data.items() if k not in _IDLE} if isinstance(data, dict) else data

    def settings(self) -> dict[str, Any]:
        """Those of our settings (llava_jax.settings.SamplingSettings) that the request has."""
        names = ("temperature", "top_p", "top_k", "min_p", "seed", "max_tokens")
        names += ("presence_penalty", "frequency_penalty", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        given["max_new_tokens"] = given.pop("max_tokens")
        found = {name: value for name, value in given.items() if value is not None}
        return found | {"stop": tuple(self.stop), "logit_bias": self.logit_bias}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens is not None:
            if self.max_tokens is not None:
                raise ValueError("give max_tokens or max_completion_tokens, not both")
            self.max_tokens = self.max_completion_tokens
        return self

    def image_urls(self) -> list[str]:
        """The pictures, in order."""
        parts = [p for m in self.messages if not isinstance(m.content, str) for p in m.content]
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class CompletionRequest(Sampling):
    """POST /v1/completions: a text goes on, with no template around it."""

    prompt: Annotated[
        list[str], Field(fail_fast=True), Field(min_length=1), BeforeValidator(_as_list)
    ] = Field(description="a text, or a list of them")
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: Literal[False] = False
