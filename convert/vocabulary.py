"""The vocabulary's rows: which ones a format adds, which ones tokens or training need."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.convert.source import Source
from llava_jax.convert.table import configs
from llava_jax.errors import ConfigError, WeightError
from llava_jax.reader import Reader
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.tokenizer_files import AddedTokens, added_tokens
from llava_jax.text.vocabulary import fitted, never_text

log = logging.getLogger(__name__)

EMBED, HEAD = "language.embed.embedding", "language.head.kernel"
IMAGE, PAD = "<image>", "<pad>"  # what Hugging Face's format adds
# Rows that nobody trained lie at the mean of the others: exactly in our exports, 0.003 of the spread
# away in Hugging Face's converter, 0.00003 in transformers' resize_token_embeddings.
_UNTRAINED = 0.05


def tokens_of(source: Source) -> AddedTokens:
    """The tokens beside the sentencepiece model's; none without a tokenizer."""
    return added_tokens(source.tokenizer) if source.tokenizer else AddedTokens({}, (), None)


def check_tokens(source: Source) -> None:
    """Raises WeightError for a token that can occur in text and that the model has no row for."""
    rows, tokens = source.config.language.vocab_size, tokens_of(source)
    for token, number in tokens.ids.items():
        if number >= rows and not never_text(token, tokens.pad):
            raise WeightError(
                f"{source.tokenizer}: {token!r} is token {number}, the model has {rows} rows",
                fix="use the tokenizer of this model, or give the model rows for it",
            )


@dataclass(frozen=True)
class Needed:
    """How many rows of a vocabulary are needed: `rows`, for `tokens` (and trained rows without one)."""

    rows: int
    tokens: dict[str, int]
    unnamed: tuple[int, ...]

    def text(self) -> str:
        """The rows beyond the ordinary ones, as a phrase."""
        named = ", ".join(f"{t} ({n})" for t, n in self.tokens.items())
        bare = f"trained rows without a token ({_ranges(self.unnamed)})" if self.unnamed else ""
        return ", ".join(part for part in (named, bare) if part)


def needed_rows(source: Source, start: int) -> Needed:
    """The rows that must stay if those from `start` on are to go.

    Needed are the tokens other than <image> and the padding token, and rows without a token that
    were trained: their embedding lies off the mean of the rows before `start`.
    """
    rows, tokens = source.config.language.vocab_size, tokens_of(source)
    formal = {n for t, n in tokens.ids.items() if never_text(t, tokens.pad)}
    data = (source.metadata.get("hf") or {}).get("config") or {}
    if data:
        formal |= {
            configs.image_token(data),
            Reader(data, "config.json").integer("pad_token_id", -1, -1),
        }
    used = {t: n for t, n in tokens.ids.items() if start <= n < rows and n not in formal}
    free = [n for n in range(start, rows) if n not in formal and n not in used.values()]
    unnamed = tuple(_trained(source, start, free))
    last = max([start - 1, *used.values(), *unnamed])
    return Needed(last + 1, dict(sorted(used.items(), key=lambda item: item[1])), unnamed)


def _trained(source: Source, start: int, rows: list[int]) -> list[int]:
    """Those of `rows` whose embedding is neither the mean of the rows before `start` nor zero."""
    if not rows or not start:
        return []
    table = source.leaves[EMBED].read()
    mean = sum((p.sum(axis=0) for p in _blocks(table, start)), np.zeros(table.shape[1])) / start
    square = sum(float(np.square(part).sum()) for part in _blocks(table, start)) / start
    spread = max(square - float(mean @ mean), 0.0) ** 0.5
    far = np.linalg.norm(table[rows].astype(np.float64) - mean, axis=1) > _UNTRAINED * spread
    return [n for n, off in zip(rows, far) if off and table[n].any()]


def _blocks(table: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """The first `count` rows in float64, 1024 at a time: a table whole in float64 is a gigabyte."""
    for first in range(0, count, 1024):
        yield table[first : min(first + 1024, count)].astype(np.float64)


def _ranges(numbers: tuple[int, ...]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs = groupby(enumerate(numbers), key=lambda item: item[1] - item[0])
    parts = [[n for _, n in run] for _, run in runs]
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


# With and without the tokens of Hugging Face's format ---------------------------------------------


def hf_vocabulary(source: Source) -> tuple[LlavaConfig, dict[str, Leaf], int, int]:
    """(configuration, leaves, id of <image>, id of <pad>) with the two tokens in the vocabulary.

    Missing ones are added after the last token, because transformers numbers added tokens without
    gaps: in rows that only pad the vocabulary, or in new ones. Those are the mean row, and the number
    of rows is rounded up to a multiple of 64, both as in Hugging Face's converter.
    """
    config, vocab = source.config, source.config.language.vocab_size
    read = source.metadata.get("hf")
    data: dict[str, Any] = read["config"] if read else {}
    text = Reader(data, "config.json").object("text_config")
    if read and vocab in (text.get("vocab_size", 32000), data.get("vocab_size")):
        pad = Reader({"pad_token_id": text.get("pad_token_id"), **data}, "config.json")
        pad_id = pad.integer("pad_token_id", config.language.pad_id, low=-1)
        return config, source.leaves, configs.image_token(data), pad_id
    have = {t: n for t, n in tokens_of(source).ids.items() if t in (IMAGE, PAD) and n < vocab}
    ids, first = dict(have), min(_tokens(source), vocab)
    for token in (IMAGE, PAD):
        ids.setdefault(token, first + len(ids) - len(have))
    size = -(-max(vocab, *(n + 1 for n in ids.values())) // 64) * 64
    language = replace(config.language, vocab_size=size, pad_id=ids[PAD])
    leaves = grown(source.leaves, vocab, size)
    return replace(config, language=language), leaves, ids[IMAGE], ids[PAD]


def _tokens(source: Source) -> int:
    """One more than the highest id of the tokenizer; without one, the number of rows."""
    rows = source.config.language.vocab_size
    if source.tokenizer is None:
        return rows
    try:
        return len(fitted(Tokenizer.load(source.tokenizer), rows))
    except ConfigError:  # the writer of its files reports what is wrong
        return rows


def original_vocabulary(source: Source) -> int:
    """Rows of the vocabulary without those that Hugging Face's format adds at its end.

    Where a fine-tune has tokens or trained rows after <image>, everything up to them stays.
    """
    vocab, read = source.config.language.vocab_size, source.metadata.get("hf")
    image_id = configs.image_token(read["config"]) if read else vocab
    # Two tokens, rounded up to a multiple of 64; an <image> further down is one of the model's own.
    if not 0 < vocab - image_id <= 128:
        return vocab
    needed = needed_rows(source, image_id)
    if needed.rows > image_id:
        log.info("rows after <image> that stay: %s", needed.text())
    # Rows that padded the original's vocabulary, under the two tokens since, are its own again.
    before = ((source.metadata.get("original") or {}).get("config") or {}).get("vocab_size")
    before = before if type(before) is int and before <= vocab else 0
    return max(needed.rows, before)


def original_rows(source: Source) -> Source:
    """`source` without the vocabulary rows that Hugging Face's format had added."""
    return with_rows(source, original_vocabulary(source))


def with_rows(source: Source, size: int) -> Source:
    """`source` with the first `size` rows of its vocabulary.

    The files of Hugging Face's format, which no longer describe it, go.
    """
    language = source.config.language
    if size == language.vocab_size:
        return source
    pad = language.pad_id if language.pad_id < size else 0
    config = replace(source.config, language=replace(language, vocab_size=size, pad_id=pad))
    metadata = {k: v for k, v in source.metadata.items() if k != "hf"}
    return replace(source, config=config, leaves=cut(source.leaves, size), metadata=metadata)


# Rows ---------------------------------------------------------------------------------------------


def grown(leaves: dict[str, Leaf], old: int, new: int) -> dict[str, Leaf]:
    """Embedding and head with `new` instead of `old` tokens; the added ones are the mean of the rest.

    A mean row of the head gives the mean logit, which greedy decoding never picks.
    """
    leaves = dict(leaves)
    for name, axis in ((EMBED, 0), (HEAD, 1)):
        if name in leaves and new > old:
            leaves[name] = leaves[name].map(lambda p, axis=axis: _grown(p, axis, old, new))
    return leaves


def _grown(lazy: Lazy, axis: int, old: int, new: int) -> Lazy:
    def read() -> np.ndarray:
        array = lazy.read()
        # float64 in one fixed order: the same bytes on every run.
        table = array if axis == 0 else array.T
        mean = sum((p.sum(axis=0) for p in _blocks(table, old)), np.zeros(table.shape[1])) / old
        row = np.expand_dims(mean.astype(np.float32).astype(lazy.dtype), axis)
        return np.concatenate([array, row.repeat(new - old, axis)], axis)

    shape = list(lazy.shape)
    shape[axis] = new
    return Lazy(tuple(shape), lazy.dtype, read, lazy.origin)


def cut(leaves: dict[str, Leaf], size: int) -> dict[str, Leaf]:
    """Embedding and head of the first `size` tokens."""
    leaves = dict(leaves)
    leaves[EMBED] = leaves[EMBED].map(lambda p: p.map(lambda a: a[:size], (size, *p.shape[1:])))
    if HEAD in leaves:
        leaves[HEAD] = leaves[HEAD].map(lambda p: p.map(lambda a: a[:, :size], (p.shape[0], size)))
    return leaves
