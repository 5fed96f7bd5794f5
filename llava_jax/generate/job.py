"""One request inside the engine: what is asked, how far it is, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from llava_jax.batch import expand
from llava_jax.generate.request import Reply
from llava_jax.settings import SamplingSettings
from llava_jax.text.example import Example

if TYPE_CHECKING:
    from llava_jax.config import LlavaConfig
    from llava_jax.generate.detokenize import Detokenizer


class Constraint(Protocol):
    """Which tokens may come next, for an answer of a fixed form."""

    def allowed(self) -> np.ndarray:
        """uint32[ceil(V / 32)]: a bit for each token that may come next."""
        ...

    def take(self, token: int) -> None:
        """The token that came. Raises LlavaError where the answer cannot go on."""
        ...


@dataclass(eq=False)
class Job:
    """A prompt with pixels for images, and its answer as it grows.

    text: makes text of the ids and knows stop strings; None where only ids are wanted.
    bias: added to logits, by token. tops: alternatives per token to keep. priority: lower goes first.
    adapter: the one it goes through, "" for none. live: somebody watches, so that tokens are wanted
    soon. on_news: called, on the engine's thread, after tokens came or the answer ended.

    ids, logprobs, tops, logits: of the answer; pieces: its text, not taken yet.
    reason: why it ended, "" until then: "stop", "length", "cancelled" or "error" (see `error`).
    """

    prompt: Example
    settings: SamplingSettings = field(default_factory=SamplingSettings)
    text: Detokenizer | None = None
    bias: Mapping[int, float] | None = None
    tops_wanted: int = 0
    stop_ids: Sequence[int] = ()
    constraint: Constraint | None = None
    priority: int = 0
    adapter: str = ""
    live: bool = False
    on_news: Callable[[Job], None] | None = None

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    tops: list[list[tuple[int, float]]] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    reason: str = ""
    error: Exception | None = None
    # What the engine keeps about it.
    length: int = 0  # positions of the prompt
    budget: int = 0
    slot: int = -1
    read: int = 0  # positions of the prompt that the slot holds
    reused: int = 0  # of them, those that an earlier request read
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    positions: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    ahead: int = 0  # of `length`: the position after the prompt
    pictures: list[bytes] = field(default_factory=list)  # a key for each image
    prefixes: list[bytes] = field(default_factory=list)  # a key for each that can be taken over

    @property
    def done(self) -> bool:
        """Whether the answer has ended."""
        return bool(self.reason)

    def prepare(self, config: LlavaConfig, every: int, sight: bytes = b"") -> None:
        """Lays the prompt out, and names its pictures and, `every` so many positions, its prefixes.

        A prefix's key holds the adapter and all that comes before it: where keys are equal, so are keys
        and values. sight: of an adapter that sees pictures with other weights than the model's.
        """
        image_tokens = config.image_tokens
        laid = expand(self.prompt, image_tokens, config.image_span)
        self.tokens, self.rows = laid["tokens"], laid["slots"]
        self.positions = laid["positions"]
        self.length = len(self.tokens)
        self.ahead = len(self.prompt.images) * (config.image_span - image_tokens)
        self.pictures = [sight + picture_key(image) for image in self.prompt.images]
        key = hashlib.sha256(self.adapter.encode()).digest() if self.adapter else b""
        # The last position is always read: its logits give the first token.
        for end in range(every, self.length, every):
            rows = self.rows[end - every : end]
            shown = [self.pictures[i] for i in np.unique(rows[rows >= 0] // image_tokens)]
            parts = (key, self.tokens[end - every : end].tobytes(), rows.tobytes(), *shown)
            key = hashlib.sha256(b"".join(parts)).digest()
            self.prefixes.append(key)

    def take_pieces(self) -> str:
        """The text that came since the last call."""
        pieces, self.pieces = self.pieces, []
        return "".join(pieces)


def reply_of(job: Job) -> Reply:
    """The answer of a request made by LlavaModel.job, as far as it is. Raises the error it ended with."""
    if job.error is not None:
        raise job.error
    return Reply(
        job.text.text if job.text else "",
        tuple(job.ids),
        job.reason,
        job.length,
        tuple(job.logprobs),
        job.settings.seed or 0,
        cached_tokens=job.reused,
        top_logprobs=tuple(job.tops),
    )


def picture_key(pixels: Any) -> bytes:
    """The identity of what the tower sees: shape, type and every value."""
    head = f"{pixels.dtype}{pixels.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(pixels).tobytes()).digest()
