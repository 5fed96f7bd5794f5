"""Answers in JSON: always what the schema says, the same among neighbours, refused by name."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import llava_jax
from bench.schemas import schema
from llava_jax.errors import ConfigError, PromptError
from llava_jax.generate import Engine, Job
from llava_jax.generate.constrain import Grammars, schema_of
from llava_jax.generate.request import Request
from llava_jax.text.tokenizer import Tokenizer
from tests.generate.tiny import model, prompt

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
ANY = {"type": "json_object"}
LLAMA = "model/fullvocab/llava"


def asking(one) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": one}}


def check(one, text: str) -> None:
    kind = jsonschema.Draft202012Validator
    kind.check_schema(one)
    kind(one, format_checker=kind.FORMAT_CHECKER).validate(json.loads(text))


def requests(seeds) -> list[Request]:
    return [
        Request(
            "what is this?",
            response_format=asking(schema(seed)),
            temperature=(1.0, 3.0)[seed % 2],
            seed=seed,
            max_new_tokens=400,
        )
        for seed in seeds
    ]


@cache
def engine() -> Engine:
    return Engine(model().generator, 4)


def run(asked) -> list:
    """The jobs of some requests, answered together."""
    own = model()
    jobs = [own.job(r, own.with_pixels(own.example(r))) for r in asked]
    engine().run([engine().submit(job) for job in jobs])
    return jobs


def check_random(seeds) -> None:
    for seed, job in zip(seeds, run(requests(seeds))):
        assert job.reason == "stop"
        check(schema(seed), job.text.text)


def test_five_random_schemas():
    check_random(range(5))


@pytest.mark.slow
def test_fifty_random_schemas():
    check_random(range(5, 55))


def test_any_json_and_one_that_is_cut():
    asked = [
        Request("what?", response_format=ANY, temperature=1, seed=i, max_new_tokens=most)
        for i, most in enumerate((100, 100, 2))
    ]
    jobs = run(asked)
    assert jobs[2].reason == "length"
    for job in jobs:
        if job.reason == "stop":
            assert isinstance(json.loads(job.text.text), dict)


def test_the_same_among_neighbours():
    free = Request("a red disc", temperature=1, seed=5, max_new_tokens=30)
    asked = [*requests([3]), free, *requests([4, 1])]
    alone = [run([one])[0] for one in asked[:2]]
    before = dict(model().generator.compiled)
    together = run(asked)
    assert model().generator.compiled == before
    for one, other in zip(alone, together):
        assert (one.ids, one.logprobs, one.reason) == (other.ids, other.logprobs, other.reason)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"if": {}, "then": {}}, "not supported: if, then"),
        ({"type": "array", "contains": {}, "x-guidance": {"lenient": True}}, "contains"),
        ({"type": "string", "format": "color"}, "format: color"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "number", "multipleOf": 0.1}, "multipleOf 0.1"),
        ({"type": "number", "exclusiveMinimum": 1, "maximum": 1.5}, "exclusiveMinimum 1"),
        ({"exclusiveMaximum": -1, "exclusiveMinimum": -1.5}, "exclusiveMaximum -1"),
        (
            {"type": "number", "exclusiveMinimum": 1e999},
            "exclusiveMinimum of the JSON schema is inf",
        ),
        ({"properties": {"a": {"maximum": float("nan")}}}, "maximum of the JSON schema is nan"),
        ({"type": "array", "items": [{}]}, "prefixItems"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum"),
        ({"$ref": "https://example.com/a.json"}, "example.com"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "no answer was found"),
        ({"allOf": [{"$ref": "#"}]}, "no answer was found"),
    ],
)
def test_what_cannot_be_held_is_named(one, words):
    with pytest.raises(ConfigError, match="response_format") as caught:
        model().generate("what?", response_format=asking(one))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "form", ["json", {"type": "xml"}, {"type": "json_schema"}, asking([1]), asking({"a": {1, 2}})]
)
def test_other_forms_are_refused(form):
    with pytest.raises(ConfigError, match="response_format"):
        Request("what?", response_format=form)


def test_a_schema_that_would_end_the_process_is_refused():
    chain = {f"{i}": {"$ref": f"#/$defs/{i + 1}"} for i in range(3000)}
    for one in (
        {"$defs": {**chain, "3000": {}}, "$ref": "#/$defs/0"},
        {"enum": ["x" * 200_000]},
        json.loads('{"items":' * 500 + "{}" + "}" * 500),
    ):
        with pytest.raises(ConfigError, match="too much|written|recursion limit"):
            model().grammars.constraint(schema_of(asking(one)) or {})


def test_stop_strings_and_json_exclude_each_other():
    with pytest.raises(ConfigError, match="stop"):
        Request("what?", response_format=ANY, stop="a")


def test_an_answer_that_cannot_go_on_is_an_error_of_its_own():
    class Stuck:
        def allowed(self):
            return np.full(10, 2**32 - 1, np.uint32)

        def take(self, token):
            raise PromptError("stuck")

    bad, good = (engine().submit(Job(prompt(5), constraint=c)) for c in (Stuck(), None))
    while not good.done:
        engine().step()
    assert bad.reason == "error"
    assert isinstance(bad.error, PromptError)
    assert engine().busy == 0
    bad, late = (engine().submit(Job(prompt(5), constraint=c)) for c in (Stuck(), None))
    with pytest.raises(PromptError, match="stuck"):
        engine().run([bad, late])
    assert (late.reason, engine().busy) == ("cancelled", 0)


@cache
def llama(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def walk(grammars: Grammars, tokenizer: Tokenizer, one, seed: int, end: int) -> str | None:
    """Text of random allowed tokens; None where it does not end in time."""
    rng = np.random.default_rng(seed)
    constraint, ids = grammars.constraint(one), []
    for _ in range(500):
        bits = np.unpackbits(constraint.allowed().view(np.uint8), bitorder="little")
        token = int(rng.choice(np.flatnonzero(bits)))
        if token == end:
            return tokenizer.decode(ids, skip_special=True)
        constraint.take(token)
        ids.append(token)
    return None


def test_with_the_tokenizers_people_have(golden):
    for tokenizer in (llama(golden / LLAMA), llava_jax.load("tiny").tokenizer):
        exact, more = (
            Grammars(tokenizer, len(tokenizer) + n, (tokenizer.eos_id, -1)) for n in (0, 64)
        )
        for seed in range(6):
            grammars = exact if seed % 2 else more
            text = walk(grammars, tokenizer, schema(seed), seed, tokenizer.eos_id)
            assert text is not None
            check(schema(seed), text.strip())
