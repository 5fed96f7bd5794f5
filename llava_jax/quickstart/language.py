"""Makes the tiny "Vicuna": a language model that learned its prompts and words from text alone.

Where training on pictures puts image features, this text has the words of the picture's caption,
in the part of the image where the thing they name is; a slot with several words holds the sum of
their embeddings. So the model learns to look things up in the image's slots before it ever sees a
picture, and stage 1 has something to align with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.batch import Shape, collate
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute
from llava_jax.llama import causal_mask
from llava_jax.llava import binder
from llava_jax.quickstart.captions import phrases
from llava_jax.quickstart.fit import FitResult, Params, epochs, fit
from llava_jax.text.example import Example, sample_turns
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.loss import mean_loss, supervised_nll

_SHARE = 0.7  # of the slots of its place that a word stands in


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
    return fit(
        text_loss(config),
        language,
        {k: v for k, v in params.items() if k not in language},
        text_batches(config, tokenizer, samples, rows, turns_per_sample, seed),
        steps=steps,
        lr=lr,
        warmup_ratio=0.05,
        name="language",
        quiet=quiet,
    )


def text_loss(config: LlavaConfig):
    """loss(trained, frozen, batch): mean over the trained tokens of a batch of `text_batches`."""
    bind = binder(config, Compute(unroll=True))

    def loss(trained: Params, frozen: Params, batch: Mapping[str, Any]) -> jax.Array:
        model = bind({**frozen, **trained})
        words = batch["words"]  # int32[B, T, W]
        stand_in = jnp.where(words[..., None] >= 0, model.language.embed(jnp.maximum(words, 0)), 0)
        text = model.language.embed(batch["tokens"])
        x = jnp.where((batch["slots"] >= 0)[..., None], stand_in.sum(axis=2), text)
        mask = causal_mask(batch["segments"], batch["turns"])
        hidden, _ = model.language(x, batch["positions"], mask)
        nll = supervised_nll(model, hidden, batch["target_at"], batch["targets"])
        return mean_loss(nll, batch["targets"])

    return loss


def text_batches(
    config: LlavaConfig,
    tokenizer: Tokenizer,
    samples: Sequence[Sequence[TextSample]],
    rows: Sequence[int],
    turns_per_sample: int,
    seed: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one shape, for ever: those of llava_jax.batch, with `words` for images.

    words: int32[B, T, W], the tokens whose embeddings add up in an image slot, -1 for none.
    """
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, 2])))
    needs = [_needs(config, group, turns_per_sample) for group in samples]
    length = max(length for length, _ in needs)
    packed = [length // own for own, _ in needs]  # samples in a row of each group
    targets = max(n * own for n, (_, own) in zip(packed, needs))
    shape = Shape(sum(rows), -(-length // 8) * 8, max(packed), -(-targets // 8) * 8)
    no_picture = np.zeros((config.vision.image_size,) * 2 + (3,), np.uint8)
    stand_in = StandIn(config, tokenizer, [s.caption for group in samples for s in group])
    orders = [
        epochs(len(group), count * n, seed + i)
        for i, (group, count, n) in enumerate(zip(samples, rows, packed))
    ]
    while True:
        filled: list[list[Example]] = []
        said: list[list[np.ndarray]] = []  # words of each row's slots
        words = np.full((shape.rows, shape.length, stand_in.width), -1, np.int32)
        for group, order, n in zip(samples, orders, packed):
            for at, index in enumerate(next(order)):
                sample = group[index]
                example = sample_turns(sample.example, turns_per_sample, rng)
                example = example.truncated(config.max_length, config.image_tokens)
                if at % n == 0:
                    filled.append([])
                    said.append([])
                filled[-1].append(replace(example, images=(no_picture,)))
                said[-1].append(stand_in.words(sample.caption, rng))
        batch = collate(filled, shape, config)
        for row, shown in enumerate(said):
            words[row, batch["slots"][row] >= 0] = np.concatenate(shown)
        batch.pop("images")
        yield {**batch, "words": words}


class StandIn:
    """What stands in an image's slots where there is no image: its caption's words.

    width: the most tokens that one phrase of `captions` has.
    """

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer, captions: Sequence[str]):
        self._side = config.vision.image_size // config.vision.patch_size
        self._count = config.image_tokens
        known = {phrase for caption in set(captions) for phrase in phrases(caption)}
        encode = {word: tokenizer.encode(word, add_bos=False) for p in known for word in p if word}
        self._ids = {p: [id_ for word in p if word for id_ in encode[word]] for p in known}
        self.width = max(map(len, self._ids.values()))

    def words(self, caption: str, rng: np.random.RandomState) -> np.ndarray:
        """int32[I, width] of one image: each word in most of the slots of its place."""
        out = np.full((self._count, self.width), -1, np.int32)
        for phrase in phrases(caption):
            ids = np.array(self._ids[phrase], np.int32)
            area = self.area(phrase[2], rng) + (self._count - self._side**2)
            there = rng.random_sample((len(area), len(ids))) < _SHARE
            there[rng.randint(len(area))] = True  # a slot that has it all
            out[area, : len(ids)] = np.where(there, ids, -1)
        return out

    def area(self, place: str, rng: np.random.RandomState) -> np.ndarray:
        """The patches, row by row from 0, of a place such as "top left"; of "", four anywhere."""
        rows = columns = np.arange(self._side)
        half = self._side // 2
        if not place:
            top, left = rng.randint(0, self._side - half + 1, 2)
            rows, columns = rows[top : top + half], columns[left : left + half]
        for word in place.split():
            if word in ("top", "bottom"):
                rows = rows[:half] if word == "top" else rows[half:]
            elif word in ("left", "right"):
                columns = columns[:half] if word == "left" else columns[half:]
        return (rows[:, None] * self._side + columns).ravel()


def _needs(config: LlavaConfig, samples: Sequence[TextSample], turns: int) -> tuple[int, int]:
    """(tokens, trained positions) that no choice of `turns` turns of a sample exceeds."""
    length = targets = 1
    for sample in samples:
        example = sample.example
        of = np.zeros(len(example.ids), int) if example.turns is None else example.turns
        sizes = np.bincount(of)
        trained = np.bincount(of, example.labels >= 0)
        images = len(example.images) * (config.image_tokens - 1)
        length = max(length, sizes[0] + images + _largest(sizes[1:], turns))
        targets = max(targets, int(trained[0]) + _largest(trained[1:], turns))
    return min(length, config.max_length or length), targets


def _largest(sizes: np.ndarray, count: int) -> int:
    return int(np.sort(sizes)[-count:].sum())
