"""A server on loopback in this process, whose insides a measurement or a test can look at."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from PIL import Image, ImageDraw

KEY, NAME = "test-key", "tiny"
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


@dataclass
class Running:
    """A server and a plain client of it."""

    url: str
    worker: Any
    http: httpx.Client

    def post(self, body: Any, path: str = CHAT, **more: Any) -> httpx.Response:
        """One request."""
        return self.http.post(path, json=body, **more)

    def at_rest(self, seconds: float = 30) -> bool:
        """Waits until no slot is taken and nobody waits; False where that does not come."""
        end = time.monotonic() + seconds
        while self.worker.engine.busy or self.worker.engine.queued:
            if time.monotonic() > end:
                return False
            time.sleep(0.02)
        return True


@contextmanager
def running(
    model: str = "tiny", *, page: bool = False, adapters: Any = None, **settings: Any
) -> Iterator[Running]:
    """A server that is ready; settings: of llava_jax.settings.ServeSettings."""
    import llava_jax
    from llava_jax.serve.app import build_app
    from llava_jax.serve.server import listen, make_server
    from llava_jax.serve.worker import Worker
    from llava_jax.settings import ServeSettings

    worker = Worker(llava_jax.load(model, adapters=adapters), ServeSettings(**settings))
    sock = listen("127.0.0.1", 0)
    web = make_server(build_app(worker, NAME, KEY, page=page), worker)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with httpx.Client(base_url=url, headers=HEADERS, timeout=60) as http:
        while not web.started:
            time.sleep(0.01)
        early = http.get("/health")
        must((early.status_code, early.json()) == (503, {"status": "warming up"}), early.text)
        worker.start()
        while http.get("/health").status_code == 503:
            must(worker.state != "failed", "the engine failed")
            time.sleep(0.1)
        yield Running(url, worker, http)
        web.should_exit = True
        thread.join(20)
        must(not thread.is_alive(), "the server does not end")
        worker.stop()


def must(holds: bool, what: str) -> None:
    """Ends the program with `what` unless it holds."""
    if not holds:
        raise SystemExit(what)


def picture(color: str = "red", size: int = 64, format: str = "PNG") -> bytes:
    """A circle on a dark ground, encoded."""
    image = Image.new("RGB", (size, size), (20, 20, 24))
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=color)
    return encoded(image, format)


def noise(seed: int, size: int = 64) -> bytes:
    """A picture that no other equals."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def shown(data: bytes, kind: str = "png") -> dict[str, Any]:
    """The part of a message that shows a picture."""
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    """The part of a message that says something."""
    return {"type": "text", "text": text}


def ask(content: Any, **more: Any) -> dict[str, Any]:
    """The body of a request with one message."""
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}
