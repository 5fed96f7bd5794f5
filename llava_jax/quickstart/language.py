"""Makes the tiny "Vicuna": a language model that learned its prompts and words from text alone.

Where training on pictures puts image features, this text has the words of the picture's caption,
each somewhere in the part of the image where the thing it names is. So the model learns to look
things up in the image's slots before it ever sees one, and stage 1 has something to align with.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.data.batch import Example, Expanded, Shape, choose_turns, collate, expand
from llava_jax.layers import Compute
from llava_jax.quickstart.captions import phrases
from llava_jax.quickstart.fit import FitResult, Params, epochs, fit
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.step import make_loss


@dataclass(frozen=True)
class TextSample:
    """A tokenised training record with one image, and that image's caption."""

    example: Example
    caption: str


def train_language(
    config: LlavaConfig,
    params: Params,
    tokenizer: Tokenizer,
    samples: Sequence[Sequence[TextSample]],
    *,
    steps: int,
    lr: float,
    rows: Sequence[int],
    turns_per_sample: int = 0,
    seed: int = 0,
    quiet: bool = False,
) -> FitResult:
    """Trains the language model's parameters among `params`; the result holds those alone.

    samples: groups of samples (say, captions and conversations); a batch has `rows[g]` rows of
    group g, each filled with as many samples as surely fit.
    """
    language = {k: v for k, v in params.items() if k.startswith("language.")}
    step_loss = make_loss(config, Compute(unroll=True))
    return fit(
        step_loss,
        language,
        {k: v for k, v in params.items() if k not in language},
        text_batches(config, tokenizer, samples, rows, turns_per_sample, seed),
        steps=steps,
        lr=lr,
        warmup_ratio=0.05,
        name="language",
        quiet=quiet,
    )


def text_batches(
    config: LlavaConfig,
    tokenizer: Tokenizer,
    samples: Sequence[Sequence[TextSample]],
    rows: Sequence[int],
    turns_per_sample: int,
    seed: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches without images, all of one shape, for ever; see llava_jax.data.batch."""
    rng = np.random.default_rng([seed, 2])
    slots = StandIn(config, tokenizer)
    needs = [_needs(config, group, turns_per_sample) for group in samples]
    length = max(length for length, _ in needs)
    packed = [length // own for own, _ in needs]  # samples in a row of each group
    targets = max(n * own for n, (_, own) in zip(packed, needs))
    shape = Shape(sum(rows), -(-length // 8) * 8, 0, -(-targets // 8) * 8)
    orders = [
        epochs(len(group), count * n, seed + i)
        for i, (group, count, n) in enumerate(zip(samples, rows, packed))
    ]

    def text(sample: TextSample) -> Expanded:
        example = choose_turns(sample.example, turns_per_sample, rng)
        expanded = expand(example, config.image_tokens, config.max_length)
        return slots.fill(expanded, sample.caption, rng)

    while True:
        filled = []
        for group, order, n in zip(samples, orders, packed):
            texts = [text(group[index]) for index in next(order)]
            filled += [texts[i : i + n] for i in range(0, len(texts), n)]
        size = config.vision.image_size
        yield collate(filled, [[] for _ in filled], shape, config.image_tokens, size)


class StandIn:
    """Puts a caption's words where a picture's features would be."""

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._side = config.vision.image_size // config.vision.patch_size
        self._first = config.image_tokens - self._side**2  # behind a class token, if there is one
        self._known: dict[str, list[int]] = {}

    def fill(self, sample: Expanded, caption: str, rng: np.random.Generator) -> Expanded:
        """`sample` as text alone."""
        tokens = sample.tokens.copy()
        places = np.flatnonzero(sample.slots >= 0)
        tokens[places] = self._tokenizer.pad_id
        for phrase in phrases(caption):
            ids = [id_ for word in phrase if word for id_ in self._ids(word)]
            area = self.area(phrase[2])
            chosen = rng.permutation(area)[: len(ids)]
            tokens[places[self._first + chosen]] = ids[: len(chosen)]
        return replace(sample, tokens=tokens, slots=np.full_like(sample.slots, -1), images=())

    def area(self, place: str) -> np.ndarray:
        """The patches, row by row from 0, of a place such as "top left"; "" is all of them."""
        rows = columns = np.arange(self._side)
        half = self._side // 2
        for word in place.split():
            if word in ("top", "bottom"):
                rows = rows[:half] if word == "top" else rows[half:]
            elif word in ("left", "right"):
                columns = columns[:half] if word == "left" else columns[half:]
        return (rows[:, None] * self._side + columns).ravel()

    def _ids(self, word: str) -> list[int]:
        if word not in self._known:
            self._known[word] = self._tokenizer.encode(word, add_bos=False)
        return self._known[word]


def _needs(config: LlavaConfig, samples: Sequence[TextSample], turns: int) -> tuple[int, int]:
    """(tokens, trained positions) that no choice of `turns` turns of a sample exceeds."""
    length = targets = 1
    for sample in samples:
        example = sample.example
        sizes = np.bincount(example.turns)
        trained = np.bincount(example.turns, example.labels >= 0)
        images = len(example.images) * (config.image_tokens - 1)
        length = max(length, sizes[0] + images + _largest(sizes[1:], turns))
        targets = max(targets, int(trained[0]) + _largest(trained[1:], turns))
    return min(length, config.max_length or length), targets


def _largest(sizes: np.ndarray, count: int) -> int:
    return int(np.sort(sizes)[-count:].sum())
