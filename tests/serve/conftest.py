"""One server on loopback for all tests of the room: the shipped tiny model behind the real sockets."""

import base64
import io
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

KEY, NAME = "test-key", "tiny"


@dataclass
class Running:
    """A server, and the two kinds of client."""

    url: str
    worker: Any
    client: Any
    http: Any

    def chat(self, content: Any, **more: Any) -> Any:
        """One answer; content is of one user message, or all messages."""
        if not (isinstance(content, list) and "role" in content[0]):
            content = [{"role": "user", "content": content}]
        more = {"max_tokens": 8, **more}
        return self.client.chat.completions.create(model=NAME, messages=content, **more)

    def post(self, body: Any, path: str = "/v1/chat/completions", **more: Any) -> Any:
        return self.http.post(path, json=body, **more)


@pytest.fixture(scope="session")
def server():
    import llava_jax
    from llava_jax.serve.app import build_app
    from llava_jax.serve.server import listen, make_server
    from llava_jax.serve.worker import Worker
    from llava_jax.settings import ServeSettings

    settings = ServeSettings(slots=4, waiting=12, max_body_bytes=300_000, max_messages=20)
    worker = Worker(llava_jax.load("tiny"), settings)
    sock = listen("127.0.0.1", 0)
    web = make_server(build_app(worker, NAME, KEY, page=True), 5)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
    while not web.started:
        time.sleep(0.01)
    early = http.get("/health")
    assert (early.status_code, early.json()) == (503, {"status": "warming up"})
    worker.start()
    while http.get("/health").status_code == 503:
        assert worker.state != "failed"
        time.sleep(0.1)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
    yield Running(url, worker, client, http)
    web.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    worker.stop()


def picture(color: str = "red", size: int = 64, format: str = "PNG") -> bytes:
    """A circle on a dark ground, encoded."""
    image = Image.new("RGB", (size, size), (20, 20, 24))
    ImageDraw.Draw(image).ellipse((size // 4, size // 4, 3 * size // 4, 3 * size // 4), fill=color)
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def noise(seed: int, size: int = 64) -> bytes:
    """A picture that no other equals."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def shown(data: bytes, kind: str = "png") -> dict[str, Any]:
    """The part of a message that shows a picture."""
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def said(text: str) -> dict[str, Any]:
    """The part of a message that says something."""
    return {"type": "text", "text": text}
