"""The engine's one thread, and the bridge to asyncio: jobs go in by a queue, news come out.

The event loop never waits for the engine's lock, and the engine never waits for a client.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from llava_jax.errors import LlavaError
from llava_jax.generate import Engine, Job
from llava_jax.serve.errors import ApiError
from llava_jax.serve.meters import Meters
from llava_jax.serve.warm import warm_pictures, warm_up
from llava_jax.settings import ServeSettings

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

logger = logging.getLogger(__name__)
_FAILURES = 3  # steps in a row, before the engine is given up


@dataclass(frozen=True)
class News:
    """What came of an answer since the last news: text, tokens, and whether it has ended."""

    text: str
    ids: Sequence[int]
    logprobs: Sequence[float]
    tops: Sequence[Sequence[tuple[int, float]]]
    reason: str
    error: Exception | None


@dataclass(eq=False)
class Answers:
    """The jobs of one request as asyncio sees them. Iterate for (number of the job, its News)."""

    jobs: Sequence[Job]
    start: float
    inbox: asyncio.Queue[tuple[int, News]] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[tuple[int, News]]:
        """Until all have ended. Raises what one could not be answered for."""
        left = len(self.jobs)
        while left:
            index, news = await self.inbox.get()
            if news.error is not None:
                raise news.error
            if news.reason == "cancelled":
                raise ApiError(503, "the server ended this answer; ask again", retry=5)
            yield index, news
            left -= bool(news.reason)


class Worker:
    """Runs an Engine in a thread of its own.

    state: "warming up", "ready", "stopped", or "failed" after which nothing is answered.
    """

    def __init__(self, model: LlavaModel, settings: ServeSettings):
        self.model, self.settings = model, settings
        self.engine = Engine(model.generator, settings.slots, fair=True)
        self.meters = Meters(self.engine)
        self.state = "warming up"
        self.on_ready: Callable[[], Any] = lambda: None
        self._taken = 0  # answers promised; only the event loop's thread reads and writes it
        self._tasks: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._live: set[Job] = set()  # only the engine's thread touches it
        self._failures = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Warms up, then answers, until `stop`."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current step; what is not answered by then is cancelled."""
        self._stopping.set()
        self._tasks.put(None)
        self._thread.join()

    # From the event loop -------------------------------------------------------------------------

    def check_ready(self) -> None:
        """Raises ApiError (503) unless requests are answered."""
        if self.state == "warming up":
            raise ApiError(503, "the server is warming up", code="not_ready", retry=5)
        if self.state != "ready":
            raise ApiError(503, "the server does not answer any more", code=self.state)

    @contextmanager
    def room(self, answers: int) -> Iterator[None]:
        """Room for so many answers, from before their pictures are decoded.

        Raises ApiError: 429 where others have it, 400 for more than there ever is.
        """
        self.check_ready()
        s = self.settings
        if answers > s.slots + s.waiting:
            what = f"the request asks for {answers} answers; this server has room for {s.slots + s.waiting}"
            raise ApiError(400, what, code="too_many", param="n")
        if self._taken + answers > s.slots + s.waiting:
            wait = 1 + self._taken // s.slots
            raise ApiError(429, f"{self._taken} answers are under way; try again later", retry=wait)
        self._taken += answers
        try:
            yield
        finally:
            self._taken -= answers

    def ask(self, jobs: Sequence[Job], start: float) -> Answers:
        """Puts jobs in line; their news come to the running event loop. start: of the request."""
        self.check_ready()
        answers, loop = Answers(jobs, start), asyncio.get_running_loop()
        for index, job in enumerate(jobs):
            job.on_news = _Teller(self, answers, index, loop)
            self._tasks.put(partial(self._submit, job))
        self.check_ready()  # after it is in line: the thread may have ended in between
        return answers

    def cancel(self, answers: Answers) -> None:
        """Ends answers that nobody waits for; those that have ended are left as they are."""
        for job in answers.jobs:
            if not job.done:
                self._tasks.put(partial(self.engine.cancel, job))

    def end_answers(self) -> None:
        """Ends whatever is under way; those who wait for it are told that the server ended it."""
        self._tasks.put(partial(self._end_all, None))

    # In the engine's thread ----------------------------------------------------------------------

    def _run(self) -> None:
        try:
            warm_pictures(self.model)
            if warm_up(self.engine, self._stopping.is_set):
                self.state = "ready"
                self.on_ready()
            while self.state == "ready":
                self._turn()
        except Exception:
            self.state = "failed"
            logger.exception("the engine's thread ended")
        while not self._tasks.empty():  # what came while the state changed
            if task := self._tasks.get():
                task()
        self._end_all(None)

    def _turn(self) -> None:
        """What was asked for since, then a step; sleeps while there is nothing to do."""
        idle = not (self.engine.busy or self.engine.queued)
        try:
            while True:
                task = self._tasks.get(block=idle)
                if task is None:
                    self.state = "stopped"
                    return
                task()
                idle = False
        except queue.Empty:
            pass
        try:
            self.engine.step()
            self._failures = 0
        except Exception as error:
            logger.exception("a step of the engine failed")
            self._failures += 1
            self._end_all(error, in_slots=self._failures < _FAILURES)
            if self._failures >= _FAILURES:
                self.state = "failed"

    def _submit(self, job: Job) -> None:
        self._live.add(job)
        try:
            self.engine.submit(job)
        except Exception as error:  # of this request, whatever it is: the others go on
            if not isinstance(error, LlavaError):
                logger.exception("a request could not be put in line")
            job.error, job.reason = error, "error"
            if job.on_news:
                job.on_news(job)

    def _end_all(self, error: Exception | None, in_slots: bool = False) -> None:
        """Ends every answer, or those that have a slot."""
        for job in list(self._live):
            if not job.done and (job.slot >= 0 or not in_slots):
                job.error = error
                self.engine.cancel(job)

    def told(self, job: Job, first: bool, seconds: float) -> None:
        """Counts news of a job, so long after its request. first: its first tokens are among them."""
        if first:
            self.meters.first.observe(seconds)
        if job.done:
            self._live.discard(job)
            if job.ids:
                self.meters.whole.observe(seconds)


class _Teller:
    """Passes news of one job on to an event loop, in the engine's thread."""

    def __init__(
        self, worker: Worker, answers: Answers, index: int, loop: asyncio.AbstractEventLoop
    ):
        self._worker, self._answers, self._index, self._loop = worker, answers, index, loop
        self._sent = 0  # tokens told so far

    def __call__(self, job: Job) -> None:
        """Takes a copy of what is new: the job itself goes on changing in this thread."""
        first, self._sent = self._sent, len(job.ids)
        seconds = time.monotonic() - self._answers.start
        self._worker.told(job, bool(job.ids) and not first, seconds)
        news = News(
            job.take_pieces(),
            job.ids[first:],
            job.logprobs[first:],
            job.tops[first:],
            job.reason,
            job.error,
        )
        try:
            self._loop.call_soon_threadsafe(self._answers.inbox.put_nowait, (self._index, news))
        except RuntimeError:  # the loop is closed: nobody listens
            logger.debug("news for a loop that has ended")
