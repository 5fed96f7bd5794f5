"""The engine's thread: no compile after it is ready, and what a failing step leaves behind."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from bench.serving import CHAT, HEADERS, ask, running
from llava_jax.generate.request import Request
from llava_jax.images import resample
from llava_jax.serve import worker as serving
from llava_jax.serve.warm import warm_up
from llava_jax.settings import ServeSettings
from tests.serve.conftest import openai, picture, said, shown


def test_a_failing_step_ends_its_answers_and_no_others(server, monkeypatch):
    engine = server.worker.engine
    good = [shown(picture("green")), said("Which shape?")]
    before = server.chat(good, logprobs=True).choices
    real, left = engine.generator.read, [1]

    def broken(*args, **how):
        if left:
            left.pop()
            raise ValueError("the device broke at 0x7f00")
        return real(*args, **how)

    monkeypatch.setattr(engine.generator, "read", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        server.chat(good)
    assert "0x7f00" not in str(caught.value)
    assert server.chat(good, logprobs=True).choices == before
    assert server.worker.state == "ready"
    assert engine.busy == engine.queued == 0


def test_no_prompt_of_any_length_meets_a_compile(server):
    compiled = dict(server.worker.engine.generator.compiled)
    model, tried = server.worker.model, set()
    for words in range(1, 230, 6):
        text = "a " * words
        tried.add(
            len(model.example(Request(text)).ids) % server.worker.engine.generator.chunk // 16
        )
        server.chat(text, max_tokens=2, logit_bias={"5": 1} if words % 2 else {})
    assert len(tried) == 8
    server.chat([shown(picture())] * 5 + [said("how many?")], n=3, temperature=1)
    assert dict(server.worker.engine.generator.compiled) == compiled


def test_what_is_read_to_warm_up_is_read_whole(server):
    """Also where a prompt takes over what another has read: no two begin alike."""
    jobs, g = [], server.worker.engine.generator
    engine = SimpleNamespace(generator=g, context=g.chunk, slots=1, counts=Counter())
    engine.submit, engine.run = jobs.append, len
    assert warm_up(engine, lambda: False)
    words = [job.prompt.ids for job in jobs if not job.prompt.images]
    assert [len(ids) for ids in words] == [g.step, 2 * g.step, 3 * g.step, g.chunk - 1]
    assert len({ids[0] for ids in words}) == 4


def test_what_resizes_photographs_is_compiled_before_the_server_is_ready(server, monkeypatch):
    """numba compiles for seconds, which the first client with a photograph would wait for."""
    seen = []
    monkeypatch.setattr(resample, "is_fast", lambda: seen.append("photograph") or False)
    monkeypatch.setattr(serving, "warm_up", lambda *_: bool(seen.append("programs")))
    other = serving.Worker(server.worker.model, ServeSettings(slots=1))
    other.start()
    other.stop()
    assert seen == ["photograph", "programs"]


def test_what_outlives_the_grace_of_a_stop_is_refused_in_words(monkeypatch):
    body = ask("hi", max_tokens=400, logit_bias={"2": -100})
    with ThreadPoolExecutor() as pool:
        with running(slots=2, grace_seconds=1) as other:
            engine, step = other.worker.engine, other.worker.engine.step
            monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.1), step())[1])
            how = {"headers": HEADERS, "timeout": 60}
            asked = [
                pool.submit(httpx.post, other.url + CHAT, json=body | {"stream": stream}, **how)
                for stream in (False, True)
            ]
            while engine.busy < 2:
                time.sleep(0.01)
        plain, stream = (one.result() for one in asked)
    assert (plain.status_code, plain.headers["retry-after"]) == (503, "5")
    assert "the server ended this answer" in plain.json()["error"]["message"]
    assert stream.text.rstrip().splitlines()[-1].startswith('data: {"error": ')
