"""The vocabulary's rows: which ones a format adds, which ones tokens or training need."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.convert import compose, configs
from llava_jax.convert.lazy import Leaf
from llava_jax.convert.source import Source
from llava_jax.errors import ConfigError, WeightError
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.tokenizer_files import AddedTokens, added_tokens
from llava_jax.text.vocabulary import fitted, never_text

log = logging.getLogger(__name__)

IMAGE, PAD = "<image>", "<pad>"  # what Hugging Face's format adds
# Rows that nobody trained lie at the mean of the others: exactly in our exports, 0.003 of the spread
# away in Hugging Face's converter, 0.00003 in transformers' resize_token_embeddings.
_UNTRAINED = 0.05


def tokens_of(source: Source) -> AddedTokens:
    """The tokens beside the sentencepiece model's; none without a tokenizer."""
    return added_tokens(source.tokenizer) if source.tokenizer else AddedTokens({}, (), None)


def check_tokens(source: Source) -> None:
    """Raises WeightError for a token that text can hold and the model has no row for."""
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

    def said(self) -> str:
        """The rows beyond the ordinary ones, in words."""
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
    data = (source.kept.get("hf") or {}).get("config") or {}
    if data:
        formal |= {configs.image_token(data), data.get("pad_token_id")}
    used = {t: n for t, n in tokens.ids.items() if start <= n < rows and n not in formal}
    free = [n for n in range(start, rows) if n not in formal and n not in used.values()]
    unnamed = tuple(n for n in _trained(source, start, free))
    last = max([start - 1, *used.values(), *unnamed])
    return Needed(last + 1, dict(sorted(used.items(), key=lambda item: item[1])), unnamed)


def _trained(source: Source, start: int, rows: list[int]) -> list[int]:
    """Those of `rows` whose embedding is neither the mean of the rows before `start` nor zero."""
    if not rows or not start:
        return []
    table = source.leaves[compose.EMBED].read()
    total, squares = np.zeros(table.shape[1]), 0.0
    for first in range(0, start, 1024):
        part = table[first : min(first + 1024, start)].astype(np.float64)
        total += part.sum(axis=0)
        squares += float(np.square(part).sum())
    mean = total / start
    spread = max(squares / start - float(mean @ mean), 0.0) ** 0.5
    far = np.linalg.norm(table[rows].astype(np.float64) - mean, axis=1) > _UNTRAINED * spread
    return [n for n, off in zip(rows, far) if off and table[n].any()]


def _ranges(numbers: tuple[int, ...]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][-1] == n - 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)


# With and without the tokens of Hugging Face's format --------------------------------------------


def hf_vocabulary(source: Source) -> tuple[LlavaConfig, dict[str, Leaf], int, int]:
    """(configuration, leaves, id of <image>, id of <pad>) with the two tokens in the vocabulary.

    Added behind the last token where they are not there yet, for transformers numbers added tokens
    without gaps: in rows that only pad the vocabulary, or in new ones. Those are the mean row, and
    the number of rows is rounded up to a multiple of 64, both as in Hugging Face's converter.
    """
    config, vocab = source.config, source.config.language.vocab_size
    kept = source.kept.get("hf")
    data: dict[str, Any] = kept["config"] if kept else {}
    text = data.get("text_config") or {}
    if kept and vocab in (text.get("vocab_size", 32000), data.get("vocab_size")):
        pad = data.get("pad_token_id", text.get("pad_token_id"))
        image_id = configs.image_token(data)
        return config, source.leaves, image_id, config.language.pad_id if pad is None else pad
    have = {t: n for t, n in tokens_of(source).ids.items() if t in (IMAGE, PAD) and n < vocab}
    ids, first = dict(have), min(_tokens(source), vocab)
    for token in (IMAGE, PAD):
        ids.setdefault(token, first + len(ids) - len(have))
    size = -(-max(vocab, *(n + 1 for n in ids.values())) // 64) * 64
    language = replace(config.language, vocab_size=size, pad_id=ids[PAD])
    leaves = compose.grown(source.leaves, vocab, size)
    return replace(config, language=language), leaves, ids[IMAGE], ids[PAD]


def _tokens(source: Source) -> int:
    """One more than the highest id of the tokenizer; without one, the number of rows."""
    rows = source.config.language.vocab_size
    if source.tokenizer is None:
        return rows
    try:
        return len(fitted(Tokenizer.load(source.tokenizer), rows))
    except ConfigError:  # who writes its files says what is wrong
        return rows


def original_vocabulary(source: Source) -> int:
    """Rows of the vocabulary without those that Hugging Face's format adds behind it.

    Where a fine-tune has tokens or trained rows behind <image>, everything up to them stays.
    """
    vocab, kept = source.config.language.vocab_size, source.kept.get("hf")
    image_id = configs.image_token(kept["config"]) if kept else vocab
    # Two tokens, rounded up to a multiple of 64; an <image> further down is one of the model's own.
    if type(image_id) is not int or not 0 < vocab - image_id <= 128:
        return vocab
    needed = needed_rows(source, image_id)
    if needed.rows > image_id:
        log.info("rows behind <image> that stay: %s", needed.said())
    # Rows that padded the original's vocabulary, under the two tokens since, are its own again.
    before = ((source.kept.get("original") or {}).get("config") or {}).get("vocab_size")
    before = before if type(before) is int and before <= vocab else 0
    return max(needed.rows, before)


def original_rows(source: Source) -> Source:
    """`source` without the vocabulary rows that Hugging Face's format had added."""
    size = original_vocabulary(source)
    if size == source.config.language.vocab_size:
        return source
    language = source.config.language
    pad = language.pad_id if language.pad_id < size else 0
    config = replace(source.config, language=replace(language, vocab_size=size, pad_id=pad))
    kept = {k: v for k, v in source.kept.items() if k != "hf"}
    return replace(source, config=config, leaves=compose.cut(source.leaves, size), kept=kept)
