"""An answer as it comes, and turns that build on each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llava_jax.generate.job import reply_of
from llava_jax.generate.request import Reply, Request, image_list
from llava_jax.text.example import Example

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel


class Stream:
    """One answer as it comes: iterate for pieces of text; `reply` is what there is so far.

    Closing it early, or dropping it, ends the answer with finish_reason "cancelled"; so does
    setting the event `cancelled`, from any thread or signal handler, at the model's next step.

    at_end: called once with the answer, where it could be given, however the stream ended.
    """

    _ended = True  # until there is something to end

    def __init__(self, model: LlavaModel, request: Request, example: Example):
        self._job = model.job(request.seeded(), example, live=True)
        self._engine = model.engine()
        try:
            self._engine.submit(self._job)
            # The first token is chosen here, so that what cannot be asked fails before any output.
            while not (self._job.ids or self._job.done):
                self._engine.step()
        except BaseException:  # Ctrl-C: nobody waits for it any more
            self._engine.cancel(self._job)
            raise
        self.cancelled = threading.Event()
        self.at_end: Callable[[Reply], Any] = lambda reply: None
        self._ended = False

    @property
    def reply(self) -> Reply:
        """The answer so far; whole once the iteration has ended."""
        reply = reply_of(self._job)
        return reply if self._job.done else replace(reply, finish_reason="cancelled")

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        # No generator: the finally of one that was closed, or dropped, before its first piece never runs.
        try:
            return self._next()
        except BaseException:
            self.close()
            raise

    def _next(self) -> str:
        job = self._job
        while not self._ended:
            if piece := job.take_pieces():
                return piece
            if job.error is not None:
                raise job.error
            if job.done:
                break
            if self.cancelled.is_set():
                self._engine.cancel(job)  # which may give a last piece
            else:
                self._engine.step()
        raise StopIteration

    def close(self) -> None:
        """Ends the answer here."""
        if self._ended:
            return
        self._ended = True
        self._engine.cancel(self._job)
        if self._job.error is None:
            self.at_end(self.reply)

    def __del__(self) -> None:
        self.close()


class Conversation:
    """Turns that build on each other. `messages` is the record, and may be changed.

    The engine keeps the keys and values of what was read for the next turn, chunk by chunk.
    settings: fields of Request other than messages and images. exif: see LlavaModel.pixels.
    Raises ConfigError for a setting that does not exist or means nothing.
    """

    def __init__(self, model: LlavaModel, *, exif: bool = False, **settings):
        self.model, self.settings, self.exif = model, settings, exif
        Request.of("", (), settings)  # for its checks
        self.reset()

    def reset(self) -> None:
        """Forgets everything said and shown."""
        self.messages: list[dict[str, Any]] = []
        self._pixels: dict[int, np.ndarray] = {}  # by id(): the images in `messages` opened here

    @property
    def has_images(self) -> bool:
        """Whether an image was shown in it."""
        parts = (
            p for m in self.messages if not isinstance(m["content"], str) for p in m["content"]
        )
        return any(not isinstance(p, str) and p.get("type") != "text" for p in parts)

    def say(self, text: str, images: Any = None) -> Reply:
        """Asks, remembers question and answer, and returns the answer."""
        stream = self.stream(text, images)
        for _ in stream:
            pass
        return stream.reply

    def stream(self, text: str, images: Any = None) -> Stream:
        """Like `say`, piece by piece. An answer that is closed early is remembered as far as it came.

        Raises as LlavaModel.generate does; the conversation is then as before.
        """
        shown = [self.model.pixels(image, exif=self.exif) for image in image_list(images)]
        content = [{"type": "image", "image": pixels} for pixels in shown]
        asked = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        request = Request([*self.messages, asked], **self.settings)
        made = self._pixels | {id(pixels): pixels for pixels in shown}
        example = self.model.with_pixels(self.model.example(request), made)
        stream = Stream(self.model, request, example)

        def remember(reply: Reply) -> None:
            if answer := reply.text:  # a turn without one could not be written again
                self.messages += [asked, {"role": "assistant", "content": answer}]
                self._pixels = made

        stream.at_end = remember
        return stream
