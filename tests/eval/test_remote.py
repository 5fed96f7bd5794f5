"""A model behind an OpenAI-compatible address gives the answers that its weights give."""

import base64
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from examples.benchmark_sets import write_sets
from llava_jax.cli import main
from llava_jax.eval.answers import read_answers
from llava_jax.eval.judge.endpoint import JudgeError
from llava_jax.eval.run.remote import RemoteModel
from llava_jax.generate.request import Reply, Request
from tests.generate.tiny import model


class Deaf:
    """Says the same to everything, and takes no picture."""

    def generate_batch(self, requests, batch_size):
        if any(r.images for r in requests):
            raise ValueError("no picture")
        return [Reply("what?", (), "stop") for _ in requests]


class Server:
    """chat/completions over a model; dies after so many answers."""

    def __init__(self, asked):
        self.left, self.lock, self.bodies, self.asked = None, threading.Lock(), [], asked
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self._send(200, {"data": []})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server.lock:
                    server.bodies.append(body)
                    if server.left == 0:
                        return self._send(503, {"error": {"message": "gone"}})
                    server.left = None if server.left is None else server.left - 1
                    try:
                        reply = server.asked.generate_batch([request_of(body)], batch_size=1)[0]
                    except Exception as e:
                        return self._send(400, {"error": {"message": type(e).__name__}})
                choice = {"message": {"role": "assistant", "content": reply.text}}
                return self._send(200, {"model": "m", "choices": [choice]})

            def _send(self, status, value):
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("retry-after-ms", "1")
                self.end_headers()
                self.wfile.write(json.dumps(value).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


def request_of(body):
    (message,) = body["messages"]
    urls = [p["image_url"]["url"] for p in message["content"] if p["type"] == "image_url"]
    images = [base64.b64decode(u.partition(",")[2]) for u in urls]
    (text,) = (p["text"] for p in message["content"] if p["type"] == "text")
    assert body["temperature"] == 0.0
    return Request(text, images, max_new_tokens=body["max_tokens"])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    s = Server(Deaf())
    yield s
    s.server.shutdown()
    s.server.server_close()


@pytest.mark.slow
def test_the_same_answers_as_weights_also_after_a_failure(server, tmp_path, monkeypatch, capsys):
    asked = server.asked = model()
    write_sets(tmp_path / "sets", count=2)
    monkeypatch.setattr("llava_jax.eval.run.model.load_model", lambda path, **_: asked)

    def words(out, *more):
        common = ["--tasks", "pope,mmbench", "--data", str(tmp_path / "sets"), "--out", str(out)]
        few = ["--limit", "3", "--max-new-tokens", "2", "--batch-size", "2"]
        return ["eval", "--model", "tiny-model", *common, *few, *more]

    assert main(words(tmp_path / "weights")) == 0
    server.left = 1
    assert main(words(tmp_path / "remote", "--endpoint", server.url)) == 2
    assert "HTTP 503 gone" in capsys.readouterr().err
    server.left = None
    assert main(words(tmp_path / "remote", "--endpoint", server.url)) == 0
    for task in ("pope", "mmbench"):
        one, two = (
            {
                a.row["metadata"]["key"]: a.text
                for a in read_answers(tmp_path / d / task / "answers.jsonl").rows
            }
            for d in ("weights", "remote")
        )
        assert one == two
        assert len(one) >= 2
    run = json.loads((tmp_path / "remote" / "pope" / "run.json").read_text())
    assert (run["endpoint"], run["served"]) == (server.url, "tiny-model")
    other = words(tmp_path / "remote", "--endpoint", f"{server.url}/")
    assert main(other) == 2  # another address may be another model
    assert "endpoint was" in capsys.readouterr().err
    assert main(words(tmp_path / "x", "--endpoint", server.url, "--mesh", "1,1,1")) == 2
    assert "--mesh: does nothing with --endpoint" in capsys.readouterr().err


def test_a_refused_request_is_an_error_reply_and_a_dead_server_an_error(server):
    remote = RemoteModel(server.url, "m", "NO_KEY")
    bad, good = Request("what", [b"no picture"], max_new_tokens=2), Request("hi", max_new_tokens=2)
    one, two = remote.generate_batch([bad, good], batch_size=2, on_error="reply")
    assert "HTTP 400" in one.error
    assert (two.error, two.finish_reason) == (None, "stop")
    with pytest.raises(JudgeError, match="HTTP 400"):
        remote.generate_batch([bad], batch_size=1)
    start = time.monotonic()
    with pytest.raises(JudgeError, match="refused"):
        RemoteModel("http://127.0.0.1:9/v1", "m", "NO_KEY")
    assert time.monotonic() - start < 5
