"""The routes: OpenAI's, /health, /metrics and the OpenAPI document."""

# Not `from __future__ import annotations`: FastAPI reads the annotations of the routes below.
import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from llava_jax import __version__
from llava_jax.generate import Job
from llava_jax.serve import asking, demo, meters
from llava_jax.serve.errors import ApiError, as_api_error, of_fields, of_status, shown
from llava_jax.serve.fetch import Fetcher
from llava_jax.serve.gate import Gate
from llava_jax.serve.replies import Form
from llava_jax.serve.schema import ChatRequest, CompletionRequest, ImageUrl, Sampling
from llava_jax.serve.worker import Answers, Worker

logger = logging.getLogger(__name__)
FETCHES = 8
"""Requests whose pictures are fetched at once, where that is allowed."""


class Service:
    """What the routes do. name: of the model, as clients say it; its adapters have their own."""

    def __init__(self, worker: Worker, name: str):
        self.worker, self.name, self.settings = worker, name, worker.settings
        s = self.settings
        self.pool = ThreadPoolExecutor(s.image_threads, "images")
        self.fetcher = Fetcher(s.allow_urls, s.url_seconds, s.max_body_bytes)
        self.fetching = ThreadPoolExecutor(FETCHES, "fetch")  # apart: a slow host stops no decoding
        self._made = int(time.time())
        self._adapters = worker.model.generator.adapters.names

    def models(self) -> list[dict[str, Any]]:
        """The list of models: the base, then its adapters."""
        return [self.model(name) for name in (self.name, *self._adapters)]

    def model(self, name: str) -> dict[str, Any]:
        """One entry of the list of models. Raises ApiError (404) for one that is not here."""
        self.adapter(name)
        config = self.worker.model.config
        return {
            "id": name,
            "object": "model",
            "parent": None if name == self.name else self.name,
            "created": self._made,
            "owned_by": "llava_jax",
            "max_model_len": config.language.max_positions,
            "image_tokens": config.image_tokens,
            "image_span": config.image_span,
            "max_images": self.settings.max_images,
        }

    def adapter(self, name: str) -> str:
        """The adapter that clients call so; "" for the model itself. Raises ApiError (404)."""
        if name == self.name:
            return ""
        if name not in self._adapters:
            known = ", ".join((self.name, *self._adapters))
            what = f"there is no model {shown(name, 100)}; this server has {shown(known)}"
            raise ApiError(404, what, code="model_not_found", param="model")
        return name

    async def chat(self, http: HttpRequest, body: ChatRequest) -> Response:
        """POST /v1/chat/completions."""
        adapter = self.adapter(body.model)
        urls = asking.check_chat(body, self.settings, self.fetcher)
        form = self._form(body, chat=True, tops=body.top_logprobs)

        async def make() -> list[Job]:
            loop, fetched = asyncio.get_running_loop(), {}
            if urls:
                fetched = await loop.run_in_executor(self.fetching, self.fetcher.get, urls)
            return await self._prepared(asking.chat_jobs, self.worker.model, body, adapter, fetched)

        return await self._answer(http, body, body.n, make, form, body.logprobs)

    async def complete(self, http: HttpRequest, body: CompletionRequest) -> Response:
        """POST /v1/completions."""
        adapter = self.adapter(body.model)
        asking.check_completion(body, self.settings)
        form = self._form(body, chat=False, tops=body.logprobs or 0)
        make = partial(self._prepared, asking.completion_jobs, self.worker.model, body, adapter)
        count = body.n * len(body.prompt)
        return await self._answer(http, body, count, make, form, body.logprobs is not None)

    async def seen(self, image: ImageUrl) -> dict[str, Any]:
        """POST /demo/seen: a picture as the model sees it."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.pool, demo.seen, self.worker.model, image.url)

    def _form(self, body: Sampling, *, chat: bool, tops: int) -> Form:
        tokenizer = self.worker.model.tokenizer
        return Form(body.model, tokenizer, chat=chat, stream=body.stream, tops=tops)

    async def _answer(
        self,
        http: HttpRequest,
        body: Sampling,
        count: int,
        make: Callable[[], Awaitable[list[Job]]],
        form: Form,
        logprobs: bool,
    ) -> Response:
        start = time.monotonic()
        with ExitStack() as held:  # room, and answers to be ended if this request breaks off
            held.enter_context(self.worker.room(count))
            jobs = await make()
            answers = self.worker.ask(jobs, start)
            held.callback(self.worker.cancel, answers)
            if body.stream:
                usage = body.stream_options.include_usage
                return Events(_events(answers, form, logprobs, usage), held.pop_all())
            if not await _ended(answers, http):
                return Response(status_code=499)  # nobody reads it
            texts = [job.text.text if job.text else "" for job in jobs]
            return JSONResponse(form.whole(jobs, texts, logprobs=logprobs))

    async def _prepared(self, make: Callable[..., list[Job]], *what: Any) -> list[Job]:
        def timed() -> list[Job]:
            with self.worker.meters.preparing.time():
                return make(*what)

        return await asyncio.get_running_loop().run_in_executor(self.pool, timed)


class Events(StreamingResponse):
    """Server-sent events. `held` is let go when they have ended, however they did."""

    def __init__(self, lines: AsyncIterator[str], held: ExitStack):
        super().__init__(lines, media_type="text/event-stream")
        self._held = held

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends them."""
        with self._held:
            await super().__call__(scope, receive, send)


async def _events(answers: Answers, form: Form, logprobs: bool, usage: bool) -> AsyncIterator[str]:
    def line(what: Any) -> str:
        return f"data: {json.dumps(what, ensure_ascii=False, allow_nan=False)}\n\n"

    try:
        if form.chat:
            for index in range(len(answers.jobs)):
                yield line(form.opening(index))
        async for index, news in answers:
            if news.text or news.reason or (logprobs and news.ids):
                yield line(form.piece(index, news, logprobs=logprobs))
        if usage:
            yield line(form.closing(answers.jobs))
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield line(_told(error).body)


def _told(error: Exception) -> ApiError:
    """What a client is told; what it is not told is in the log."""
    refused = as_api_error(error)
    if refused.status == 500:
        logger.error("a request failed", exc_info=error)
    return refused


async def _ended(answers: Answers, http: HttpRequest) -> bool:
    """Waits for the answers; False where the client leaves first."""

    async def all_of_them() -> None:
        async for _ in answers:
            pass

    async def leaving() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(all_of_them()), asyncio.create_task(leaving())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            return False
        tasks[0].result()
        return True
    finally:
        for task in tasks:
            task.cancel()


def build_app(worker: Worker, name: str, key: str, *, page: bool = False) -> Gate:
    """The whole application, with the gate around it.

    key: what clients must send. page: with the chat page at /.
    """
    from fastapi import Depends, FastAPI
    from fastapi.security import HTTPBearer

    service = Service(worker, name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        for pool in (service.pool, service.fetching):
            pool.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="llava_jax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(HTTPBearer(auto_error=False))],  # for the document: Gate checks it
        redirect_slashes=False,
    )
    _add_routes(app, service)
    files = demo.files() if page else {}
    if page:
        _add_page(app, service, files)
    _render_errors(app)

    def count(route: str, status: int) -> None:
        worker.meters.requests.labels(route, str(status)).inc()

    return Gate(app, key, worker.settings, count, frozenset(files))


def _add_routes(app: Any, service: Service) -> None:
    worker = service.worker
    refusals: Any = {code: {"description": "a refusal in OpenAI's form"} for code in _REFUSALS}

    @app.post("/v1/chat/completions", responses=refusals)
    async def chat(http: HttpRequest, body: ChatRequest) -> Response:
        return await service.chat(http, body)

    @app.post("/v1/completions", responses=refusals)
    async def complete(http: HttpRequest, body: CompletionRequest) -> Response:
        return await service.complete(http, body)

    @app.get("/v1/models", responses=refusals)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}", responses=refusals)
    async def model(name: str) -> dict[str, Any]:
        return service.model(name)

    @app.get("/health", responses=refusals)
    async def health() -> JSONResponse:
        return JSONResponse({"status": worker.state}, 200 if worker.state == "ready" else 503)

    @app.get("/metrics", responses={**refusals, 200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(worker.meters.page(), headers={"Content-Type": meters.TYPE})


def _add_page(app: Any, service: Service, files: dict[str, tuple[bytes, str]]) -> None:
    def route(content: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
        async def reply() -> Response:
            return Response(content, media_type=kind, headers=demo.HEADERS)

        return reply

    for path, file in files.items():
        app.get(path, include_in_schema=False)(route(*file))

    @app.post("/demo/seen", include_in_schema=False)
    async def seen(image: ImageUrl) -> dict[str, Any]:
        return await service.seen(image)


_REFUSALS = (400, 401, 404, 408, 413, 429, 500, 503)


def _render_errors(app: Any) -> None:
    """Every error leaves in one form; a request that is malformed has 400, as OpenAI's."""
    from fastapi.exceptions import RequestValidationError

    def rendering(make: Callable[[Any], ApiError]) -> Callable[..., Awaitable[JSONResponse]]:
        async def render(_: HttpRequest, error: Any) -> JSONResponse:
            refused = make(error)
            return JSONResponse(refused.body, refused.status, refused.headers)

        return render

    def of_problems(error: RequestValidationError) -> ApiError:
        problems: Sequence[Any] = error.errors()
        return of_fields(problems)

    app.add_exception_handler(RequestValidationError, rendering(of_problems))
    app.add_exception_handler(HTTPException, rendering(lambda e: of_status(e.status_code)))
    for kind in _OURS:
        app.add_exception_handler(kind, rendering(_told))
    app.add_exception_handler(Exception, rendering(as_api_error))  # re-raised: Gate logs it


_OURS = ApiError.__mro__[:2]  # ApiError, and LlavaError for what the model refuses
