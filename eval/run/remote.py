"""A model behind an OpenAI-compatible address, asked as ours are: the paper's prompts, in parallel."""

import base64
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_jax.eval.judge.endpoint import Endpoint, JudgeError, in_parallel
from llava_jax.generate.request import Reply, Request

_KINDS = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}  # else a jpeg


class RemoteModel:
    """What `run_task` asks in place of a LlavaModel.

    url: up to and with "/v1". name: the model's there. The server adds its own template, so the
    prompt is sent without one, the images first.
    """

    config = SimpleNamespace(template="the server's")

    def __init__(self, url: str, name: str, key_env: str, per_minute: float | None = None):
        self.identity = {"endpoint": url, "served": name}
        self._endpoint = Endpoint(url, name, None, key_env, per_minute or 1e9)
        self._endpoint.check()

    def generate_batch(
        self, requests: Sequence[Request], batch_size: int, on_error: str = "raise"
    ) -> list[Reply]:
        """Answers `batch_size` requests at a time. on_error "reply": a request that the server
        refuses (a picture it cannot read) is a Reply with an error.

        Raises JudgeError where the server is gone or fails.
        """

        def ask(request: Request) -> Reply:
            images = [{"type": "image_url", "image_url": {"url": _url(i)}} for i in request.images]
            content = [*images, {"type": "text", "text": str(request.messages)}]
            how = {"temperature": request.temperature, "max_tokens": request.max_new_tokens}
            try:
                reply = self._endpoint.ask([{"role": "user", "content": content}], **how)
            except JudgeError as e:
                if e.refused and on_error == "reply":
                    return Reply("", (), "error", error=str(e))
                raise
            return Reply(reply.text.strip(), (), "stop")

        return list(in_parallel(ask, requests, batch_size))


def _url(image: Any) -> str:
    data = Path(image).read_bytes() if isinstance(image, str | Path) else image
    kind = next((k for start, k in _KINDS.items() if data.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
