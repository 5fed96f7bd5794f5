"""Text to LLaMA token ids and back, on the sentencepiece model itself.

Equal to the slow LlamaTokenizer of transformers 4.37.2, which the original was trained and is run
with; the tokenizers of transformers 5 give other ids for double spaces and leading spaces.

Text is *plain* unless a caller says otherwise: `</s>` or `<image>` typed by a user become ordinary
characters. What is special comes as structure: a prompt is a list of parts, each a plain string, a
token id, or IMAGE_TOKEN. `split_markup` makes such parts from text that is trusted to hold tags.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from llava_jax.errors import ConfigError, PromptError
from llava_jax.text.constants import IMAGE_TAG, IMAGE_TOKEN

SPACE = "▁"  # how sentencepiece writes a space inside its pieces

# A serialized ModelProto with this after it has normalizer_spec.add_dummy_prefix = false: protobuf
# merges a field that comes twice. It spares a dependency on the protobuf runtime.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"

Part = str | int
"""Plain text, or one token id (a special token, or IMAGE_TOKEN for an image slot)."""


class Tokenizer:
    """A LLaMA tokenizer.

    model: the bytes of a sentencepiece `tokenizer.model`.
    legacy: how text after a special token is cut. False: as if the text simply went on (`USER`
        after `</s>` is one token). True: every stretch starts with a space of its own (`▁US ER`).
        Vicuna v1.5 says False in its tokenizer_config.json.
    own_space: with legacy False, the space that the tokenizer puts in front of a prompt. "slow": as
        the slow LlamaTokenizer does it. The others are tokenizer.json's (see `tokenizer_json`):
        "first": unless a special token begins; "metaspace": nor where a space does; "never".
    added: tokens beyond the model's own vocabulary, text -> id, such as {"<im_start>": 32000}.
    pad_token: the padding token; the original pads with `<unk>` except for version v0.
    plain_added: those of `added` that are not special, that is, stay in a `skip_special` decode.

    Raises ConfigError if the model cannot be read or lacks one of the three basic tokens.
    """

    def __init__(
        self,
        model: bytes,
        *,
        legacy: bool = False,
        added: Mapping[str, int] | None = None,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str | None = None,
        plain_added: Iterable[str] = (),
        own_space: str = "slow",
    ):
        self.model, self.legacy, self.own_space = model, legacy, own_space
        self._sp = sentencepiece_model(model if legacy else model + NO_DUMMY_PREFIX)
        self.vocab_size: int = self._sp.get_piece_size()
        self.bos_token, self.eos_token, self.unk_token = bos_token, eos_token, unk_token
        self.added = {
            token: id_
            for token, id_ in (added or {}).items()
            # folders list the three basic tokens again, although the model has them
            if token not in (bos_token, eos_token, unk_token) or self._piece_id(token) != id_
        }
        self.pad_token = pad_token or unk_token
        self.bos_id = self._named_id(bos_token)
        self.eos_id = self._named_id(eos_token)
        self.unk_id = self._named_id(unk_token)
        self.pad_id = self._named_id(self.pad_token)
        self.plain_added = frozenset(plain_added)

        named = (bos_token, eos_token, unk_token, self.pad_token)
        special = dict.fromkeys(named) | dict.fromkeys(self.added)
        self.special_tokens: dict[str, int] = {
            token: self._named_id(token) for token in special if token not in self.plain_added
        }
        self._special_ids = frozenset(self.special_tokens.values())
        self._added_text = {id_: token for token, id_ in self.added.items()}
        # transformers sets such tokens off with spaces when it decodes; the named four it does not
        self._set_off = frozenset(
            id_
            for token, id_ in self.added.items()
            if token in self.plain_added or (token not in named and id_ >= self.vocab_size)
        )
        self._unk_length = len(self._sp.encode(unk_token))
        self._markup = _alternatives([*self.special_tokens, *self.added])
        self._markup_or_image = _alternatives([*self.special_tokens, *self.added, IMAGE_TAG])

    @property
    def digest(self) -> str:
        """A digest of everything the ids depend on."""
        named = [self.bos_token, self.eos_token, self.unk_token, self.pad_token]
        facts = [self.legacy, self.own_space, self.added, named, sorted(self.plain_added)]
        return hashlib.sha256(self.model + json.dumps(facts, sort_keys=True).encode()).hexdigest()

    # Making one ----------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path, *, legacy: bool | None = None) -> Tokenizer:
        """Reads a checkpoint folder with tokenizer.model, or that file alone.

        legacy: overrides the folder's own setting (see `tokenizer_files.read_tokenizer`).
        Raises ConfigError if there is no readable sentencepiece model.
        """
        from llava_jax.text.tokenizer_files import read_tokenizer

        return read_tokenizer(Path(path), legacy=legacy)

    def save(self, folder: str | Path, **extra) -> None:
        """Writes the tokenizer files that transformers 4 and 5 read; `extra` goes to the config."""
        from llava_jax.text.tokenizer_files import write_tokenizer

        write_tokenizer(self, Path(folder), extra)

    def with_tokens(self, tokens: Sequence[str], *, pad_token: str | None = None) -> Tokenizer:
        """The same tokenizer with further special tokens, numbered from len(self)."""
        added = dict(self.added)
        for token in tokens:
            if self._lookup(token) is None and token not in added:
                added[token] = max([len(self) - 1, *added.values()]) + 1
        return self.with_added(added, pad_token=pad_token)

    def with_added(self, added: Mapping[str, int], *, pad_token: str | None = None) -> Tokenizer:
        """The same tokenizer with `added` in place of its added tokens."""
        return Tokenizer(
            self.model,
            legacy=self.legacy,
            added=added,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            unk_token=self.unk_token,
            pad_token=pad_token or self.pad_token,
            plain_added=self.plain_added,
            own_space=self.own_space,
        )

    def __len__(self) -> int:
        """One more than the highest id: the embedding rows a model needs for this tokenizer."""
        return max([self.vocab_size - 1, *self.added.values()]) + 1

    # Text to ids ---------------------------------------------------------------------------------

    def encode(self, text: str, *, add_bos: bool = True, markup: bool = False) -> list[int]:
        """Ids of `text`. With `markup`, special tokens written in it become those tokens.

        `<image>` is plain text in both cases; see `split_markup(image_tags=True)` for image slots.
        """
        parts = self.split_markup(text) if markup else [text]
        return self.encode_parts(parts, add_bos=add_bos)

    def encode_parts(self, parts: Iterable[Part], *, add_bos: bool = True) -> list[int]:
        """Ids of a prompt given in parts; adjacent strings are tokenised as one text.

        As in the original, text is cut at image slots and each piece between them starts anew,
        with a space in front ("tokenizer_image_token" of llava/mm_utils.py).
        """
        return self.align_parts(parts, add_bos=add_bos)[0]

    def align_parts(
        self, parts: Iterable[Part], *, add_bos: bool = True
    ) -> tuple[list[int], list[int]]:
        """`encode_parts`, and for every id the index of the part its first character is from.

        The owner of BOS is -1. A space that the tokenizer itself puts in front of a piece of text
        belongs to the part that follows it.
        """
        ids, owners = ([self.bos_id], [-1]) if add_bos else ([], [])
        parts = list(parts)
        slots = [i for i, part in enumerate(parts) if part == IMAGE_TOKEN]
        start = 0
        for end in (*slots, len(parts)):
            for new_ids, new_owners in self._encode_between(parts, start, end):
                ids += new_ids
                owners += new_owners
            if end < len(parts):
                ids.append(IMAGE_TOKEN)
                owners.append(end)
            start = end + 1
        return ids, owners

    def split_markup(self, text: str, *, image_tags: bool = False) -> list[Part]:
        """Cuts trusted text at the special tokens (and `<image>` tags) written in it."""
        pattern = self._markup_or_image if image_tags else self._markup
        parts: list[Part] = []
        for i, piece in enumerate(pattern.split(text)):
            if i % 2 == 0:
                parts += [piece] if piece else []
            else:
                is_image = image_tags and piece == IMAGE_TAG
                parts.append(IMAGE_TOKEN if is_image else self._named_id(piece))
        return parts

    def _encode_between(
        self, parts: list[Part], start: int, end: int
    ) -> Iterator[tuple[list[int], list[int]]]:
        """(ids, owners) of each run in parts[start:end], which stand between two image slots."""
        runs = _runs(parts, start, end)
        slow = self.own_space == "slow"
        if slow and not self.legacy and runs and not isinstance(runs[0].text, str):
            runs.insert(0, _Run("", [0], [start]))
        for i, (text, begins, indices) in enumerate(runs):
            if not isinstance(text, str):
                yield [text], indices
                continue
            pad = 0
            if not self.legacy:
                text = text.replace(SPACE, " ")
                pad = int(i == 0 and self._has_own_space(text))
            ids, at = self._encode_run(SPACE * pad + text, pad)
            # a lone space in front of a special token is dropped, at the start only
            after = runs[i + 1].text if i + 1 < len(runs) else None
            if pad and after in self._special_ids and self._sp.id_to_piece(ids) == [SPACE]:
                continue
            yield ids, [indices[max(bisect.bisect_right(begins, a) - 1, 0)] for a in at]

    def _has_own_space(self, text: str) -> bool:
        """Whether a space is put in front of a prompt that begins with `text`."""
        if self.own_space == "metaspace":
            return not text.startswith(" ")
        return self.own_space != "never"

    def _encode_run(self, text: str, pad: int) -> tuple[list[int], list[int]]:
        """Ids of one run, and where each begins in the run without its first `pad` characters."""
        text = _repair(text)
        after_unk = not self.legacy and text.startswith((SPACE, " "))
        if after_unk:  # else sentencepiece merges or drops the spaces in front
            text = self.unk_token + text
            pad += len(self.unk_token)
        cut = self._unk_length if after_unk else 0
        ids, begins = _encode_with_begins(self._sp, text)
        return ids[cut:], [begin - pad for begin in begins[cut:]]

    # Ids to text ---------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`. Ids beyond the vocabulary have no text; image slots read `<image>`.

        Raises PromptError for a negative id other than IMAGE_TOKEN.
        """
        chunks: list[list[int]] = [[]]
        for id_ in map(int, ids):
            if id_ == IMAGE_TOKEN:
                chunks.append([])
            elif id_ < 0:
                raise PromptError(f"{id_} is not a token id")
            elif not (skip_special and self.is_skipped(id_)) and self._exists(id_):
                chunks[-1].append(id_)
        return IMAGE_TAG.join(map(self._decode_chunk, chunks))

    def _decode_chunk(self, ids: list[int]) -> str:
        texts: list[str] = []
        start = 0
        for i, id_ in enumerate(ids):
            if id_ in self._set_off:
                before = self._decode_run(ids[start:i])
                texts += [before, self._added_text[id_]] if before else [self._added_text[id_]]
                start = i + 1
        if start < len(ids):  # may be an empty text, and still gets its space
            texts.append(self._decode_run(ids[start:]))
        return " ".join(texts)

    def is_skipped(self, id_: int) -> bool:
        """Whether a `skip_special` decode leaves this id out."""
        return id_ in self._special_ids or not self._exists(id_)

    def _exists(self, id_: int) -> bool:
        return id_ < self.vocab_size or id_ in self._added_text

    def byte_value(self, id_: int) -> int | None:
        """The byte an id stands for, if it is one of those that spell characters without a token."""
        if 0 <= id_ < self.vocab_size and self._sp.is_byte(id_):
            return int(self._sp.id_to_piece(id_)[1:-1], 16)
        return None

    def is_word(self, id_: int) -> bool:
        """Whether an id is an ordinary piece of text: not special, added, unknown, or a byte."""
        return (
            0 <= id_ < self.vocab_size
            and id_ not in self._special_ids
            and id_ not in self._set_off
            and not (self._sp.is_byte(id_) or self._sp.is_control(id_) or self._sp.is_unknown(id_))
        )

    def _decode_run(self, ids: list[int]) -> str:
        text, words, after_special = "", [], False
        for i, id_ in enumerate(ids):
            token = self._token(id_)
            if id_ in self._special_ids:
                if self.legacy and i and not after_special:
                    text += " "
                text += self._join(words) + token
                words, after_special = [], True
            else:
                words.append(token if i else self._without_own_space(token))
                after_special = False
        return text + self._join(words)

    def _without_own_space(self, token: str) -> str:
        """The first piece of a text: its space is the tokenizer's own, not the text's."""
        rest = token.removeprefix(SPACE)
        # sentencepiece copies a string that is not a piece, with the marks for spaces inside it
        return rest if self._piece_id(rest) is not None else rest.replace(SPACE, " ")

    def _join(self, pieces: list[str]) -> str:
        return self._sp.decode(pieces) if pieces else ""

    def _token(self, id_: int) -> str:
        added = self._added_text.get(id_)
        return added if added is not None else self._sp.id_to_piece(id_)

    def token_text(self, id_: int) -> str:
        """The piece of an id, as the vocabulary writes it (`▁cat`, `<0x0A>`, `</s>`)."""
        if id_ == IMAGE_TOKEN:
            return IMAGE_TAG
        if not 0 <= id_ < len(self):
            raise PromptError(f"{id_} is not a token id")
        return self._token(id_) if self._exists(id_) else ""

    # Names ---------------------------------------------------------------------------------------

    def _lookup(self, token: str) -> int | None:
        return self.added[token] if token in self.added else self._piece_id(token)

    def _piece_id(self, token: str) -> int | None:
        id_ = self._sp.piece_to_id(token)
        return id_ if id_ >= 0 and self._sp.id_to_piece(id_) == token else None

    def _named_id(self, token: str) -> int:
        id_ = self._lookup(token)
        if id_ is None:
            raise ConfigError(
                f"tokenizer: {token!r} is neither in the sentencepiece model nor among the added tokens"
            )
        return id_


def sentencepiece_model(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Parses the bytes of a tokenizer.model. Raises ConfigError if they are not one."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        if not model:  # which sentencepiece takes
            raise ValueError
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, TypeError, ValueError) as e:
        raise ConfigError("tokenizer: not a sentencepiece model") from e
    return processor


def _encode_with_begins(processor, text: str) -> tuple[list[int], list[int]]:
    """Ids, and the character of `text` at which each begins."""
    if hasattr(processor, "EncodeAsOffsetMapping"):
        found = processor.EncodeAsOffsetMapping(text)
        return found["ids"], [begin for begin, _ in found["offsets"]]
    pieces = processor.encode(text, out_type="immutable_proto").pieces  # sentencepiece <= 0.2.1
    return [p.id for p in pieces], [p.begin for p in pieces]


def _alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(tokens), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


class _Run(NamedTuple):
    """Text of adjacent parts, or one token id."""

    text: Part
    begins: list[int]  # where in the text each of its parts begins
    indices: list[int]  # of those parts


def _runs(parts: list[Part], start: int, end: int) -> list[_Run]:
    """parts[start:end] with adjacent strings joined."""
    runs: list[_Run] = []
    for index in range(start, end):
        part, before = parts[index], runs[-1].text if runs else None
        if part == "":
            continue
        if isinstance(part, str) and isinstance(before, str):
            _, begins, indices = runs[-1]
            runs[-1] = _Run(before + part, [*begins, len(before)], [*indices, index])
        else:
            runs.append(_Run(part, [0], [index]))
    return runs


def _repair(text: str) -> str:
    """Lone surrogates, which JSON can hold but UTF-8 cannot, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
