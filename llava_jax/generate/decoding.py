"""The host's side of answering a batch: rows, budgets, ends, and when the cache must grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from llava_jax.batch import collate, length_bucket, prompt_shape, room_bucket
from llava_jax.config import LlavaConfig
from llava_jax.errors import WeightError
from llava_jax.generate.sampling import Controls, Sampling
from llava_jax.llama import KVCache
from llava_jax.text.constants import IMAGE_TOKEN
from llava_jax.text.example import Example

if TYPE_CHECKING:
    from llava_jax.generate.engine import Generator

CHUNK = 32
"""Tokens a compiled decode call gives at most."""

_FIRST_ROOM = 128  # cache entries for new tokens at the start; doubled when they are used up

Stop = Callable[[int, list[int]], int | None]
"""(row, its ids so far) -> how many of them to keep if the row ends here, else None."""


class State(NamedTuple):
    """What lives on the device between calls. S is the length of the cache."""

    cache: KVCache
    key_positions: (
        jax.Array
    )  # int32[B, S], RoPE position of each cache entry, -1 where there is none
    positions: jax.Array  # int32[B], where `token` stands
    token: jax.Array  # int32[B], the last chosen token: not in the cache yet
    done: jax.Array  # bool[B]
    step: jax.Array  # int32[], tokens chosen so far
    slot: jax.Array  # int32[], the cache entry that takes the next key


class Chosen(NamedTuple):
    """Tokens of one call: n is 1 for a prefill, and `count` of the n are real for a decode."""

    tokens: jax.Array  # int32[B, n], -1 in rows that were done
    logprobs: jax.Array  # float32[B, n]
    logits: jax.Array | None  # float32[B, n, V] if asked for
    count: jax.Array  # int32[]


@dataclass(frozen=True, eq=False)
class Output:
    """One row's answer.

    ids: the new tokens, the end token included. finish_reason: "stop" (end token, or the caller's
    `stop`) or "length" (max_new_tokens, or the context is full). logprobs: of each id.
    logits: float32[len(ids), V], if asked for. prompt_positions: length of the prompt, images spliced.
    """

    ids: tuple[int, ...]
    finish_reason: str
    prompt_positions: int
    logprobs: tuple[float, ...]
    logits: np.ndarray | None = None


class Decoding:
    """A batch being answered: `ids` grow with every `advance`. Made by Generator.start.

    ids, logprobs: a list a row. done: bool[B]. All rows end by an end token, their budget or `end`.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Example],
        settings: Sequence[Sampling],
        keep_logits: bool,
        after: Decoding | None = None,
        reuse: tuple[int, int] | None = None,
    ):
        self.generator, self.prompts, self.keep_logits = generator, tuple(prompts), keep_logits
        config = generator.config
        self.lengths = [p.length(config.image_tokens) for p in prompts]
        limit = config.language.max_positions
        self.budgets = [min(s.max_new_tokens, limit - n) for s, n in zip(settings, self.lengths)]
        n = len(prompts)
        self.ids: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[float]] = [[] for _ in range(n)]
        self.logits: list[list[np.ndarray]] = [[] for _ in range(n)]
        self.done = np.zeros(n, bool)
        self._stopped = np.zeros(n, bool)  # ended by the caller
        self._settings = list(settings)
        self.state: State | None = None
        self.cached: list[int] = []  # of a single prompt: the ids whose keys the cache holds
        if after is None or reuse is None:
            self._read(prompts)
        else:
            self._read_rest(after, *reuse)

    @property
    def running(self) -> bool:
        """Whether some row is not done."""
        return not self.done.all()

    def _read(self, prompts: Sequence[Example]) -> None:
        g = self.generator
        rows = prompt_batch(prompts, g.config, g._rows)
        self._pad_controls(len(rows["tokens"]))
        self._base = rows["tokens"].shape[1]
        room = room_bucket(min(max(self.budgets), _FIRST_ROOM))
        with g._scope():
            self.state, chosen = g._prefill(
                g._leaves,
                g._put(rows),
                self._controls,
                capacity=self._base + room,
                keep_logits=self.keep_logits,
            )
        self._slot = self._base
        self._take(chosen, [p.ids.tolist() for p in prompts])

    def _read_rest(self, after: Decoding, shared: int, start: int) -> None:
        """Reads prompt.ids[shared:], whose first token stands at position `start`."""
        g, prompt = self.generator, self.prompts[0]
        seen = int((prompt.ids[:shared] == IMAGE_TOKEN).sum())
        rest = Example(prompt.ids[shared:], prompt.images[seen:])
        rows = prompt_batch([rest], g.config, g._rows)
        b, t = rows["tokens"].shape
        self._pad_controls(b)
        self.state, after.state = after.state, None
        self._slot = after._slot + t
        self._base = length_bucket(self._slot)
        room = room_bucket(min(max(self.budgets), _FIRST_ROOM))
        with g._scope():
            if self._base + room > self._capacity():
                self.state = g._grow(self.state, capacity=self._base + room)
            self.state, chosen = g._extend(
                g._leaves,
                g._put(rows),
                self._controls,
                self.state,
                g._put(np.full(b, start, np.int32)),
                keep_logits=self.keep_logits,
            )
        self._take(chosen, [prompt.ids.tolist()])

    def _pad_controls(self, rows: int) -> None:
        spare = rows - len(self.prompts)
        settings = self._settings + [Sampling(max_new_tokens=1)] * spare
        self._controls = self.generator._put(Controls.of(settings, self.budgets + [1] * spare))

    def _capacity(self) -> int:
        return 0 if self.state is None else self.state.key_positions.shape[1]

    def advance(self, most: int = CHUNK) -> list[list[int]]:
        """Up to `most` (and CHUNK) further tokens a row; returns the new ids of each row."""
        if not self.running:
            return [[] for _ in self.prompts]
        g = self.generator
        left = max(b - len(i) for b, i, d in zip(self.budgets, self.ids, self.done) if not d)
        count = max(1, min(most, CHUNK, left))
        stopped = np.ones(len(self._controls.budget), bool)
        stopped[: len(self.prompts)] = self._stopped
        with g._scope():
            if self._slot + count > self._capacity():
                room = room_bucket(self._slot + count - self._base)
                self.state = g._grow(self.state, capacity=self._base + room)
            self.state, chosen = g._decode(
                g._leaves,
                self.state,
                self._controls,
                g._put(stopped),
                np.int32(count),
                keep_logits=self.keep_logits,
            )
        before = [len(ids) for ids in self.ids]
        self._take(chosen, None)
        return [ids[n:] for ids, n in zip(self.ids, before)]

    def _take(self, chosen: Chosen, prompt_ids: list[list[int]] | None) -> None:
        """Adds the tokens of one call to the rows.

        Raises WeightError where the model gave no finite logits: argmax would take the first token
        of the vocabulary, which shows nothing, until the budget is spent.
        """
        tokens, logprobs = np.asarray(chosen.tokens), np.asarray(chosen.logprobs)
        logits = None if chosen.logits is None else np.asarray(chosen.logits)
        count = int(chosen.count)
        if len(self.prompts) == 1:
            last = self.ids[0][-1:]
            self.cached += prompt_ids[0] if prompt_ids else last + tokens[0, : count - 1].tolist()
        if prompt_ids is None:
            self._slot += count
        for row in np.flatnonzero(~self.done):
            new = tokens[row, :count]
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

    def apply(self, stop: Stop | None) -> None:
        """Asks `stop` about every running row, and about those that the last call ended."""
        if stop is None:
            return
        for row in range(len(self.prompts)):
            keep = None if self._stopped[row] else stop(row, self.ids[row])
            if keep is not None:
                self.end(row, keep)

    def end(self, row: int, keep: int | None = None) -> None:
        """Ends a row, with its first `keep` ids if given. The other rows go on as before."""
        self._stopped[row] = self.done[row] = True
        if keep is not None:
            for kept in (self.ids, self.logprobs, self.logits):
                del kept[row][keep:]

    def outputs(self) -> list[Output]:
        """The rows as they stand."""
        return [self._output(row) for row in range(len(self.prompts))]

    def _output(self, row: int) -> Output:
        ids = self.ids[row]
        stop = self._stopped[row] or (ids and ids[-1] in self.generator.eos_ids)
        logits = np.stack(self.logits[row]) if self.keep_logits and ids else None
        return Output(
            tuple(ids),
            "stop" if stop else "length",
            self.lengths[row],
            tuple(self.logprobs[row]),
            logits,
        )


def prompt_batch(
    prompts: Sequence[Example], config: LlavaConfig, multiple: int
) -> dict[str, np.ndarray]:
    """What the compiled functions read of a batch of prompts, one per row."""
    batch = collate([[p] for p in prompts], prompt_shape(prompts, config, multiple), config)
    return {name: batch[name] for name in ("tokens", "slots", "segments", "images")}


def reusable(after: Decoding, prompt: Example, config: LlavaConfig) -> tuple[int, int] | None:
    """(ids of `prompt` that the cache holds, the position behind them), or None if not worth it."""
    images = iter(range(len(prompt.images)))
    shared = start = 0
    # The last id is always read: its logits give the first token.
    for old, new in zip(after.cached, prompt.ids[:-1].tolist()):
        if old != new:
            break
        if new == IMAGE_TOKEN:
            i = next(images)
            if not np.array_equal(after.prompts[0].images[i], prompt.images[i]):
                break
        shared += 1
        start += config.image_tokens if new == IMAGE_TOKEN else 1
    length = prompt.length(config.image_tokens)
    rest = length - start
    used = after._slot + length_bucket(rest)
    # Entries of dropped tokens stay in the cache: read anew before they are half of it.
    if start < rest or used > 2 * length_bucket(length):
        return None
    return shared, start
