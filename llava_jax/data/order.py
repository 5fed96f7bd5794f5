"""In which order samples are seen, and which are kept aside.

`group_by_modality_length` is the original's rule (llava/train/llava_trainer.py), exact when given the
permutations it drew; our own permutations come from a seed, an epoch and a purpose, so the order of any
epoch is known without walking through the ones before it.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from llava_jax.errors import ConfigError, SampleError

Random = np.random.RandomState | np.random.Generator

Permute = Callable[[int], Sequence[int] | np.ndarray]
"""n -> a permutation of range(n); called in a fixed order."""


def seeded_permutations(seed: int, epoch: int) -> Permute:
    """Permutations that depend on the seed, the epoch and how many were drawn before."""
    drawn = itertools.count()
    return lambda n: lasting_random(seed, epoch, next(drawn)).permutation(n)


def lasting_random(*key: int) -> np.random.RandomState:
    """Random numbers determined by `key` alone, the same in every version of numpy.

    numpy keeps the streams of SeedSequence, MT19937 and RandomState for good (NEP 19), those of
    Generator not: a run must go on in the same order after an upgrade.
    """
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def epoch_order(
    count: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    lengths: Sequence[int] | None = None,
    batch_size: int = 1,
    groups: int = 1,
) -> np.ndarray:
    """int64[count]: the order of one epoch: as stored, shuffled, or grouped by modality and length.

    lengths: of llava_jax.text.records.modality_lengths; given, batches of `batch_size` hold one modality and like lengths.
    groups: equal parts of like total length in every batch (one per device); divides batch_size.
    """
    permute = seeded_permutations(seed, epoch)
    if lengths is not None:
        if batch_size % groups:
            raise ConfigError(f"batch_size {batch_size} is not a multiple of groups {groups}")
        order = group_by_modality_length(lengths, batch_size // groups, groups, permute)
        return np.asarray(order, np.int64)
    if shuffle:
        return np.asarray(permute(count), np.int64)
    return np.arange(count, dtype=np.int64)


def group_by_modality_length(
    lengths: Sequence[int], batch_size: int, world_size: int, permute: Permute
) -> list[int]:
    """The original's order: every batch of batch_size * world_size is of one modality but the last.

    Raises SampleError for a length of 0, whose modality is unknown.
    """
    for i, length in enumerate(lengths):
        if length == 0:
            raise SampleError(f"sample {i} has no words, so it cannot be grouped by length")
    image = [i for i, n in enumerate(lengths) if n > 0]
    text = [i for i, n in enumerate(lengths) if n < 0]
    if not image or not text:
        # Text alone keeps its negative lengths, so the shortest come first: the original's way.
        return group_by_length(lengths, batch_size, world_size, permute)

    size = batch_size * world_size
    batches: list[list[int]] = []
    rest: list[int] = []
    for members in (image, text):
        own = [abs(lengths[i]) for i in members]
        order = [members[i] for i in group_by_length(own, batch_size, world_size, permute)]
        cut = [order[i : i + size] for i in range(0, len(order), size)]
        batches += cut[:-1]
        rest += cut[-1]  # even when it is full, as in the original
    shuffled = [batches[int(i)] for i in permute(len(batches))]
    return [i for batch in [*shuffled, sorted(rest)] for i in batch]


def group_by_length(
    lengths: Sequence[int], batch_size: int, world_size: int, permute: Permute
) -> list[int]:
    """Shuffled, cut into batches of batch_size * world_size, each sorted and dealt to world_size parts."""
    size = batch_size * world_size
    order = [int(i) for i in permute(len(lengths))]
    out: list[int] = []
    for start in range(0, len(order), size):
        batch = sorted(order[start : start + size], key=lambda i: lengths[i], reverse=True)
        for part in split_to_even_chunks(batch, lengths, world_size):
            out += part
    return out


def split_to_even_chunks(
    indices: Sequence[int], lengths: Sequence[int], num_chunks: int
) -> list[list[int]]:
    """Deals `indices` to chunks of as many members and about the same total length.

    Each index goes to the chunk with the least total so far; a chunk that is full takes no more.
    Where the members cannot be dealt evenly, chunk k takes every num_chunks-th from k.
    """
    if len(indices) % num_chunks:
        return [list(indices[k::num_chunks]) for k in range(num_chunks)]
    members = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    totals: list[float] = [0] * num_chunks
    for index in indices:
        least = totals.index(min(totals))
        chunks[least].append(index)
        totals[least] += lengths[index]
        if len(chunks[least]) == members:
            totals[least] = float("inf")
    return chunks


def holdout(records: Sequence[dict], fraction: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """(training indices, indices kept aside): about `fraction` of the images, by a hash of their paths.

    All records of one image are on the same side, whatever else the data holds and in any order;
    a record without an image goes by its id. Raises ConfigError for a fraction outside 0..1.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"data.holdout {fraction} is not a fraction of 0 to below 1")
    kept: list[int] = []
    aside: list[int] = []
    for i, record in enumerate(records):
        image = record.get("image")
        first = image[0] if isinstance(image, (list, tuple)) and image else image
        (aside if _share(first or f"id:{record.get('id', i)}", seed) < fraction else kept).append(i)
    return kept, aside


def _share(key: object, seed: int) -> float:
    """A number of 0 to below 1 that depends on the key alone."""
    name = f"{seed}:{key}".encode(errors="surrogatepass")  # JSON can hold half a pair
    digest = hashlib.sha256(name).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
