"""Examples to arrays of few different shapes, for training, generation and likelihood alike.

Everything that the host can decide is decided here, in numpy: where image features go, what a
position sees and predicts, and how rows are padded. One image of I = 3 features:

ids         1   -200          15  16   2
labels      .     .            .  16   2        . is IGNORE
----------------------------------------------- becomes, padded to T = 8 with P = 3 targets
tokens      1    0   0   0    15  16   2   0    0 under features and padding
slots      -1    0   1   2    -1  -1  -1  -1    which of the group's M * I image features is here
positions   0    1   2   3     4   5   6   0    RoPE
segments    1    1   1   1     1   1   1   0    0 is padding, n the n-th example of the row
turns       0    0   0   0     0   0   0   0    n is seen by turn n alone, see Example
target_at   4    5   0                          positions that predict a trained token, ...
targets    16    2   .                          ... and that token

The B rows are cut into G groups, one after the other. The rows of a group share M images and P targets,
so that few of either are empty: `slots` counts through the M * I feature rows of the group, `target_at`
through its (B / G) * T positions. Unpacked, each row is a group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.errors import PromptError, SampleError, counted
from llava_jax.images.pixels import normalize_for
from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.example import Example

Row = Sequence[Example]
"""Examples that share a row; they do not see each other."""


# Sizes and shapes ---------------------------------------------------------------------------------


class Size(NamedTuple):
    """What an example or a row needs, or has room for."""

    length: int  # T: positions
    images: int  # M
    targets: int  # P: trained tokens

    def fits(self, room: Size) -> bool:
        """Whether it needs no more than `room` of anything."""
        return all(need <= left for need, left in zip(self, room))


class Shape(NamedTuple):
    """The padded shape of a batch. targets: None for a batch of questions, which has none.

    groups: how many groups the rows are cut into; 0: each row is one.
    """

    rows: int  # B
    length: int  # T
    images: int  # M, of a group
    targets: int | None  # P, of a group
    groups: int = 0  # G

    @property
    def group_rows(self) -> int:
        """B / G: the rows of a group."""
        return self.rows // self.groups if self.groups else 1

    @property
    def room(self) -> Size:
        """The positions of one row, the images and targets of its group."""
        return Size(self.length, self.images, self.targets or 0)

    def part(self, count: int) -> Shape:
        """Of `count` rows of the batch, which are whole groups."""
        return self._replace(rows=count, groups=self.groups and count // self.group_rows)


def size_of(row: Row, image_tokens: int) -> Size:
    """What the examples of a row need together."""
    return Size(
        sum(example.length(image_tokens) for example in row),
        sum(len(example.images) for example in row),
        sum(example.target_count for example in row),
    )


class Buckets(NamedTuple):
    """The sizes that batches of training are padded to, each in rising order."""

    length: Sequence[int]
    images: Sequence[int]
    targets: Sequence[int]

    @property
    def largest(self) -> Size:
        """The room of a row."""
        return Size(*(sizes[-1] for sizes in self))

    def hold(self, size: Size, sample: str = "") -> Size:
        """The smallest buckets that hold `size`. Raises SampleError naming the sample if none do."""
        return Size(*(bucket(n, b, i, sample) for i, (n, b) in enumerate(zip(size, self))))


def bucket(need: int, buckets: Sequence[int], field: int, sample: str) -> int:
    """The smallest bucket of at least `need`, where `field` says of which part of Size.

    Raises SampleError naming the sample if none is large enough.
    """
    for size in buckets:
        if size >= need:
            return size
    what = ("positions", "images", "trained tokens")[field]
    name = ("length", "image", "target")[field]
    raise SampleError(
        f"sample {sample}: needs {need} {what}, more than the largest of data.{name}_buckets, "
        f"{buckets[-1]}",
        fix=f"add a larger one to data.{name}_buckets",
    )


def prompt_shape(prompts: Sequence[Example], config: LlavaConfig, multiple: int = 1) -> Shape:
    """The shape for questions, one a row; rounded up, so that few shapes are compiled.

    multiple: what the number of rows must be a multiple of, for a mesh.
    """
    rows, longest = len(prompts), max(p.length(config.image_tokens) for p in prompts)
    return Shape(
        batch_bucket(rows, multiple),
        # Batches this large come in numbers: compiling one more shape costs more than padding.
        length_bucket(longest, least=64 if rows > 16 else 16),
        image_bucket(max(len(p.images) for p in prompts)),
        None,
    )


def length_bucket(n: int, least: int = 16) -> int:
    """The padded length for n positions: steps of an eighth of the next power of two, or `least`."""
    step = max(least, (1 << max(n - 1, 1).bit_length()) // 8)
    return -(-n // step) * step


def room_bucket(n: int) -> int:
    """Cache entries for n new tokens: a power of two from 32 on."""
    return max(32, 1 << max(n - 1, 1).bit_length())


def batch_bucket(rows: int, multiple: int = 1) -> int:
    """Padded number of rows: a power of two, rounded up to a multiple of `multiple`."""
    return -(-(1 << (rows - 1).bit_length()) // multiple) * multiple


def image_bucket(images: int) -> int:
    """Padded number of images per row."""
    return next((k for k in (0, 1, 2, 3, 4, 6, 8) if k >= images), -(-images // 4) * 4)


# Arrays -------------------------------------------------------------------------------------------


def expand(
    example: Example, image_tokens: int, image_span: int | None = None
) -> dict[str, np.ndarray]:
    """The arrays of one example, unpadded: int32[t], and int32[p] for target_at and targets.

    Every image slot becomes `image_tokens` entries, as in prepare_inputs_labels_for_multimodal
    (llava/model/llava_arch.py). image_span: RoPE positions that an image takes, where it is more: what
    follows is so far behind, and the image's own entries have its first position, from which the
    network counts. Raises SampleError for independent turns out of order.
    """
    is_slot = example.ids == IMAGE_TOKEN  # [ids]
    repeat = np.where(is_slot, image_tokens, 1)  # [ids]
    is_image = np.repeat(is_slot, repeat)  # [t]
    turns = np.zeros(len(is_image), np.int32)  # [t]
    if example.turns is not None:
        turns = np.repeat(example.turns, repeat)
    arrays = {
        "tokens": np.where(is_image, 0, np.repeat(example.ids, repeat)).astype(np.int32),
        "slots": np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32),
        "positions": _positions(turns, example.id),
        "turns": turns,
    }
    if image_span not in (None, image_tokens):
        taken = np.cumsum(is_image) - is_image  # features before each entry
        arrays["positions"] += (taken // image_tokens * (image_span - image_tokens)).astype(
            np.int32
        )
        arrays["positions"] -= np.where(is_image, taken % image_tokens, 0).astype(np.int32)
    if example.labels is not None:
        labels = np.where(is_image, IGNORE, np.repeat(example.labels, repeat))  # [t]
        arrays["target_at"], arrays["targets"] = _targets(labels, turns)
    return arrays


def _targets(labels: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions, ids): each trained token is predicted from the one before it that its turn sees."""
    trained = np.flatnonzero(labels != IGNORE)  # [p]
    trained = trained[trained > 0]
    before = trained - 1
    # The first token of a later turn follows the prefix, not the turn before it in the row.
    other_turn = (turns[before] != 0) & (turns[before] != turns[trained])
    before[other_turn] = np.count_nonzero(turns == 0) - 1
    return before.astype(np.int32), labels[trained].astype(np.int32)


def _positions(turns: np.ndarray, sample: str) -> np.ndarray:
    """0.. along the example; each independent turn goes on from the shared prefix."""
    positions = np.arange(len(turns), dtype=np.int32)
    if not turns.any():
        return positions
    if (np.diff(turns) < 0).any():
        raise SampleError(
            f"sample {sample}: independent turns must follow a shared prefix in order"
        )
    prefix = np.count_nonzero(turns == 0)
    starts = np.searchsorted(turns, turns)  # where each position's own turn begins
    positions[prefix:] += (prefix - starts[prefix:]).astype(np.int32)
    return positions


def collate(
    rows: Sequence[Row],
    shape: Shape,
    config: LlavaConfig,
    files: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """The batch of `rows`, whose images are pixels; rows that `shape` has beyond them stay empty.

    tokens, slots, positions, segments, turns: int32[B, T]; see the top of this file.
    images: uint8[G, M, S, S, 3], or float32 if one of the images came normalised.
    target_at, targets: int32[G, P], unless shape.targets is None; files: likewise, where `files` has
    the number of each example's data file: that of each target.
    """
    per_group = shape.group_rows
    groups = shape.rows // per_group
    batch = {
        name: np.zeros((shape.rows, shape.length), np.int32)  # [B, T]
        for name in ("tokens", "slots", "positions", "segments", "turns")
    }
    batch["slots"][:] = -1
    if shape.targets is not None:
        batch["target_at"] = np.zeros((groups, shape.targets), np.int32)  # [G, P]
        batch["targets"] = np.full((groups, shape.targets), IGNORE, np.int32)
        if files is not None:
            batch["files"] = np.zeros((groups, shape.targets), np.int32)
    p = m = 0  # targets and images of the group that are taken
    for r, row in enumerate(rows):
        g, within = divmod(r, per_group)
        if not within:
            p = m = 0
        t = 0  # positions of the row that are taken
        for n, example in enumerate(row, 1):
            one = expand(example, config.image_tokens, config.image_span)
            here = slice(t, t + len(one["tokens"]))
            for name in ("tokens", "positions", "turns"):
                batch[name][r, here] = one[name]
            slots = one["slots"]
            batch["slots"][r, here] = np.where(slots < 0, -1, slots + m * config.image_tokens)
            batch["segments"][r, here] = n
            if shape.targets is not None:
                trained = slice(p, p + len(one["targets"]))
                batch["target_at"][g, trained] = one["target_at"] + within * shape.length + t
                batch["targets"][g, trained] = one["targets"]
                if files is not None:
                    batch["files"][g, trained] = files[r][n - 1]
                p = trained.stop
            t, m = here.stop, m + len(example.images)
    cut = [rows[at : at + per_group] for at in range(0, len(rows), per_group)]
    batch["images"] = _pixels(cut, (groups, shape.images), config)
    return batch


def _pixels(
    groups: Sequence[Sequence[Row]], shape: tuple[int, int], config: LlavaConfig
) -> np.ndarray:
    """[G, M, S, S, 3] of the images of each group of rows, in order."""
    size = config.vision.image_size
    shown = [
        [image for row in rows for example in row for image in example.images] for rows in groups
    ]
    as_float = any(image.dtype != np.uint8 for images in shown for image in images)
    # One float image makes the batch float; uint8 ones are normalised here, not on the device.
    pixels = np.zeros((*shape, size, size, 3), np.float32 if as_float else np.uint8)
    for g, images in enumerate(shown):
        for m, image in enumerate(images):
            if as_float and image.dtype == np.uint8:
                image = normalize_for(image, config.vision)
            pixels[g, m] = image
    return pixels


def check_prompt(prompt: Example, config: LlavaConfig, name: str = "the prompt") -> None:
    """Raises PromptError for an id without an embedding, a misshapen image, or too long a prompt.

    prompt: with pixels for images. name: what the error calls it.
    """
    text = prompt.ids[prompt.ids != IMAGE_TOKEN]
    vocab, size = config.language.vocab_size, config.vision.image_size
    if len(text) and not (text.min() >= 0 and text.max() < vocab):
        bad = int(text.min()) if text.min() < 0 else int(text.max())
        raise PromptError(f"{name}: token id {bad} is outside the vocabulary of {vocab}")
    for image in prompt.images:
        if image.shape != (size, size, 3):
            raise PromptError(f"{name}: an image is {image.shape}, not ({size}, {size}, 3)")
    length, limit = prompt.length(config.image_span), config.language.max_positions
    if length >= limit:
        images = len(prompt.images)
        of_images = f", {images * config.image_span} of them for {counted(images, 'image')}"
        part = of_images if images else ""
        raise PromptError(
            f"{name} takes {length} positions{part}; the model has {limit}, the answer included",
            fix="shorten the conversation or show fewer images",
        )
