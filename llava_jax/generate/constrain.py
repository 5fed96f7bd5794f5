"""Answers that are JSON: of any form, or as a JSON schema says. llguidance says which tokens may come.

JSON is written as json.dumps writes it, on one line: where white space is free, a model that is not
sure of the next value can go on with it for ever.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from llava_jax.errors import ConfigError, PromptError
from llava_jax.text.tokenizer import NO_DUMMY_PREFIX, SPACE, Tokenizer, sentencepiece_model
from llava_jax.util import need

FORMATS = ("text", "json_object", "json_schema")
MOST_CHARACTERS = 2**17
"""Of a schema, as JSON."""
MOST_NESTED = 1000
"""Levels of a schema times its references: llguidance follows both on the stack, which ends a process
at about 3,700."""

_WRITTEN = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_UNKNOWN = re.compile(r"Unimplemented keys: (\[.*\])")


def schema_of(response_format: Any) -> Mapping[str, Any] | None:
    """The JSON schema that OpenAI's response_format asks for; None where any text will do.

    Raises ConfigError for what is not one of {"type": "text"}, {"type": "json_object"} and {"type":
    "json_schema", "json_schema": {"schema": {...}}}, or holds a schema that is too large.
    """
    if response_format is None:
        return None
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind not in FORMATS:
        fix = f"its type is one of {', '.join(FORMATS)}"
        raise ConfigError("response_format is not known", fix=fix)
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    inner = response_format.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, Mapping) else None
    if not isinstance(schema, Mapping):
        what = "response_format json_schema has no schema that is an object"
        raise ConfigError(what, fix='{"type": "json_schema", "json_schema": {"schema": {...}}}')
    _check_size(schema)
    return schema


def _check_size(schema: Mapping[str, Any]) -> None:
    try:
        size = len(json.dumps(schema))
    except (TypeError, ValueError, RecursionError):
        raise ConfigError("response_format: the schema cannot be written as JSON") from None
    depth, references = 0, set()
    level: list[Any] = [schema]
    while level:
        depth += 1
        inner: list[Any] = []
        for value in level:
            parts: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
            if isinstance(value, Mapping) and isinstance(to := value.get("$ref"), str):
                references.add(to)
            inner += [x for x in parts if isinstance(x, Mapping | list | tuple)]
        level = inner
    if size > MOST_CHARACTERS or depth * (1 + len(references)) > MOST_NESTED:
        what = f"response_format: the schema has {size:,} characters, {depth} levels and "
        what += f"{len(references):,} references, which is too much"
        fix = f"at most {MOST_CHARACTERS:,} characters, and {MOST_NESTED:,} for levels x references"
        raise ConfigError(what, fix=fix)
    _check_rules(schema)


def _check_rules(schema: Any) -> None:
    """What llguidance takes, but in another sense than today's JSON Schema (2020-12)."""
    if isinstance(schema, list | tuple):
        for part in schema:
            _check_rules(part)
    if not isinstance(schema, Mapping):
        return
    if isinstance(schema.get("items"), list | tuple):
        fix = "the first items of an array are prefixItems"
        raise ConfigError("response_format: items is a list in the JSON schema", fix=fix)
    for key, value in schema.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"response_format: {key} of the JSON schema is {value}, not a number")
    _check_bounds(schema)
    step = schema.get("multipleOf")
    if isinstance(step, float) and not step.is_integer():
        # Validators divide floats, and find that 1.4 is no multiple of 0.1.
        what = f"response_format: multipleOf {step} of the JSON schema is not supported"
        raise ConfigError(what, fix="use whole numbers")
    for key, value in schema.items():
        if key not in ("enum", "const", "default", "examples"):
            _check_rules(value)


def _check_bounds(schema: Mapping[str, Any]) -> None:
    """llguidance 1.9 lets `exclusiveMinimum: 1, maximum: 1.5` be 1, and -1 the other way round."""
    if schema.get("type") == "integer":
        return
    for sign, low, high in ((1, "Minimum", "maximum"), (-1, "Maximum", "minimum")):
        open_ = schema.get(f"exclusive{low}")
        ends = (schema.get(high), schema.get(f"exclusive{high.capitalize()}"))
        if not _is_number(open_) or open_ != int(open_) or sign * open_ < 0:
            continue
        if any(_is_number(end) and sign * end < sign * open_ + 1 for end in ends):
            what = f"response_format: exclusive{low} {open_} of the JSON schema is not supported"
            raise ConfigError(
                f"{what} where {high} is less than 1 from it", fix=f"use {low.lower()}"
            )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_format(response_format: Any) -> None:
    """Raises what `schema_of` does, and what `Grammars` would whatever the tokenizer: before a model is there."""
    schema = schema_of(response_format)
    if schema is None:
        return
    if problem := _library().LLMatcher.validate_grammar(_grammar(schema)[1]):
        raise ConfigError(f"response_format: {_in_words(problem)}")


def _library() -> Any:
    return need("llguidance", "for answers in JSON", "llava_jax[json]")


def _grammar(schema: Mapping[str, Any]) -> tuple[str, str]:
    """A schema as llguidance is to read it, and its grammar."""
    # Options that a schema brings must not win: "lenient" would pass over keywords.
    text = json.dumps({**schema, "x-guidance": _WRITTEN})
    try:
        return text, _library().LLMatcher.grammar_from_json_schema(text)
    except ValueError:
        raise ConfigError("response_format: the JSON schema cannot be read") from None


class Grammars:
    """Makes constraints over one tokenizer. vocab: tokens of the model, of which these may end an answer.

    Raises LlavaError where llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab: int, ends: Sequence[int]):
        self._library = _library()
        self._words = -(-vocab // 32)
        own = [id_ for id_ in ends if 0 <= id_ < len(tokenizer)]
        self._tokens = self._library.LLTokenizer(
            self._library.TokenizerWrapper(_Vocabulary(tokenizer)),
            eos_token=own,
            slices=self._library.LLTokenizer.json_slices(),
        )

    def constraint(self, schema: Mapping[str, Any]) -> JsonConstraint:
        """The tokens of one answer that follows a schema of `schema_of`.

        Raises ConfigError for a keyword that is not supported, by its name, and a schema that no
        answer, or none that can be found, follows.
        """
        text, alone = _grammar(schema)
        self._first(alone)
        # The first token of an answer may begin with a space, as that of an English word does.
        spaced = self._library.LLMatcher.grammar_from_lark(f'start: " "? json\njson: %json {text}')
        return JsonConstraint(self._first(spaced), self._words)

    def _first(self, grammar: str) -> Any:
        """A matcher at its beginning. Raises ConfigError unless something may come there."""
        limits = self._library.LLParserLimits(verbose_errors=False)
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise ConfigError(f"response_format: {_in_words(matcher.get_error())}")
        matcher.compute_bitmask()
        if matcher.is_error() or (matcher.is_stopped() and not matcher.is_accepting()):
            raise ConfigError("response_format: no answer was found that follows the JSON schema")
        return matcher


class JsonConstraint:
    """Which tokens may come next in one answer: a generate.job.Constraint."""

    def __init__(self, matcher: Any, words: int):
        self._matcher, self._words = matcher, words
        self._allowed = self._fill()

    def allowed(self) -> np.ndarray:
        """uint32[ceil(V / 32)]: a bit for each token that may come next."""
        return self._allowed

    def take(self, token: int) -> None:
        """The token that came. Raises PromptError where the schema is too much work from here on."""
        self._matcher.consume_token(token)
        self._allowed = self._fill()

    def _fill(self) -> np.ndarray:
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        stopped = self._matcher.is_stopped() and not self._matcher.is_accepting()
        if self._matcher.is_error() or stopped:
            raise PromptError(
                "response_format: the answer cannot go on as the JSON schema says",
                fix="use a simpler schema",
            )
        # The model may have rows without a token, and llguidance's last word may be none of its own.
        allowed, count = np.zeros(self._words, np.uint32), min(self._words, len(found))
        allowed[:count] = found[:count]
        return allowed


class _Vocabulary:
    """A Tokenizer as llguidance reads it: the bytes that each token adds to a text."""

    def __init__(self, tokenizer: Tokenizer):
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self._sp = sentencepiece_model(tokenizer.model + NO_DUMMY_PREFIX)
        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        self._bytes: dict[int, int] = {}
        for id_ in range(len(tokenizer)):
            byte = tokenizer.byte_value(id_)
            if byte is not None:
                self._bytes[byte] = id_
                self.tokens.append(bytes([byte]))
            elif tokenizer.is_word(id_):
                self.tokens.append(tokenizer.token_text(id_).replace(SPACE, " ").encode())
            else:
                self.special_token_ids.append(id_)
                self.tokens.append(f"<special {id_}>".encode())

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that goes on: with no space of the tokenizer's own in front."""
        ids = list(self._sp.encode(text))
        data = text.encode()
        if b"".join(self.tokens[id_] for id_ in ids) == data:
            return ids
        return [self._bytes[byte] for byte in data]  # its normaliser changes such a text


def _in_words(error: str) -> str:
    """An error of llguidance in one line."""
    if found := _UNKNOWN.search(error):
        names = ", ".join(json.loads(found[1]))
        return f"the JSON schema has what is not supported: {names}"
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    last = next((line for line in lines if line.startswith("error:")), lines[0] if lines else "")
    return f"the JSON schema cannot be used: {last.removeprefix('error:').strip()}"
