"""Every way in which a request is refused: status, fixed words, OpenAI's shape.

What a client sees comes from here alone: no traceback, memory address, path or library's message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_jax.errors import ConfigError, ImageError, LlavaError, PromptError
from llava_jax.util import printable

_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}

_PARTS = ("text", "image_url")


class ApiError(LlavaError):
    """A refusal. status: of HTTP. code, param: as in OpenAI's errors. retry: seconds to wait."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: int | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry

    @property
    def body(self) -> dict[str, Any]:
        """What the client reads."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {
            "message": shown(self.message),
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """What goes beside it."""
        return {} if self.retry is None else {"Retry-After": str(self.retry)}


def as_api_error(error: BaseException | None) -> ApiError:
    """What a client is told about an error: bad input is named, everything else is a fixed text."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ImageError):
        return ApiError(400, shown(str(error)), code=f"image_{error.code}", param="messages")
    if isinstance(error, PromptError):
        return ApiError(400, shown(str(error)), code="bad_prompt", param="messages")
    if isinstance(error, ConfigError):
        return ApiError(400, shown(str(error)), code="bad_value")
    return ApiError(500, "the server could not answer this request", code="internal_error")


def of_status(status: int) -> ApiError:
    """For a refusal of the web framework, whose own words are not passed on."""
    words = {
        400: "the body could not be read as JSON",
        404: "there is no such route",
        405: "this route does not take this method",
    }
    return ApiError(status, words.get(status, "the request cannot be served"))


def of_fields(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """One of pydantic's findings; the value that was sent is not repeated."""
    # Of a field that may be one thing or another: what went wrong deepest inside.
    first = max(problems, key=lambda problem: len(problem.get("loc", ())), default={})
    kind = str(first.get("type", ""))
    # Names of pydantic's own, for the branches of a union, are no part of the request.
    # So are the kinds of a message's parts, which stand between a part's number and its field.
    loc = [str(x) for x in first.get("loc", ())[1:] if x != "str" and "[" not in str(x)]
    where = [x for x, before in zip(loc, ["", *loc]) if x not in _PARTS or not before.isdigit()]
    if kind == "value_error":  # of a validator of ours, which says it in our words
        what = str(first.get("msg", "")).removeprefix("Value error, ")
        return ApiError(400, shown(what), code="bad_value", param=shown(".".join(where)) or None)
    if kind == "json_invalid" or not where:
        what = "the body is not a JSON object of the right form (Content-Type: application/json)"
        return ApiError(400, what, code="invalid_json")
    name = shown(".".join(where), 100)
    if kind == "extra_forbidden":
        what = f"{name} is not supported here; leave it out"
        return ApiError(400, what, code="unsupported_parameter", param=name)
    what = shown(f"{name}: {first.get('msg', 'is malformed')}")
    return ApiError(400, what, code="bad_value", param=name)


def shown(text: str, most: int = 500) -> str:
    """A text that may hold words of a client: one line, no control characters, cut."""
    text = printable(" ".join(text[: 4 * most].split()), keep="")
    return text if len(text) <= most else f"{text[: most - 3]}..."
