"""A model behind an OpenAI-compatible address, asked as ours are: the paper's prompts, in parallel."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llava_jax.errors import ImageError
from llava_jax.eval.judge.endpoint import Endpoint, JudgeError, in_parallel
from llava_jax.generate.request import Reply, Request
from llava_jax.images.decode import open_image

_KINDS = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}  # else a jpeg


class RefusedError(JudgeError):
    """The server gave no answer to this request."""

    refused = True


@dataclass(frozen=True)
class RemoteReply(Reply):
    """served: the model's name in the server's reply. sent: as in JudgeReply."""

    served: str = ""
    sent: dict[str, Any] = field(default_factory=dict)


class RemoteModel:
    """What `run_task` asks in place of a LlavaModel.

    url: up to and with "/v1". name: the model's there. The server adds its own template, so the
    prompt is sent without one, the images first.
    """

    config = SimpleNamespace(template="the server's")

    def __init__(self, url: str, name: str, key_env: str, per_minute: float | None = None):
        most = 1e9 if per_minute is None else per_minute
        self._endpoint = Endpoint(url, name, None, key_env, most)
        self.identity = {"endpoint": url, "served": name}
        self._endpoint.check()

    def generate_batch(
        self, requests: Sequence[Request], batch_size: int, on_error: str = "raise"
    ) -> list[RemoteReply]:
        """Answers `batch_size` requests at a time. on_error "reply": a picture that cannot be read, a
        request that the server refuses and a reply without an answer are Replies with an error.

        Raises JudgeError where the server is gone or fails.
        """

        def ask(request: Request) -> RemoteReply:
            how = {"temperature": request.temperature, "max_tokens": request.max_new_tokens}
            try:
                urls = [{"url": _url(image)} for image in request.images]
                content: list[dict[str, Any]] = [
                    {"type": "image_url", "image_url": u} for u in urls
                ]
                content.append({"type": "text", "text": str(request.messages)})
                reply = self._endpoint.ask([{"role": "user", "content": content}], **how)
                if reply.no_answer:
                    raise RefusedError(reply.no_answer)
            except (ImageError, JudgeError) as e:
                if on_error == "reply" and getattr(e, "refused", True):
                    return RemoteReply("", (), "error", error=str(e))
                raise
            more = {"served": reply.model, "sent": reply.sent}
            return RemoteReply(reply.text.strip(), (), "stop", **more)

        return list(in_parallel(ask, requests, batch_size))


def _url(image: Any) -> str:
    named = isinstance(image, str | Path)
    data: bytes = Path(image).read_bytes() if named else image
    open_image(data, name=Path(image).name if named else None)  # as weights do
    kind = next((k for start, k in _KINDS.items() if data.startswith(start)), "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
