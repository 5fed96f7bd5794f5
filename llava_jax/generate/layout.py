"""Prompts as arrays of fixed shapes. Lengths are rounded up to buckets, so few shapes are compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.errors import PromptError, counted
from llava_jax.text.constants import IMAGE_TOKEN

_IMAGE_COUNTS = (0, 1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, eq=False)
class Prompt:
    """One prompt: int32[t] ids with IMAGE_TOKEN where an image stands, and those images in order.

    images: uint8[H, W, 3] of the tower's size each, or float32, already normalised.
    Raises PromptError when the images do not match the slots.
    """

    ids: np.ndarray
    images: tuple[np.ndarray, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "ids", np.asarray(self.ids, np.int32).reshape(-1))
        object.__setattr__(self, "images", tuple(self.images))
        if not len(self.ids):
            raise PromptError("the prompt is empty")
        slots = int((self.ids == IMAGE_TOKEN).sum())
        if slots != len(self.images):
            raise PromptError(f"the prompt has {slots} image slots for {len(self.images)} images")

    def positions(self, config: LlavaConfig) -> int:
        """Length of the sequence the model sees: every image counts config.image_tokens."""
        return len(self.ids) + len(self.images) * (config.image_tokens - 1)


def check(prompt: Prompt, config: LlavaConfig, name: str = "the prompt") -> None:
    """Raises PromptError for an id without an embedding, a misshapen image, or too long a prompt."""
    text = prompt.ids[prompt.ids != IMAGE_TOKEN]
    vocab, size = config.language.vocab_size, config.vision.image_size
    if len(text) and not (text.min() >= 0 and text.max() < vocab):
        bad = int(text.min()) if text.min() < 0 else int(text.max())
        raise PromptError(f"{name}: token id {bad} is outside the vocabulary of {vocab}")
    for image in prompt.images:
        if image.shape != (size, size, 3):
            raise PromptError(f"{name}: an image is {image.shape}, not ({size}, {size}, 3)")
    length, limit = prompt.positions(config), config.language.max_positions
    if length >= limit:
        images = len(prompt.images)
        of_images = f", {images * config.image_tokens} of them for {counted(images, 'image')}"
        part = of_images if images else ""
        raise PromptError(
            f"{name} takes {length} positions{part}; the model has {limit}, the answer included",
            fix="shorten the conversation or show fewer images",
        )


def length_bucket(n: int) -> int:
    """The padded length for n positions: steps of an eighth of the next power of two, at least 16."""
    step = max(16, (1 << max(n - 1, 1).bit_length()) // 8)
    return -(-n // step) * step


def room_bucket(n: int, largest: int | None = None) -> int:
    """Cache entries for n new tokens: a power of two from 32 on, up to `largest` if given."""
    room = max(32, 1 << max(n - 1, 1).bit_length())
    return room if largest is None else min(room, largest)


def batch_bucket(rows: int, multiple: int = 1) -> int:
    """Padded number of rows: a power of two, rounded up to what the mesh needs."""
    return -(-(1 << (rows - 1).bit_length()) // multiple) * multiple


def image_bucket(images: int) -> int:
    """Padded number of images a row."""
    return next((k for k in _IMAGE_COUNTS if k >= images), -(-images // 4) * 4)


class Rows(NamedTuple):
    """B prompts, padded on the right to T positions and K images."""

    tokens: np.ndarray  # int32[B, T]
    slots: np.ndarray  # int32[B, T], index of an image feature of the row, or -1
    lengths: np.ndarray  # int32[B]
    images: np.ndarray  # uint8 or float32 [B, K, H, W, 3]


def lay_out(prompts: Sequence[Prompt], config: LlavaConfig, multiple: int = 1) -> Rows:
    """Prompts as one padded batch. Rows beyond the prompts hold a single token each."""
    lengths = [p.positions(config) for p in prompts]
    b, t = batch_bucket(len(prompts), multiple), length_bucket(max(lengths))
    k, size = image_bucket(max(len(p.images) for p in prompts)), config.vision.image_size
    # One float image makes the batch float: uint8 ones are then normalised here.
    as_float = any(i.dtype != np.uint8 for p in prompts for i in p.images)
    rows = Rows(
        np.zeros((b, t), np.int32),
        np.full((b, t), -1, np.int32),
        np.ones(b, np.int32),
        np.zeros((b, k, size, size, 3), np.float32 if as_float else np.uint8),
    )
    for row, (prompt, length) in enumerate(zip(prompts, lengths)):
        tokens, slots = expand(prompt.ids, config.image_tokens)
        rows.tokens[row, :length], rows.slots[row, :length] = tokens, slots
        rows.lengths[row] = length
        for i, image in enumerate(prompt.images):
            rows.images[row, i] = _as_float(image, config) if as_float else image
    return rows


def _as_float(image: np.ndarray, config: LlavaConfig) -> np.ndarray:
    if image.dtype != np.uint8:
        return image
    from llava_jax.images.pixels import normalize_for

    return normalize_for(image, config.vision)


def expand(ids: np.ndarray, image_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, slots) of a prompt with every image slot widened to its features.

    ids      1  -200     7          (2 features an image)
    tokens   1   0   0   7
    slots   -1   0   1  -1
    """
    image = ids == IMAGE_TOKEN
    widths = np.where(image, image_tokens, 1)
    is_feature = np.repeat(image, widths)
    tokens = np.where(is_feature, 0, np.repeat(ids, widths)).astype(np.int32)
    slots = np.where(is_feature, np.cumsum(is_feature) - 1, -1).astype(np.int32)
    return tokens, slots
