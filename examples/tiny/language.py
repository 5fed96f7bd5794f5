"""The tiny Vicuna: a language model that learned its prompts and words from text alone.

Where training on pictures puts image features, this text has the words of the picture's caption,
in the part of the image where the thing they name is; a slot with several words holds the sum of
their embeddings. So the model learns to look things up in the image's slots before it ever sees a
picture, and stage 1 has something to align with.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.tiny.fit import Loss, Params, fit
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute
from llava_jax.llava import binder, merge_images
from llava_jax.quickstart.questions import Object
from llava_jax.quickstart.scenes import COLORS, PLACES, SHAPES
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.loss import mean_loss, supervised_nll

_SHARE = 0.7  # of the slots of its place that a word stands in

Batch = dict[str, np.ndarray]


def train_language(
    config: LlavaConfig,
    params: Params,
    batches: Iterator[Batch],
    *,
    steps: int,
    lr: float = 0.02,
    quiet: bool = False,
) -> tuple[Params, list[float]]:
    """Trains the language model among `params` on `with_words` batches; (its parameters, losses)."""
    language = {k: v for k, v in params.items() if k.startswith("language.")}
    frozen = {k: v for k, v in params.items() if k not in language}
    options: Any = dict(steps=steps, lr=lr, name="language model", quiet=quiet)
    return fit(text_loss(config), language, frozen, batches, **options)


def text_loss(config: LlavaConfig) -> Loss:
    """The mean loss over the trained tokens of a batch of `with_words`."""
    bind = binder(config, Compute(unroll=True))

    def loss(trained: Params, frozen: Params, batch: Mapping[str, Any]) -> jax.Array:
        model = bind({**frozen, **trained})
        words = batch["words"]  # [G, M * I, W]
        embedded = model.language.embed(jnp.maximum(words, 0))  # [G, M * I, W, D]
        features = jnp.where(words[..., None] >= 0, embedded, 0).sum(axis=2)  # [G, M * I, D]
        x = merge_images(model.language.embed(batch["tokens"]), features, batch["slots"])
        places = (batch[name] for name in ("positions", "segments", "turns"))
        at = {"at_GP": batch["target_at"], "prune": True}
        hidden, _ = model.language(x, *places, **at)
        nll = supervised_nll(model, hidden, batch["targets"])
        return mean_loss(nll, batch["targets"])

    return loss


def with_words(
    loader: Iterator[tuple[Batch, dict[str, Any]]],
    seen: Mapping[str, Sequence[Object]],
    stand_in: StandIn,
    seed: int,
) -> Iterator[Batch]:
    """The loader's batches with `words` in place of `images`.

    seen: what is in the image of each sample, by the sample's id; each sample has one image.
    words: int32[G, M * I, W], the tokens whose embeddings add up in each image slot, -1 for none.
    """
    rng = np.random.default_rng([seed, 2])
    for batch, info in loader:
        groups, images = batch.pop("images").shape[:2]
        words = np.full((groups, images, stand_in.count, stand_in.width), -1, np.int32)
        names = iter(info["ids"])  # row by row
        samples_of = batch["segments"].max(axis=1).reshape(groups, -1).sum(axis=1)
        for group, samples in zip(words, samples_of):
            for i in range(samples):
                group[i] = stand_in.words(seen[next(names)], rng)
        yield {**batch, "words": words.reshape(groups, images * stand_in.count, -1)}


class StandIn:
    """What stands in an image's slots where there is no image: the words of its caption.

    count: slots of an image. width: the most tokens that one object's words have.
    """

    def __init__(self, config: LlavaConfig, tokenizer: Tokenizer):
        self._side = config.vision.image_size // config.vision.patch_size
        self.count = config.image_tokens
        every = itertools.product(COLORS, SHAPES, PLACES)
        self._ids: dict[Object, list[int]] = {
            thing: [i for word in thing for i in tokenizer.encode(word, add_bos=False)]
            for thing in every
        }
        self.width = max(map(len, self._ids.values()))

    def words(self, objects: Sequence[Object], rng: np.random.Generator) -> np.ndarray:
        """int32[I, width] of one image: each word in most of the slots of its object's corner."""
        out = np.full((self.count, self.width), -1, np.int32)
        for thing in objects:
            ids = np.array(self._ids[thing], np.int32)
            area = self.area(thing[2])
            there = rng.random((len(area), len(ids))) < _SHARE
            there[rng.integers(len(area))] = True  # a slot that has it all
            out[area, : len(ids)] = np.where(there, ids, -1)
        return out

    def area(self, place: str) -> np.ndarray:
        """The patches of a corner such as "top left", numbered row by row from 0."""
        half = self._side // 2
        rows, columns = np.arange(half), np.arange(half)
        vertical, horizontal = place.split()
        rows = rows + half * (vertical == "bottom")
        columns = columns + half * (horizontal == "right")
        return (rows[:, None] * self._side + columns).ravel()
