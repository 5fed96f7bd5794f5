"""What is refused: by which status, in which words, and that nothing is opened or harmed by it."""

import base64
import threading
import time

import pytest

from llava_jax.errors import LlavaError
from llava_jax.serve import asking
from llava_jax.serve.cli import api_key
from llava_jax.serve.errors import as_api_error
from llava_jax.settings import ServeSettings
from tests.serve.conftest import NAME, openai, picture, said


def ask(content, **more) -> dict:
    return {"model": NAME, "messages": [{"role": "user", "content": content}], **more}


def image(url) -> list:
    return [{"type": "image_url", "image_url": {"url": url}}, said("What is it?")]


def encoded(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


REFUSED = {
    "no messages": ({"model": NAME}, 400, "messages"),
    "empty": ({"model": NAME, "messages": []}, 400, "messages"),
    "not an object": ([1, 2], 400, "JSON object"),
    "role": ({"model": NAME, "messages": [{"role": "tool", "content": "a"}]}, 400, "role"),
    "order": (
        {"model": NAME, "messages": [{"role": "assistant", "content": "a"}]},
        400,
        "last message",
    ),
    "model": ({**ask("hi"), "model": "gpt-4o"}, 404, "gpt-4o"),
    "part": (ask([{"type": "audio"}]), 400, "messages.0.content.0"),
    "address as a text": (
        ask([{"type": "image_url", "image_url": "data:,"}]),
        400,
        "content.0.image_url: ",
    ),
    "part of a text": (ask([{"type": "text", "text": 5}]), 400, "content.0.text: "),
    "tools": (ask("hi", tools=[{"type": "function"}]), 400, "tools"),
    "unknown": (ask("hi", temprature=1), 400, "temprature"),
    "schema": (ask("hi", response_format={"type": "json_schema"}), 400, "json_schema"),
    "keyword": (
        ask(
            "hi",
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "array", "uniqueItems": True}},
            },
        ),
        400,
        "uniqueItems",
    ),
    "stop and JSON": (ask("hi", stop="a", response_format={"type": "json_object"}), 400, "stop"),
    "heat": (ask("hi", temperature=-1), 400, "temperature"),
    "text for a number": (ask("hi", max_tokens="5"), 400, "max_tokens"),
    "no tokens": (ask("hi", max_tokens=0), 400, "max_tokens"),
    "two limits": (ask("hi", max_tokens=1, max_completion_tokens=1), 400, "not both"),
    "tops": (ask("hi", top_logprobs=2), 400, "top_logprobs needs logprobs"),
    "many tops": (ask("hi", logprobs=True, top_logprobs=21), 400, "top_logprobs"),
    "bias key": (ask("hi", logit_bias={"cat": 1}), 400, "logit_bias"),
    "bias below": (ask("hi", logit_bias={"-1": 1}), 400, "logit_bias"),
    "bias beyond": (ask("hi", logit_bias={"99999999": 1}), 400, "vocabulary"),
    "n": (ask("hi", n=9), 400, "limit is 8"),
    "n of 4,000 digits": (ask("hi", n=10**4000), 400, "10,000,000"),
    "stops": (ask("hi", stop=["a"] * 17), 400, "stop"),
    "empty stop": (ask("hi", stop=[""]), 400, "stop"),
    "many messages": (
        {"model": NAME, "messages": [{"role": "user", "content": "a"}] * 21},
        400,
        "limit is 20",
    ),
    "many pictures": (ask(image("data:,") * 17), 400, "limit is 16"),
    "too long": (ask("word " * 3000), 400, "positions"),
    "far too long": (ask("word " * 20_000), 400, "characters"),
    "path": (ask(image("/etc/passwd")), 400, "data URI"),
    "relative path": (ask(image("cat.png")), 400, "data URI"),
    "file": (ask(image("file:///etc/passwd")), 400, "data URI"),
    "FILE": (ask(image(" FILE://localhost/etc/passwd")), 400, "data URI"),
    "no base64": (ask(image("data:image/png,abc")), 400, "base64 data URI"),
    "bad base64": (ask(image("data:image/png;base64,@@@@")), 400, "base64"),
    "text": (ask(image(encoded(b"hello"))), 400, "accepted format"),
    "svg": (ask(image(encoded(b"<svg xmlns='http://www.w3.org/2000/svg'/>"))), 400, "accepted"),
    "cut": (ask(image(encoded(picture()[:90]))), 400, "damaged"),
    "body": (ask("x" * 400_000), 413, "300,000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(server, name):
    body, status, words = REFUSED[name]
    reply = server.post(body)
    error = reply.json()["error"]
    assert (reply.status_code, set(error)) == (status, {"message", "type", "param", "code"})
    assert words in error["message"]
    assert len(error["message"]) <= 500
    assert not any(
        sign in reply.text for sign in ("Traceback", "0x", "/etc", ".py", "site-packages")
    )


def test_the_key_is_asked_for_everywhere_but_at_health(server):
    for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/v1/chat/completions"):
        for key in ("", "Bearer wrong", "Bearer test-key2", "test-key", "Bearer \xff"):
            reply = server.http.get(path, headers={"Authorization": key.encode("latin-1")})
            assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        server.client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other")
    assert server.http.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert server.http.get("/v1/completions").status_code == 405


def test_a_body_is_counted_while_it_comes(server):
    """Chunked, so that nothing says its size; far less than all of it is taken."""
    taken = 0

    def parts():
        nonlocal taken
        for _ in range(2000):
            taken += 1
            yield b" " * 10_000

    try:
        reply = server.http.post("/v1/chat/completions", content=parts())
        assert reply.status_code == 413
    except server_broke() as error:  # the server may close while the client still writes
        assert error is not None
    assert taken < 1500


def server_broke():
    import httpx

    return (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError)


def test_beyond_the_queue_429_says_when_to_come_back(server):
    long = {"max_tokens": 300, "logit_bias": {"2": -100}, "n": 8}
    replies = []
    threads = [
        threading.Thread(target=lambda: replies.append(server.post(ask("go", **long))))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    while server.worker.engine.busy + server.worker.engine.queued < 16:
        assert any(t.is_alive() for t in threads)
        time.sleep(0.01)
    refused = server.post(ask("hi"))
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(refused.headers["Retry-After"]) >= 1
    for thread in threads:
        thread.join()
    assert [reply.status_code for reply in replies] == [200, 200]


def test_more_answers_than_there_is_ever_room_for(server, monkeypatch):
    monkeypatch.setattr(server.worker, "settings", ServeSettings(slots=2, waiting=0))
    refused = server.post(ask("hi", n=3))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert "room for 2" in refused.text


def test_the_log_has_what_a_reply_leaves_out(server, monkeypatch, caplog):
    def broken(*_):
        raise LlavaError("a secret of the server's")

    monkeypatch.setattr(asking, "chat_jobs", broken)
    refused = server.post(ask("hi"))
    assert (refused.status_code, "secret" in refused.text) == (500, False)
    assert "a secret of the server's" in caplog.text


def test_what_is_not_expected_says_nothing_of_itself():
    error = as_api_error(ValueError("/srv/models/secret at 0x7f00"))
    assert (error.status, error.message) == (500, "the server could not answer this request")


def test_keys(monkeypatch):
    monkeypatch.setenv("LLAVA_JAX_API_KEY", "from-outside")
    assert api_key(None) == ("from-outside", False)
    assert api_key("given") == ("given", False)
    monkeypatch.delenv("LLAVA_JAX_API_KEY")
    key, made = api_key(None)
    assert made
    assert len(key) > 20
    for bad in ("", "a b", "é"):
        with pytest.raises(Exception, match="key"):
            api_key(bad)
