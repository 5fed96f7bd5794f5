"""What every request passes before anything reads it: key, size, time; and what no reply may lack."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

from llava_jax.serve.errors import ApiError, as_api_error
from llava_jax.settings import ServeSettings

logger = logging.getLogger(__name__)
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

OPEN = "/health"
"""The only route of the API that asks for no key."""
BODIES_AT_ONCE = 16
"""Of the largest size: what all bodies requests together may hold in memory."""
MOST_PARTS = 500_000
"""Values and commas in a body; pictures in base64 have none of either."""
_ROUTES = {OPEN, "/metrics", "/openapi.json", "/v1/models", "/v1/completions"}
_ROUTES |= {"/v1/chat/completions"}


class Gone(Exception):
    """The client left before its request had come."""


class Gate:
    """An ASGI application around another.

    count: called with route and status of every reply. files: paths of a page that has no secrets.
    """

    def __init__(
        self,
        app: Any,
        key: str,
        settings: ServeSettings,
        count: Callable[[str, int], None],
        files: frozenset[str] = frozenset(),
    ):
        self._app, self._settings, self._count = app, settings, count
        self._open = {OPEN, *files}
        self._key = f"Bearer {key}".encode()
        self._held = 0  # bytes of bodies in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one connection of a kind that ASGI knows."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, path = 0, scope["path"]

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
                message["headers"] = [*message.get("headers", ()), *extra]
                self._count(path if path in _ROUTES else "other", status)
            await send(message)

        body = b""
        try:
            self._check_key(scope)
            if scope["method"] == "POST":
                body = await self._read(scope, receive)
                receive = _again(body, receive)
            await self._app(scope, receive, sending)
        except Gone:
            return
        except Exception as error:
            if not isinstance(error, ApiError):
                logger.exception("a request failed")
            if not status:
                refused = as_api_error(error)
                headers = {**refused.headers, "Connection": "close"}
                await JSONResponse(refused.body, refused.status, headers)(scope, receive, sending)
        finally:
            self._held -= len(body)

    def _check_key(self, scope: Scope) -> None:
        """In constant time, whatever was sent."""
        if scope["path"] in self._open:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], self._key):
            what = "the API key is missing or wrong (Authorization: Bearer KEY)"
            raise ApiError(401, what, code="invalid_api_key")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, counted while it comes."""
        most, parts, size = self._settings.max_body_bytes, [], 0
        said = next((v for n, v in scope["headers"] if n == b"content-length"), b"0")
        try:
            if said.isdigit() and int(said[:20]) > most:
                raise _too_large(most)
            async with asyncio.timeout(self._settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    part = message.get("body", b"")
                    if size + len(part) > most:
                        raise _too_large(most)
                    if self._held + len(part) > BODIES_AT_ONCE * most:
                        raise ApiError(503, "too many large requests arrive at once", retry=2)
                    size, self._held = size + len(part), self._held + len(part)
                    parts.append(part)
                    if not message.get("more_body"):
                        return _few_parts(b"".join(parts))
        except BaseException as error:
            self._held -= size
            if isinstance(error, TimeoutError):
                raise ApiError(408, "the request took too long to arrive") from None
            raise


def _few_parts(body: bytes) -> bytes:
    """A body that, parsed, takes no memory out of all proportion: `[[],[],...` takes 30 times its own."""
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > MOST_PARTS:
        what = f"the body has more than {MOST_PARTS:,} values"
        raise ApiError(413, what, code="body_too_large")
    return body


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most:,} bytes", code="body_too_large")


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what follows it."""
    given = False

    async def receiving() -> MutableMapping[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving
