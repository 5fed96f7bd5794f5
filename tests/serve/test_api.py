"""What the routes answer, asked by the real client: text, pictures, streams, and every option."""

import json
import threading

import pytest

import llava_jax
from llava_jax.serve.replies import Form, token_text
from tests.serve.conftest import KEY, NAME, noise, picture, said, shown

RED = [shown(picture("red")), said("What color is the circle?")]
SAMPLED = {"temperature": 2.5, "seed": 7, "max_tokens": 12, "logit_bias": {"2": -100}}


def joined(stream) -> tuple[str, list]:
    pieces = list(stream)
    return "".join(p.choices[0].delta.content or "" for p in pieces if p.choices), pieces


def bits(reply) -> list:
    return [(c.message.content, c.finish_reason, c.logprobs.content) for c in reply.choices]


def test_answers_as_the_python_api_does(server):
    reply = server.chat(RED, logprobs=True)
    want = server.worker.model.pixels(picture("red"))
    model = llava_jax.load("tiny")
    own = model.generate("What color is the circle?", want, max_new_tokens=8)
    assert own.text
    assert reply.choices[0].message.content == own.text
    assert reply.choices[0].finish_reason == own.finish_reason
    assert reply.usage.prompt_tokens == own.prompt_tokens
    assert reply.usage.completion_tokens == len(own.ids)
    logprobs = [entry.logprob for entry in reply.choices[0].logprobs.content]
    assert logprobs == pytest.approx(own.logprobs, abs=1e-5)
    assert reply.model == NAME


def test_a_stream_joins_to_the_whole_answer(server):
    whole = server.chat(RED, logprobs=True, **SAMPLED)
    stream = server.chat(
        RED, logprobs=True, stream=True, stream_options={"include_usage": True}, **SAMPLED
    )
    text, pieces = joined(stream)
    assert text == whole.choices[0].message.content
    assert pieces[0].choices[0].delta.role == "assistant"
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert pieces[-1].choices == []
    # What was read for the first is not read again.
    assert pieces[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert pieces[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    streamed = [
        e
        for p in pieces
        if p.choices and p.choices[0].logprobs
        for e in p.choices[0].logprobs.content
    ]
    assert streamed == whole.choices[0].logprobs.content


def test_pictures_are_seen_where_they_stand(server):
    two = [
        said("first"),
        shown(picture("red")),
        shown(picture("blue", 96, "JPEG"), "jpeg"),
        said("and?"),
    ]
    swapped = [two[0], two[2], two[1], two[3]]
    first, second = (server.chat(c, logprobs=True) for c in (two, swapped))
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    per = server.worker.model.config.image_tokens
    assert first.usage.prompt_tokens > 2 * per
    assert bits(first) != bits(second)


def test_a_second_turn_with_a_new_picture(server):
    first = server.chat(RED)
    answer = first.choices[0].message.model_dump()
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": RED},
        answer,
        {"role": "user", "content": [shown(picture("blue")), said("And now?")]},
    ]
    second = server.chat(turns)
    assert second.usage.prompt_tokens > 2 * server.worker.model.config.image_tokens
    assert second.choices[0].message.role == "assistant"


def test_logprobs(server):
    (choice,) = server.chat(RED, logprobs=True, top_logprobs=3).choices
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob  # greedy
        assert bytes(entry.bytes).decode() == entry.token
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[2].logprob


def test_a_row_that_the_tokenizer_does_not_name_has_no_text(server):
    tokenizer = server.worker.model.tokenizer
    assert token_text(tokenizer, len(tokenizer) + 5) == ""
    assert token_text(tokenizer, 300)


def test_where_a_token_begins_in_the_text_of_a_completion(server):
    tokenizer, text = server.worker.model.tokenizer, "A red 日 circle"
    ids = [*tokenizer.encode(text, add_bos=False), tokenizer.eos_id]
    assert any(tokenizer.byte_value(id_) for id_ in ids)

    def offsets(*parts: list[int]) -> list[int]:
        form = Form(NAME, tokenizer, chat=False, stream=False, tops=0)
        told = [form.logprobs(0, part, [0.0] * len(part), ()) for part in parts]
        return [at for part in told for at in part["text_offset"]]

    found = offsets(ids)
    assert offsets(ids[:1], ids[1:4], ids[4:]) == found  # as in a stream
    for id_, at in zip(ids, found):
        token = token_text(tokenizer, id_) if tokenizer.is_word(id_) else ""
        assert text.startswith(token if at else token.lstrip(), at)
    assert found[-1] == len(text)


def test_n_answers_of_which_the_first_is_the_one_of_n_1(server):
    three = server.chat("hello", n=3, logprobs=True, **SAMPLED)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert len({c.message.content for c in three.choices}) > 1
    one = server.chat("hello", logprobs=True, **SAMPLED)
    assert bits(one)[0] == bits(three)[0]
    stream = server.chat("hello", n=3, stream=True, **SAMPLED)
    told = {0: "", 1: "", 2: ""}
    for piece in stream:
        told[piece.choices[0].index] += piece.choices[0].delta.content or ""
    assert list(told.values()) == [c.message.content for c in three.choices]


def test_stop_length_seed_and_bias(server):
    free = server.chat("hello", **SAMPLED).choices[0].message.content
    assert server.chat("hello", **SAMPLED).choices[0].message.content == free
    middle = free[len(free) // 2 : len(free) // 2 + 2]
    cut = server.chat("hello", stop=[middle], **SAMPLED).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.message.content == free[: free.index(middle)].strip()
    short = server.chat("hello", max_tokens=None, max_completion_tokens=2, logit_bias={"300": 100})
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 2
    token = server.worker.model.tokenizer.token_text(300)
    forced = server.chat("hello", max_tokens=2, logit_bias={"300": 100}, logprobs=True)
    assert forced.choices[0].logprobs.content[0].token == token.replace("▁", " ")


def test_words_never_become_special_tokens(server):
    tokenizer = server.worker.model.tokenizer
    for text in ("<image>", "</s>", "<s>[INST]", "USER: x ASSISTANT:"):
        reply = server.chat(f"say {text}", max_tokens=1)
        assert reply.usage.prompt_tokens < server.worker.model.config.image_tokens + 120
        ids = server.worker.model.example(llava_jax.model.Request(f"say {text}")).ids.tolist()
        assert ids.count(tokenizer.bos_id) == 1
        assert reply.usage.prompt_tokens == len(ids)


def test_completions(server):
    made = server.client.completions.create(
        model=NAME,
        prompt=["The circle", "A red"],
        max_tokens=4,
        logprobs=2,
        n=2,
        temperature=1,
        seed=1,
    )
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert all(len(c.logprobs.tokens) <= 4 for c in made.choices)
    assert all(len(row) <= 2 for row in made.choices[0].logprobs.top_logprobs)
    asked = sum(len(server.worker.model.tokenizer.encode(t)) for t in ("The circle", "A red"))
    assert made.usage.prompt_tokens == asked
    stream = server.client.completions.create(
        model=NAME, prompt="The circle", max_tokens=4, temperature=1, seed=1, stream=True
    )
    assert "".join(p.choices[0].text for p in stream) == made.choices[0].text


def test_models_health_metrics_and_document(server):
    models = [(m.id, m.parent) for m in server.client.models.list()]
    assert models == [(NAME, None), ("cats", NAME)]
    assert server.client.models.retrieve("cats").id == "cats"
    spans = {m["image_span"] for m in server.http.get("/v1/models").json()["data"]}
    assert spans == {server.worker.model.config.image_span}
    assert server.http.get("/health", headers={"Authorization": ""}).json() == {"status": "ready"}
    page = server.http.get("/metrics").text
    for name in ("queue_length", "slots_busy", "compiles_total", "tokens_total", "requests_total"):
        assert f"llava_{name}" in page
    assert "llava_time_to_first_token_seconds_count" in page
    document = server.http.get("/openapi.json").json()
    assert {"/v1/models", "/v1/completions", "/v1/chat/completions"} <= set(document["paths"])


def test_an_adapter_is_chosen_by_the_name_of_the_model(server):
    first, *again = [server.chat(RED, model=name, logprobs=True) for name in ("cats", NAME) * 2]
    assert [reply.model for reply in again] == [NAME, "cats", NAME]
    assert bits(again[1]) == bits(first)
    assert bits(again[2]) == bits(again[0])
    assert bits(first) != bits(again[0])
    ask = server.client.completions.create
    one, other = (ask(model=m, prompt="a", max_tokens=2, logprobs=0) for m in ("cats", NAME))
    assert one.choices[0].logprobs.token_logprobs != other.choices[0].logprobs.token_logprobs


def test_leaving_ends_the_answer(server):
    before = server.worker.engine.counts["ended_cancelled"]
    long = {"max_tokens": 700, "logit_bias": {"2": -100}}
    stream = server.chat("hello", stream=True, **long)
    next(iter(stream))
    stream.close()
    with pytest.raises(Exception, match="timed out|Timeout"):
        server.client.with_options(timeout=0.05).chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "hello"}], n=4, **long
        )
    server.chat("hello", max_tokens=1)
    waiting = threading.Event()
    while server.worker.engine.busy:
        waiting.wait(0.02)
    assert server.worker.engine.counts["ended_cancelled"] >= before + 2


def mixed(i: int) -> tuple[list, dict]:
    """A request unlike the others."""
    content = [said(f"Number {i}: what is here? " + "word " * (9 * i))]
    content = [shown(noise(i, 40 + i)) for _ in range(i % 3)] + content
    how = {"temperature": (0, 1.1)[i % 2], "seed": i, "max_tokens": 5 + i, "logprobs": True}
    return content, how | ({"presence_penalty": 0.7} if i % 4 == 3 else {})


def test_among_neighbours_an_answer_is_to_the_bit_the_one_alone(server):
    alone = [bits(server.chat(content, **how)) for content, how in map(mixed, range(8))]
    together: list = [None] * 8

    def ask(i: int) -> None:
        content, how = mixed(i)
        together[i] = bits(server.chat(content, **how))

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_key_is_not_in_any_reply(server):
    for path in ("/health", "/metrics", "/openapi.json", "/v1/models"):
        assert KEY not in server.http.get(path).text


def test_json_as_a_schema_says(server):
    schema = {
        "type": "object",
        "properties": {
            "color": {"enum": ["red", "blue"]},
            "count": {"type": "integer", "maximum": 9},
        },
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "seen", "schema": schema}}
    compiles = dict(server.worker.engine.generator.compiled)
    whole = server.chat(RED, response_format=asked, max_tokens=60, n=2, temperature=1.5, seed=3)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        assert json.loads(choice.message.content).keys() == {"color", "count"}
    text, _ = joined(
        server.chat(RED, response_format=asked, max_tokens=60, stream=True, temperature=1.5, seed=3)
    )
    assert text == whole.choices[0].message.content
    assert server.worker.engine.generator.compiled == compiles
    cut = server.chat(RED, response_format={"type": "json_object"}, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
