"""One server on loopback for all tests of the room: the shipped tiny model behind the real sockets."""

from dataclasses import dataclass
from typing import Any

import openai
import pytest

from bench.serving import KEY, NAME, Running, noise, picture, running, said, shown
from tests.generate.test_adapters import written

__all__ = ["KEY", "NAME", "noise", "openai", "picture", "said", "shown"]


@dataclass
class Served(Running):
    """The server, and OpenAI's client beside the plain one."""

    client: Any = None

    def chat(self, content: Any, **more: Any) -> Any:
        """One answer; content is of one user message, or all messages."""
        if not (isinstance(content, list) and "role" in content[0]):
            content = [{"role": "user", "content": content}]
        more = {"max_tokens": 8, "model": NAME, **more}
        return self.client.chat.completions.create(messages=content, **more)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    # With an adapter beside it: what is asked of the model itself must not change by that.
    adapters = {"cats": written("peft", tmp_path_factory.mktemp("adapters"))}
    limits: Any = {"slots": 4, "waiting": 12, "max_body_bytes": 300_000, "max_messages": 20}
    with running(page=True, adapters=adapters, **limits) as made:
        client = openai.OpenAI(base_url=f"{made.url}/v1", api_key=KEY, max_retries=0, timeout=60)
        yield Served(made.url, made.worker, made.http, client)
