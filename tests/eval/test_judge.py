"""Judges against a server in this process: retries, caching, resuming, and what a key never does."""

import json
import shlex
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from llava_jax.cli import main
from llava_jax.eval.benchmarks.mmvet import read_grade
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.files import locked
from llava_jax.eval.judge import command
from llava_jax.eval.judge.command import (
    estimate,
    grade_one,
    judge_grades,
    judge_reviews,
    review_tries,
)
from llava_jax.eval.judge.endpoint import Endpoint, JudgeError, content_text
from llava_jax.eval.judge.reviews import read_scores
from llava_jax.eval.task import get_task
from tests.eval.test_vqa_family import dump, lines


class Judge:
    """A server whose replies are a list of texts, or of (status, body)."""

    def __init__(self):
        self.replies: list = []
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.headers = {"retry-after-ms": "1"}  # the client's own first wait is half a second
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(body | {"path": self.path})
                judge.keys.append(self.headers.get("Authorization"))
                reply = judge.replies.pop(0) if judge.replies else "8 6\nfine"
                status, text = reply if isinstance(reply, tuple) else (200, None)
                if text is None:
                    choice = {"message": {"role": "assistant", "content": reply}}
                    text = json.dumps({"model": "judge-1", "choices": [choice]})
                self.send_response(status)
                for name, value in judge.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args):
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def judge(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    j = Judge()
    yield j
    j.server.shutdown()
    j.server.server_close()


def endpoint(judge, tmp_path, **more):
    settings = {"per_minute": 1e6, "retries": 2} | more
    return Endpoint(judge.url, "gpt-x", tmp_path / "t.jsonl", **settings)


ASK = {"messages": [{"role": "user", "content": "hi"}], "temperature": 0.0, "max_tokens": 5}


def test_asks_once_and_remembers(judge, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    first = endpoint(judge, tmp_path)
    assert first.ask(**ASK).text == "8 6\nfine"
    assert first.ask(**ASK).model == "judge-1"
    assert endpoint(judge, tmp_path).ask(**ASK).text == "8 6\nfine"
    assert len(judge.requests) == 1
    assert judge.requests[0]["path"] == "/v1/chat/completions"
    assert judge.keys == ["Bearer sk-secret"]
    assert "sk-secret" not in (tmp_path / "t.jsonl").read_text()
    first.ask(**ASK, again=1)
    assert len(judge.requests) == 2


def test_transcript_cut_in_half(judge, tmp_path):
    endpoint(judge, tmp_path).ask(**ASK)
    with open(tmp_path / "t.jsonl", "a") as f:
        f.write('{"key": "abc", "req')
    assert endpoint(judge, tmp_path).ask(**ASK).text == "8 6\nfine"
    assert len(judge.requests) == 1
    (tmp_path / "t.jsonl").write_text("{}\n")
    with pytest.raises(JudgeError, match=r"t\.jsonl line 1"):
        endpoint(judge, tmp_path)


def test_retries_then_gives_up(judge, tmp_path):
    judge.replies = [(429, "{}"), (500, "oops"), "9 9"]
    assert endpoint(judge, tmp_path).ask(**ASK).text == "9 9"
    judge.replies = [(503, "{}")] * 3
    with pytest.raises(JudgeError, match=r"HTTP 503 \(3 times\)"):
        endpoint(judge, tmp_path).ask(**ASK, again=1)
    judge.replies = [(401, '{"error": {"message": "bad key"}}')]
    with pytest.raises(JudgeError, match="HTTP 401 bad key") as caught:
        endpoint(judge, tmp_path).ask(**ASK, again=1)
    assert "--key-env" in str(caught.value.fix)
    for body in ('{"error": "too long"}', '{"detail": "too long"}', "too\nlong"):
        judge.replies = [(400, body)]
        with pytest.raises(JudgeError, match="HTTP 400 too long"):
            endpoint(judge, tmp_path).ask(**ASK, again=1)
    for reply, words in (
        ((200, "{}"), "no choices in the reply '{}'"),
        ((200, "<html>"), "no choices in the reply '<html>'"),
    ):
        judge.replies = [reply]
        with pytest.raises(JudgeError, match=words):
            endpoint(judge, tmp_path).ask(**ASK, again=1)
    judge.headers = {"content-type": "application/json"}
    judge.replies = [(200, "half a rep")]
    with pytest.raises(JudgeError, match="the reply cannot be read"):
        endpoint(judge, tmp_path).ask(**ASK, again=1)


def test_waits_as_long_as_the_server_says(judge, tmp_path):
    judge.headers = {"Retry-After": "1"}
    judge.replies = [(429, "{}"), "9 9"]
    start = time.monotonic()
    assert endpoint(judge, tmp_path).ask(**ASK).text == "9 9"
    assert time.monotonic() - start >= 1


def test_every_try_counts_for_the_rate(judge, tmp_path):
    judge.replies = [(500, "{}"), (500, "{}"), "9 9"]
    start = time.monotonic()
    endpoint(judge, tmp_path, per_minute=60 / 0.2).ask(**ASK)
    assert time.monotonic() - start >= 0.4


def test_a_server_without_a_key(judge, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint(judge, tmp_path).ask(**ASK)
    assert judge.keys == [None]


def test_nobody_there(judge, tmp_path):
    gone = Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "t", retries=0)
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1: .*refused.* \(1 time\)"):
        gone.ask(**ASK)


def test_settings_are_checked(judge, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for url in ("localhost:1", "http://h:abc/v1", "http://[::1", "http://h\n/v1"):
        with pytest.raises(JudgeError, match="not an http"):
            Endpoint(url, "m", tmp_path / "t")
    with pytest.raises(JudgeError, match=r"no key in \$OPENAI_API_KEY"):
        Endpoint("https://api.openai.com/v1", "m", tmp_path / "t")
    with pytest.raises(JudgeError, match="above 0"):
        endpoint(judge, tmp_path, per_minute=0)


def test_reviews_resume(judge, tmp_path):
    requests = [({"question_id": i, "category": "conv"}, f"message {i}") for i in range(3)]
    out = tmp_path / "reviews.jsonl"
    judge_reviews(requests[:2], out, endpoint(judge, tmp_path))
    judge.replies = ["none"] * 4
    with open(out, "a") as f:
        f.write('{"question_id": 2, "tup')  # a kill in the middle of a line
    judge_reviews(requests, out, endpoint(judge, tmp_path))
    assert len(judge.requests) == 2 + 4
    first = min(judge.requests, key=lambda r: r["messages"][1]["content"])
    system, user = first["messages"]
    assert system["content"].startswith("You are a helpful and precise assistant")
    assert (user["content"], first["temperature"]) == ("message 0", 0.2)
    assert first["max_tokens"] == 1024
    result = get_task("coco30").score(out, tmp_path)
    assert result.totals["judge"] == "judge-1"
    assert result.totals["unread_reviews"] == 1
    assert result.totals["all"] == 75.0  # of the two that were read
    assert "1 reviews were not readable; no mean has them" in result.notes
    other = Endpoint(judge.url, "gpt-y", tmp_path / "t.jsonl")
    with pytest.raises(AnswerError, match="question 0 was reviewed by 'gpt-x', not 'gpt-y'"):
        judge_reviews(requests, out, other)
    with pytest.raises(AnswerError, match="question 0 was reviewed with another answer"):
        judge_reviews(
            [({"question_id": 0, "category": "conv"}, "new")], out, endpoint(judge, tmp_path)
        )


def test_grades(judge, tmp_path):
    judge.replies = ["0.5", "about it", "0.9 |"]
    requests = [("v1_0", "row 0"), ("v1_1", "row 1")]
    out = tmp_path / "grades.json"
    judge_grades(requests, out, endpoint(judge, tmp_path), runs=1, threads=1)
    grades = json.loads(out.read_text())
    known = {"model": ["judge-1"], "content": ["0.5"], "score": [0.5], "judge_model": "gpt-x"}
    assert grades["v1_0"].items() >= known.items()
    assert grades["v1_1"]["score"] == [0.9]
    with pytest.raises(AnswerError, match="question v1_0 was reviewed with another answer"):
        judge_grades([("v1_0", "new")], out, endpoint(judge, tmp_path))
    with pytest.raises(AnswerError, match="reviewed by 'gpt-x', not 'gpt-y'"):
        judge_grades(requests, out, Endpoint(judge.url, "gpt-y", tmp_path / "t.jsonl"))
    assert judge.requests[2]["messages"][0]["content"].endswith("answer (digit): ")
    judge.replies = ["1.0", "0.0"]
    judge_grades(requests, out, endpoint(judge, tmp_path), runs=2, threads=1)
    assert json.loads(out.read_text())["v1_0"]["score"] == [0.5, 1.0]
    assert len(judge.requests) == 5


def test_no_grade_at_all(judge, tmp_path):
    judge.replies = ["no"] * 5
    assert grade_one("row", endpoint(judge, tmp_path)) == ("judge-1", "no", None)
    assert [r["temperature"] for r in judge.requests] == [0.0, 0.0, 0.5, 1.0, 1.5]


def test_estimate():
    tries = review_tries("x" * 4000, 0)
    line = estimate([tries, tries[2:]], 1.0, 10.0)
    words = "2 to 6 requests, about 2,039 to 6,118 tokens read and at most 6,144 written"
    assert line == f"{words}, at most $0.07"
    assert "$" not in estimate([tries], None, None)


def test_the_estimate_holds_whatever_the_judge_says_and_counts_what_is_left(
    judge, tmp_path, capsys
):
    truth = {f"v1_{n}": {"imagename": "a", "question": f"q{n}", "answer": "z", "capability": ["ocr"]}
             for n in (0, 1)}  # fmt: skip
    dump(tmp_path / "mm-vet.json", truth)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": n, "text": "z"} for n in (0, 1)])
    out = str(tmp_path / "g.json")
    files = ["--answers", str(answers), "--data", str(tmp_path), "--out", out, "--yes"]
    words = ["eval", "judge", "mmvet", *files, "--judge-model", "x", "--endpoint", judge.url]
    words += ["--per-minute", "1e6", "--parallel", "1"]
    judge.replies = ["?"] * 10
    assert main(words) == 0
    assert "x: 2 to 10 requests, about" in capsys.readouterr().out
    assert len(judge.requests) == 10
    judge.server.shutdown()  # nothing is left to ask
    assert main(words) == 0
    assert "x: 0 requests, about 0 tokens read" in capsys.readouterr().out


def test_command(judge, tmp_path, capsys):
    truth = {"v1_0": {"imagename": "a", "question": "q", "answer": "z", "capability": ["ocr"]}}
    dump(tmp_path / "mm-vet.json", truth)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "z"}])
    judge.replies = ["1.0"]
    files = ["--answers", str(answers), "--data", str(tmp_path), "--out", str(tmp_path / "g.json")]
    words = ["eval", "judge", "mmvet", *files, "--judge-model", "gpt-x", "--endpoint", judge.url]
    assert main([*words, "--yes"]) == 0
    out = capsys.readouterr().out
    assert "1 to 5 requests, about" in out
    assert "took 0 tokens read and 0 written" in out
    assert main(shlex.split(out.partition("score it with: llava-jax ")[2])) == 0
    assert "100.00 <" in capsys.readouterr().out
    assert main(["eval", "judge", "pope", *words[3:]]) == 2
    assert "pope needs no judge" in capsys.readouterr().err
    with locked(tmp_path / ".g.json.lock"):
        assert main([*words, "--yes"]) == 2
    assert "another process asks the same questions now" in capsys.readouterr().err


def test_known_shapes_of_replies():
    for content, text in (
        (None, ""),
        ([{"type": "text", "text": "0."}, {"type": "text", "text": "5"}], "0.5"),
        ("<think>1.0 or 0.2?</think>\n0.5", "0.5"),
        ("so 0.1</think>0.5", "0.5"),
        ("<think>never en", ""),
        ({"x": 1}, ""),
    ):
        assert content_text(content) == text
    grades = {
        "0.5": 0.5,
        "1.0 |": 1.0,
        "The score is 0.5": 0.5,
        "**0.7**": 0.7,
        "Correctness: 1": 1.0,
        "between 0.2 and 0.4": None,
        "0.5/1": None,
        "1 out of 10": None,
        "1 out": None,  # three tokens
        "1 / 10": None,
        "1%": None,
        "The score is 1 percent": None,
        "0,5": None,
        "Score: -1": None,
        "0.5, since": 0.5,
        "I give 1.": 1.0,
        "5": None,
        "nan": None,
        "": None,
        "1e999": None,
    }
    assert {k: read_grade(k) for k in grades} == grades
    scores = {
        "8 9\nfine": [8, 9],
        "8, 9": [8, 9],
        "Assistant 1: 8/10 Assistant 2: 9.5/10\nfine": [8, 9.5],
        "8 9 10": None,
        "80 90": None,
        "8 1000": None,
        "inf 8": None,
        "nan nan": None,
        "-1 -1": None,
        "0 10": [0, 10],
        "80 90%": None,
        "": None,
        "1: 8": None,  # a label and one score
        "1) 8 2) 9": [8.0, 9.0],
        "Assistant 2: 9, Assistant 1: 8": None,
        "2: 9, 1: 8": None,
    }
    assert {k: read_scores(k) for k in scores} == scores


@pytest.mark.parametrize("scores", [[1, 1000], [-1, 5], [80.0, 90.0]])
def test_stored_reviews_are_from_0_to_10(tmp_path, scores):
    out = lines(tmp_path / "r.jsonl", [{"question_id": 1, "content": "x", "tuple": scores}])
    with pytest.raises(AnswerError, match="not from 0 to 10"):
        get_task("llava_wild").score(out, tmp_path)


def test_no_grade_at_all_is_no_result(tmp_path):
    dump(tmp_path / "mm-vet.json", {"v1_0": {"capability": ["ocr"]}})
    out = dump(tmp_path / "g.json", {"v1_0": {"model": ["j"], "content": [""], "score": [None]}})
    with pytest.raises(AnswerError, match="not one grade could be read"):
        get_task("mmvet").score(out, tmp_path)


def test_an_unread_grade_is_in_no_mean(tmp_path):
    dump(tmp_path / "mm-vet.json", {f"v1_{n}": {"capability": ["ocr"]} for n in range(3)})
    grade = {"model": ["j", "j"], "content": ["", ""]}
    rows = {"v1_0": [1.0, 0.5], "v1_1": [None, 1.0], "v1_2": [0.0, 0.0]}
    out = dump(tmp_path / "g.json", {k: {**grade, "score": v} for k, v in rows.items()})
    result = get_task("mmvet").score(out, tmp_path)
    assert result.totals["total"] == 37.5
    assert (result.totals["runs"], result.totals["unread_grades"]) == ([50.0, 25.0], 1)
    assert result.notes == ["no grade could be read for v1_1; no mean has them"]


def test_reasoning_judges(judge, tmp_path):
    tokens = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    heat = "Unsupported value: 'temperature' does not support 0.2. Only the default (1) is."
    judge.headers = {"content-type": "application/json"}
    judge.replies = [(400, json.dumps({"error": {"message": m}})) for m in (tokens, heat)] + ["7 8"]
    asked = endpoint(judge, tmp_path)
    assert asked.ask(**ASK).text == "7 8"
    last = judge.requests[-1]
    assert not {"max_tokens", "temperature"} & last.keys()
    assert last["max_completion_tokens"] > 1000
    judge.replies = ["6 6"]
    asked.ask(**ASK, again=1)
    assert len(judge.requests) == 4  # it has learnt


def test_requests_go_in_parallel(judge, tmp_path):
    judge.server.shutdown()
    judge.server.server_close()
    barrier = threading.Barrier(4, timeout=10)
    from http.server import ThreadingHTTPServer

    class Handler(judge.server.RequestHandlerClass):
        def do_POST(self):
            barrier.wait()  # nobody is answered before four have asked
            super().do_POST()

    judge.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{judge.server.server_port}/v1"
    threading.Thread(target=judge.server.serve_forever, args=(0.01,), daemon=True).start()
    requests = [({"question_id": i, "category": "conv"}, f"message {i}") for i in range(4)]
    out = tmp_path / "r.jsonl"
    judge_reviews(requests, out, endpoint(judge, tmp_path, retries=0), threads=4)
    assert [json.loads(x)["question_id"] for x in out.read_text().splitlines()] == [0, 1, 2, 3]


def test_three_reviews_of_each_answer(judge, tmp_path):
    lines(tmp_path / "questions.jsonl", [{"question_id": n, "image": "i"} for n in range(2)])
    requests = [({"question_id": i, "category": "conv"}, f"message {i}") for i in range(2)]
    judge.replies = ["10 5", "10 7", "10 6", "10 8", "10 7", "10 9"]
    out = tmp_path / "r.jsonl"
    judge_reviews(requests, out, endpoint(judge, tmp_path), runs=3, threads=1)
    result = get_task("llava_wild").score(out, tmp_path)
    assert result.totals["all"] == 70.0
    assert result.coverage.lines() == []
    assert (result.coverage.answered, result.coverage.expected) == (2, 2)
    assert result.notes == ["the mean over 3 reviews of each answer"]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rows[0] |= {"tuple": None}  # unread; and the third run stopped
    result = get_task("llava_wild").score(lines(out, rows[:5]), tmp_path)
    assert result.coverage.missing == []  # the other reviews of the first answer are in the mean
    assert "the mean over 4 reviews, not 3 of each answer" in result.notes


def test_an_unreachable_judge_fails_in_seconds(tmp_path):
    start = time.monotonic()
    with pytest.raises(JudgeError, match=r"127\.0\.0\.1:9/v1: .*refused"):
        Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "t").check()
    assert time.monotonic() - start < 5


def test_the_end_of_the_input_agrees_to_nothing(monkeypatch):
    def ends(prompt):
        raise EOFError

    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", ends)
    assert command._agreed() is False
