"""The host's side of answering a batch: rows, budgets, ends, and when the cache must grow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from llava_jax.batch import collate, length_bucket, prompt_shape, room_bucket
from llava_jax.errors import WeightError
from llava_jax.generate.sampling import Controls
from llava_jax.llama import KVCache
from llava_jax.settings import SamplingSettings
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.example import Example

if TYPE_CHECKING:
    from llava_jax.generate.engine import Generator

CHUNK = 32
"""Tokens that a compiled decode call gives at most."""

_FIRST_ENTRIES = 128  # cache entries for new tokens at the start; doubled when they are used up


class State(NamedTuple):
    """What stays on the device between calls. S is the length of the cache."""

    cache: KVCache
    key_positions: jax.Array  # int32[B, S], RoPE position of each cache entry; -1 where it is empty
    positions: jax.Array  # int32[B], where `token` stands
    token: jax.Array  # int32[B], the last chosen token: not in the cache yet
    done: jax.Array  # bool[B]
    step: jax.Array  # int32[], tokens chosen so far
    write_at: jax.Array  # int32[], the cache entry that takes the next key

    @property
    def capacity(self) -> int:
        """S"""
        return self.key_positions.shape[1]


class StepOutput(NamedTuple):
    """Tokens of one call: n is 1 after reading, CHUNK after decoding, of which `count` are real."""

    tokens: jax.Array  # int32[B, n], -1 in rows that were done
    logprobs: jax.Array  # float32[B, n]
    logits: jax.Array | None  # float32[B, n, V] if asked for
    count: jax.Array  # int32[]


@dataclass(frozen=True, eq=False)
class Output:
    """One row's answer.

    ids: the new tokens, the end token included. finish_reason: "stop" (end token, or `Decoding.end`)
    or "length" (max_new_tokens, or the context is full). logprobs: of each id.
    logits: float32[len(ids), V], if asked for. prompt_positions: length of the prompt, images spliced.
    """

    ids: tuple[int, ...]
    finish_reason: str
    prompt_positions: int
    logprobs: tuple[float, ...]
    logits: np.ndarray | None = None


class Decoding:
    """A batch being answered: `ids` grow with every `advance`. Made by Generator.start.

    ids, logprobs: one list per row. done: bool[B]. A row ends by an end token, its budget or `end`.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Example],
        settings: Sequence[SamplingSettings],
        keep_logits: bool,
        after: Decoding | None = None,
    ):
        self.generator, self.prompts, self.keep_logits = generator, tuple(prompts), keep_logits
        config = generator.config
        self.lengths = [p.length(config.image_tokens) for p in prompts]
        limit = config.language.max_positions
        self.budgets = [
            min(int(s.max_new_tokens), limit - n) for s, n in zip(settings, self.lengths)
        ]
        n = len(prompts)
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[float]] = [[] for _ in range(n)]
        self.logits: list[list[np.ndarray]] = [[] for _ in range(n)]
        self.done = np.zeros(n, bool)
        self._stopped = np.zeros(n, bool)  # ended by the caller
        self.state: Any = None  # a State; None while a call has it, or once it is given away
        self.cached: list[int] = []  # of a single prompt: the ids whose keys the cache holds
        self._read(settings, after)

    @property
    def running(self) -> bool:
        """Whether some row is not done."""
        return not self.done.all()

    def advance(self, most: int = CHUNK) -> None:
        """Up to `most` (and CHUNK) further tokens for each row that is not done."""
        if not self.running:
            return
        left = max(b - len(i) for b, i, d in zip(self.budgets, self.ids, self.done) if not d)
        count = max(1, min(most, CHUNK, left))
        stopped = np.ones(len(self._controls.budget), bool)  # padded rows stay so
        stopped[: len(self.prompts)] = self._stopped
        g = self.generator
        # Its buffers are donated: where Ctrl-C cuts this call off, no other may go on from it.
        state, self.state = self.state, None
        with g.scope():
            if self._write_at + count > state.capacity:
                room = room_bucket(self._write_at + count - self._base)
                state = g.grow(state, capacity=self._base + room)
            limit = np.int32(count)
            keep = self.keep_logits
            state, out = g.decode(
                g.leaves, state, self._controls, g.put(stopped), limit, keep_logits=keep
            )
        taken = int(out.count)
        if len(self.prompts) == 1:  # the last token of the call is not read yet
            self.cached += [self.ids[0][-1], *np.asarray(out.tokens)[0, : taken - 1].tolist()]
        self._write_at += taken
        self._take(out)
        self.state = state

    def end(self, row: int, keep: int | None = None) -> None:
        """Ends a row, with its first `keep` ids if given. The other rows go on as before."""
        self._stopped[row] = self.done[row] = True
        if keep is not None:
            for values in (self.ids, self.logprobs, self.logits):
                del values[row][keep:]

    def outputs(self) -> list[Output]:
        """The rows as they stand."""
        found = []
        for row, (ids, length) in enumerate(zip(self.ids, self.lengths)):
            stop = self._stopped[row] or (ids and ids[-1] in self.generator.eos_ids)
            reason = "stop" if stop else "length"
            logits = np.stack(self.logits[row]) if self.keep_logits and ids else None
            found.append(Output(tuple(ids), reason, length, tuple(self.logprobs[row]), logits))
        return found

    def _read(self, settings: Sequence[SamplingSettings], after: Decoding | None) -> None:
        """Reads the prompts, as far as the cache of `after` lacks them; chooses the first tokens."""
        g, unread = self.generator, self.prompts
        known, start, state, write_at = 0, 0, None, 0
        if after is not None and (found := after.known_part(self.prompts)):
            known, start = found
            state, after.state, write_at = after.state, None, after._write_at
            seen = int((self.prompts[0].ids[:known] == IMAGE_TOKEN).sum())
            (prompt,) = self.prompts
            unread = (replace(prompt, ids=prompt.ids[known:], images=prompt.images[seen:]),)
        shape = prompt_shape(unread, g.config, g.row_multiple)
        batch = collate([[p] for p in unread], shape, g.config)
        batch = {name: batch[name] for name in ("tokens", "slots", "segments", "images")}
        spare = shape.rows - len(unread)
        settings = [*settings, *[SamplingSettings()] * spare]
        self._controls = g.put(Controls.of(settings, self.budgets + [1] * spare))
        self._write_at = write_at + shape.length
        self._base = length_bucket(self._write_at)  # entries before those of new tokens
        capacity = self._base + room_bucket(min(max(self.budgets), _FIRST_ENTRIES))
        with g.scope():
            if state is not None and capacity > state.capacity:
                state = g.grow(state, capacity=capacity)
            self.state, out = g.read(
                g.leaves,
                g.put(batch),
                self._controls,
                state,
                None if state is None else g.put(np.full(shape.rows, start, np.int32)),
                capacity=capacity if state is None else None,
                keep_logits=self.keep_logits,
            )
        self.cached = self.prompts[0].ids.tolist()
        self._take(out)

    def known_part(self, prompts: Sequence[Example]) -> tuple[int, int] | None:
        """(ids of the one prompt that this cache holds, their positions); None if not worth it."""
        if self.state is None or len(prompts) != 1 or len(self.prompts) != 1:
            return None
        (prompt,), config = prompts, self.generator.config
        images = iter(zip(self.prompts[0].images, prompt.images))
        known = start = 0
        # The last id is always read: its logits give the first token.
        for old, new in zip(self.cached, prompt.ids[:-1].tolist()):
            if old != new or (new == IMAGE_TOKEN and not np.array_equal(*next(images))):
                break
            known += 1
            start += config.image_tokens if new == IMAGE_TOKEN else 1
        length = prompt.length(config.image_tokens)
        used = self._write_at + length_bucket(length - start)
        # Entries of dropped tokens stay in the cache: read again before they are half of it.
        if start < length - start or used > 2 * length_bucket(length):
            return None
        return known, start

    def _take(self, out: StepOutput) -> None:
        """Adds the tokens of one call to the rows.

        Raises WeightError where the model gave no finite logits: argmax would take the first token
        of the vocabulary, which shows nothing, until the budget is spent.
        """
        tokens, logprobs = np.asarray(out.tokens), np.asarray(out.logprobs)  # [B, n]
        logits = None if out.logits is None else np.asarray(out.logits)  # [B, n, V]
        for row in np.flatnonzero(~self.done):
            new = tokens[row, : int(out.count)]
            new = new[new >= 0]
            if not np.isfinite(logprobs[row, : len(new)]).all():
                raise WeightError(
                    "the model's logits are not finite (NaN or infinity)",
                    fix="llava-jax inspect MODEL --values names the weights that are not",
                )
            self.ids[row] += new.tolist()
            self.logprobs[row] += logprobs[row, : len(new)].tolist()
            if logits is not None:
                self.logits[row] += list(logits[row, : len(new)])
            ended = self.ids[row][-1:] and self.ids[row][-1] in self.generator.eos_ids
            self.done[row] = ended or len(self.ids[row]) >= self.budgets[row]
