"""A model behind an OpenAI-compatible address gives the answers that its weights give."""

import base64
import io
import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from examples.benchmark_sets import write_sets
from llava_jax.cli import main
from llava_jax.eval.answers import read_answers
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.judge.endpoint import JudgeError
from llava_jax.eval.run.command import RunSettings, run_task
from llava_jax.eval.run.remote import RemoteModel
from llava_jax.eval.task import get_task
from llava_jax.generate.request import Reply, Request
from tests.eval.test_run import ask, questions
from tests.eval.test_vqa_family import lines
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
        self.script = None  # of (status, JSON) by the body, in place of the model's answer
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
                if server.script:
                    return self._send(*server.script(body))
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
    if "max_tokens" not in body:
        return Request(text, images)
    assert body["temperature"] == 0.0
    return Request(text, images, max_new_tokens=body["max_tokens"])


def png():
    Image.new("RGB", (2, 2)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


PICTURE = png()
ROW = {"answer": "B", "image": "a.png", "category": "c", "l2_category": "d"}


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
    bad, good = Request("what", [PICTURE], max_new_tokens=2), Request("hi", max_new_tokens=2)
    corrupt = Request("what", [b"no picture"], max_new_tokens=2)
    one, two, three = remote.generate_batch([bad, good, corrupt], batch_size=2, on_error="reply")
    assert "HTTP 400" in one.error
    assert "not an image" in three.error
    assert len(server.bodies) == 2
    assert (two.error, two.finish_reason) == (None, "stop")
    with pytest.raises(JudgeError, match="HTTP 400"):
        remote.generate_batch([bad], batch_size=1)
    start = time.monotonic()
    with pytest.raises(JudgeError, match="refused"):
        RemoteModel("http://127.0.0.1:9/v1", "m", "NO_KEY")
    assert time.monotonic() - start < 5


def said(content, model="m", **choice):
    message = content if isinstance(content, dict) else {"content": content}
    choice |= {"message": {"role": "assistant", **message}}
    return 200, {"model": model, "choices": [choice]}


def refused(words):
    return 400, {"error": {"message": words}}


@pytest.fixture
def sets(tmp_path):
    """A MMStar folder of twelve questions without pictures of their own; the answer is B."""
    rows = [
        {"index": n, "question": f"number {n}\nA: a, B: b, C: c, D: d", **ROW} for n in range(12)
    ]
    (tmp_path / "data" / "mmstar" / "images").mkdir(parents=True)
    (tmp_path / "data" / "mmstar" / "images" / "a.png").write_bytes(PICTURE)
    lines(tmp_path / "data" / "mmstar" / "mmstar.jsonl", rows)
    return tmp_path


@pytest.fixture
def asks(server, sets):
    """Runs the twelve questions: the result, or what went wrong."""
    server.asked.generate_batch = lambda requests, batch_size: [Reply("B", (), "stop")]

    def run(out="out", name="m", **more):
        remote = RemoteModel(server.url, name, "NO_KEY")
        how = {"identity": remote.identity, "show_progress": False, **more}
        settings = RunSettings(sets / "data", sets / out, name, **how)
        return run_task(remote, get_task("mmstar"), settings)

    return run


def test_what_a_server_wants_is_learnt_by_all_requests_on_their_way(server, asks):
    arrived = threading.Barrier(12, timeout=10)

    def picky(body):
        if "max_tokens" in body:
            arrived.wait()  # none is answered before all are sent
            return refused("use max_completion_tokens")
        return refused("no temperature") if "temperature" in body else said("B")

    server.script = picky
    result = asks()
    assert result["totals"]["accuracy"] == 100.0
    assert result["coverage"]["answered"] == 12
    how = {"temperature": None, "max_new_tokens": 128 + 8192, "served_as": "m"}
    assert result["settings"].items() >= how.items()


@pytest.mark.parametrize(
    ("reply", "why"),
    [
        (said(None), "the reply has no text"),
        (said([{"type": "image", "url": "x"}]), "the reply has no text"),
        (said("<think>B", finish_reason="length"), "no text, cut at the token limit"),
        (said("B", finish_reason="content_filter"), "the server filtered the reply"),
        (said({"content": None, "refusal": "I must not"}), "the model refused: I must not"),
        (refused("model not loaded"), "HTTP 400 model not loaded"),
    ],
)
def test_no_answer_is_no_answer(server, asks, sets, reply, why):
    server.script = lambda body: reply
    with pytest.raises(AnswerError, match=f"not one question was answered: .*{why}"):
        asks()
    # Half of them are answered: the others are missing, said so, and asked again.
    server.script = lambda body: reply if "number 1" in str(body) else said("B")
    result = asks()
    assert result["totals"]["accuracy"] == pytest.approx(100 * 9 / 12)
    assert (result["coverage"]["answered"], result["coverage"]["missing"]) == (9, 3)
    assert "3 questions got no answer, and the next run asks again: 1 (" in result["notes"][-1]
    assert why in result["notes"][-1]
    server.script, server.bodies = None, []
    assert asks()["totals"]["accuracy"] == 100.0
    assert len(server.bodies) == 3
    assert len(read_answers(sets / "out" / "mmstar" / "answers.jsonl").rows) == 12


def test_a_server_that_refuses_all_is_not_asked_to_the_end(server):
    server.script = lambda body: refused("model not loaded")
    remote, asked = RemoteModel(server.url, "m", "NO_KEY"), questions(100)
    with pytest.raises(AnswerError, match="not one question was answered"):
        ask(remote, asked, Path(os.devnull), batch=8, writes=False)
    assert len(server.bodies) == 32


def test_another_model_at_the_same_address_is_refused(server, asks):
    server.script = lambda body: refused("x") if "number 1" in str(body) else said("B", "one")
    asks()
    server.script = lambda body: said("A", "two")
    with pytest.raises(AnswerError, match="answers as several models: one, two"):
        asks()


@pytest.mark.parametrize("body", [[1], None, "x", {"choices": [None]}, {"choices": {}}, {}])
def test_a_reply_of_another_shape_is_one_line(server, body):
    server.script = lambda _: (200, body)
    with pytest.raises(JudgeError, match=r"no choices in the reply|cannot be read"):
        RemoteModel(server.url, "m", "NO_KEY").generate_batch([Request("q")], 1)


def test_the_credentials_of_an_address_are_written_nowhere(sets, capsys):
    for url in ("http://user:SECRET@127.0.0.1:9/v1", "http://127.0.0.1:9/v1?key=SECRET"):
        words = ["--tasks", "mmstar", "--data", str(sets / "data"), "--out", str(sets / "out")]
        assert main(["eval", "--model", "m", "--endpoint", url, *words]) == 2
        shown = capsys.readouterr()
        assert "holds a user, a password or a query" in shown.err
        assert "SECRET" not in shown.out + shown.err
        assert not any("SECRET" in p.read_text() for p in sets.glob("out/**/*.json"))
    with pytest.raises(JudgeError, match="--per-minute must be above 0"):
        RemoteModel("http://127.0.0.1:9/v1", "m", "NO_KEY", 0)


def test_one_task_that_fails_does_not_stop_the_others(server, sets, asks, capsys):
    server.script = lambda body: refused("x") if "other" in str(body) else said("B")
    (sets / "data" / "realworldqa" / "images").mkdir(parents=True)
    (sets / "data" / "realworldqa" / "images" / "a.png").write_bytes(PICTURE)
    row = {"question": "other?", "answer": "yes", "image": "a.png"}
    lines(sets / "data" / "realworldqa" / "test.jsonl", [row])
    out = sets / "out"
    where = ["--endpoint", server.url, "--data", str(sets / "data"), "--out", str(out)]
    assert main(["eval", "--model", "m", "--tasks", "realworldqa,mmstar", *where]) == 2
    assert "not one question was answered: " in capsys.readouterr().err
    assert json.loads((out / "mmstar" / "result.json").read_text())["totals"]["accuracy"] == 100.0
    assert (out / "report" / "index.html").exists()
