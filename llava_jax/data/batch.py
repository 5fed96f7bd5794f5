"""Samples to arrays of few different shapes, as pure functions.

input_ids   1   -200          15  16   2        one image of I = 3 features
tokens      1    0   0   0    15  16   2   0    0 under features and padding
slots      -1    0   1   2    -1  -1  -1  -1    row of the sample's K * I image features
positions   0    1   2   3     4   5   6   0    RoPE
segments    1    1   1   1     1   1   1   0    0 is padding, n the n-th sample of the row
target_at                  4   5                positions whose next token is trained
targets                   16   2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from llava_jax.data.order import Random
from llava_jax.errors import SampleError
from llava_jax.text.constants import IGNORE, IMAGE_TOKEN
from llava_jax.text.sample import Example


@dataclass(frozen=True)
class Expanded:
    """One sample with a place for every image feature: int32[t] each, targets int32[p]."""

    id: str
    tokens: np.ndarray
    slots: np.ndarray
    positions: np.ndarray
    turns: np.ndarray
    target_at: np.ndarray
    targets: np.ndarray
    images: tuple[str, ...]
    cut: bool = False  # was longer than allowed
    notes: tuple[str, ...] = ()  # of Example

    def __len__(self) -> int:
        return len(self.tokens)


class Shape(NamedTuple):
    """The padded shape of a batch."""

    rows: int
    length: int  # T
    images: int  # K
    targets: int  # P


def without_id(example: Example, id_: int) -> Example:
    """The example without its tokens `id_`.

    The original takes every id equal to the padding id for padding, an `<unk>` in the text too, and
    drops it before image features go in (the attention mask of train.py and llava_arch.py).
    """
    keep = example.input_ids != id_
    if keep.all():
        return example
    ids, labels, turns = example.input_ids, example.labels, example.turns
    return dataclasses.replace(example, input_ids=ids[keep], labels=labels[keep], turns=turns[keep])


def expand(
    example: Example, image_tokens: int, max_length: int | None = None, *, idle: bool = False
) -> Expanded:
    """Gives every image slot `image_tokens` places; what is beyond `max_length` is cut off.

    Source of the rule: prepare_inputs_labels_for_multimodal (llava/model/llava_arch.py), but an image
    is never cut in part. idle: a sample may train nothing.
    Raises SampleError if slots and images differ in number, or if no position would be trained.
    """
    ids, labels, turns = example.input_ids, example.labels, example.turns
    slots_wanted = int(np.count_nonzero(ids == IMAGE_TOKEN))
    if slots_wanted != len(example.images):
        raise SampleError(
            f"sample {example.id}: {slots_wanted} image slots for {len(example.images)} images"
        )
    repeat = np.where(ids == IMAGE_TOKEN, image_tokens, 1)
    end = len(ids)
    if max_length is not None and repeat.sum() > max_length:
        end = int(np.searchsorted(np.cumsum(repeat), max_length, side="right"))
    cut = end < len(ids)
    ids, labels, turns, repeat = ids[:end], labels[:end], turns[:end], repeat[:end]

    is_image = np.repeat(ids == IMAGE_TOKEN, repeat)
    tokens = np.where(is_image, 0, np.repeat(ids, repeat)).astype(np.int32)
    slots = np.where(is_image, np.cumsum(is_image) - 1, -1).astype(np.int32)
    turns = np.repeat(turns, repeat).astype(np.int32)
    labels = np.where(is_image, IGNORE, np.repeat(labels, repeat))
    at, targets = _targets(labels, turns)
    if not len(targets) and not idle:
        why = f"within its first {max_length} tokens" if cut else "in it"
        raise SampleError(f"sample {example.id}: there is nothing to train {why}")
    images = example.images[: np.count_nonzero(ids == IMAGE_TOKEN)]
    return Expanded(
        example.id,
        tokens,
        slots,
        _positions(turns, example.id),
        turns,
        at,
        targets,
        images,
        cut,
        example.notes,
    )


def _targets(labels: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions, ids): each trained token is predicted from the one before it that its turn sees."""
    trained = np.flatnonzero(labels != IGNORE)
    trained = trained[trained > 0]
    before = trained - 1
    # The first token of a later turn follows the prefix, not the turn that stands before it.
    other_turn = (turns[before] != 0) & (turns[before] != turns[trained])
    before[other_turn] = np.count_nonzero(turns == 0) - 1
    return before.astype(np.int32), labels[trained].astype(np.int32)


def _positions(turns: np.ndarray, sample: str) -> np.ndarray:
    """0.. along the sample; with independent turns, each goes on from the shared prefix."""
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


def choose_turns(example: Example, count: int, rng: Random) -> Example:
    """The example with only `count` of its independent turns, in their order; all if it has fewer."""
    total = int(example.turns.max(initial=0))
    if not count or total <= count:
        return example
    chosen = np.sort(rng.permutation(total)[:count]) + 1
    keep = (example.turns == 0) | np.isin(example.turns, chosen)
    number = np.zeros(total + 1, np.int32)
    number[chosen] = np.arange(1, count + 1)
    return dataclasses.replace(
        example,
        input_ids=example.input_ids[keep],
        labels=example.labels[keep],
        turns=number[example.turns[keep]],
    )


# Rows and shapes ------------------------------------------------------------------------------------


def first_fit(
    samples: Sequence[Expanded], length: int, images: int, targets: int = 1 << 31
) -> list[list[int]]:
    """Rows of sample indices, none above `length` tokens, `images` images and `targets` targets.

    Longest first. Ties keep their order, so the same samples always make the same rows.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int, int]] = []  # tokens, images and targets left in each row
    for i in sorted(range(len(samples)), key=lambda i: -len(samples[i])):
        needs = row_needs([samples[i]])
        fits = (r for r, left in enumerate(room) if all(n <= x for n, x in zip(needs, left)))
        r = next(fits, len(rows))
        if r == len(rows):
            rows.append([])
            room.append((length, images, targets))
        rows[r].append(i)
        tokens, pictures, trained = room[r]
        room[r] = (tokens - needs[0], pictures - needs[1], trained - needs[2])
    return rows


def bucket(need: int, buckets: Sequence[int], name: str, sample: str) -> int:
    """The smallest bucket of at least `need`. Raises SampleError naming the sample if none is."""
    for size in buckets:
        if size >= need:
            return size
    raise SampleError(
        f"sample {sample}: needs {need} {name}, the largest bucket is {buckets[-1]}",
        fix=f"add a larger one to data.{name}_buckets",
    )


def row_needs(row: Sequence[Expanded]) -> tuple[int, int, int]:
    """(tokens, images, trained positions) of a row."""
    return (
        sum(len(s) for s in row),
        sum(len(s.images) for s in row),
        sum(len(s.targets) for s in row),
    )


def shape_of(
    rows: Sequence[Sequence[Expanded]],
    count: int,
    lengths: Sequence[int],
    images: Sequence[int],
    targets: Sequence[int],
) -> Shape:
    """The smallest buckets that hold every row; `count` is the number of rows, empty ones included."""
    filled = [(row_needs(row), row[0].id) for row in rows if row] or [((1, 0, 1), "")]
    sizes = []
    for i, (buckets, name) in enumerate(
        ((lengths, "length"), (images, "image"), (targets, "target"))
    ):
        need, sample = max((needs[i], sample) for needs, sample in filled)
        sizes.append(bucket(need, buckets, name, sample))
    return Shape(count, *sizes)


def collate(
    rows: Sequence[Sequence[Expanded]],
    pictures: Sequence[Sequence[np.ndarray]],
    shape: Shape,
    image_tokens: int,
    image_size: int,
) -> dict[str, np.ndarray]:
    """The batch of `rows`; `pictures[r]` are the uint8[H, W, 3] of row r's images in order."""
    count, length, images, targets = shape
    text = {
        name: np.zeros((count, length), np.int32)
        for name in ("tokens", "slots", "positions", "segments", "turns")
    }
    text["slots"][:] = -1
    target_at = np.zeros((count, targets), np.int32)
    target = np.full((count, targets), IGNORE, np.int32)
    pixels = np.zeros((count, images, image_size, image_size, 3), np.uint8)
    for r, row in enumerate(rows):
        t = p = k = 0
        for n, sample in enumerate(row, 1):
            here, trained = slice(t, t + len(sample)), slice(p, p + len(sample.targets))
            text["tokens"][r, here] = sample.tokens
            text["slots"][r, here] = np.where(sample.slots < 0, -1, sample.slots + k * image_tokens)
            text["positions"][r, here] = sample.positions
            text["segments"][r, here] = n
            text["turns"][r, here] = sample.turns
            target_at[r, trained] = sample.target_at + t
            target[r, trained] = sample.targets
            t, p, k = here.stop, trained.stop, k + len(sample.images)
        for i, picture in enumerate(pictures[r]):
            pixels[r, i] = picture
    return {**text, "images": pixels, "target_at": target_at, "targets": target}
