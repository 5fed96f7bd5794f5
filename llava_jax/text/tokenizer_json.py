"""tokenizer.json, the form of the tokenizers library, read as the sentencepiece model it was made from.

Folders that transformers 5 saves hold no tokenizer.model. LLaMA's tokenizer.json holds the same
pieces, and merges in the order of their scores: for such files, and only for them, a sentencepiece
model can be built that gives the same ids. Any other file is refused, and the reason named.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.reader import Reader, is_id, is_text, shown

FILE = "tokenizer.json"
SPACE = "▁"
# sentencepiece_model.proto, ModelProto.SentencePiece.Type
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


@dataclass(frozen=True)
class Converted:
    """A tokenizer.json as the arguments of Tokenizer.

    model: bytes of the sentencepiece model. legacy, own_space: see Tokenizer. unk_token: its name.
    around: what the file puts around a text, `$A`; Tokenizer always has the BOS token in front.
    """

    model: bytes
    legacy: bool
    own_space: str
    unk_token: str
    around: tuple[str, ...]


def convert(data: Mapping[str, Any], where: Path, unk_token: str | None = None) -> Converted:
    """The sentencepiece model of a LLaMA-like tokenizer.json.

    data: the parsed file. unk_token: the name that tokenizer_config.json gives.
    Raises ConfigError, naming `where` and the part, for any other kind of tokenizer.
    """
    legacy, own_space = pipeline(data, where)
    model = data.get("model")
    if not isinstance(model, Mapping):
        raise _refused(where, "there is no model")
    if model.get("type", "BPE") != "BPE":
        raise _refused(where, f"model is {model['type']!r}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(key):
            raise _refused(where, f"model.{key} is {model[key]!r}")
    vocab, unknown = _vocab(model, where), model.get("unk_token") or unk_token or "<unk>"
    if not isinstance(unknown, str) or unknown not in vocab:
        raise _refused(where, f"the vocabulary has no {unknown!r}")
    scores = _scores(model.get("merges"), vocab, where)
    added = {t["content"] for t in added_tokens(data, where)}

    def kind(piece: str) -> int:
        if piece == unknown:
            return UNKNOWN
        if piece in _BYTES:
            return BYTE
        # Text never becomes these: no merge makes them, and no character is one.
        never = piece in added or (len(piece) > 1 and piece not in scores)
        return CONTROL if never else NORMAL

    last = -float(len(scores) + 1)
    ordered = sorted(vocab, key=vocab.__getitem__)
    pieces = [(piece, scores.get(piece, last), kind(piece)) for piece in ordered]
    proto = _model_proto(pieces, vocab[unknown])
    return Converted(proto, legacy, own_space, unknown, tuple(_around(data, where)))


def added_tokens(data: Mapping[str, Any], where: Path) -> list[dict[str, Any]]:
    """The file's added tokens: {"content", "id", "special", ...}. Raises ConfigError if malformed."""
    found = data.get("added_tokens") or []
    for token in found if isinstance(found, list) else [None]:
        entry = token if isinstance(token, dict) else {}
        content = entry.get("content")
        if not content or not is_text(content) or not is_id(entry.get("id")):
            raise ConfigError(f"{where}: an entry of added_tokens is not a token with its id")
    return found


def _around(data: Mapping[str, Any], where: Path) -> list[str]:
    """What the post-processor puts around a text, `$A`: ["<s>", "$A"] in LLaMA's."""
    processor = Reader(data, str(where), ConfigError).object("post_processor")
    found = []
    for step in Reader(processor, f"{where}: post_processor", ConfigError).list("single"):
        special = step.get("SpecialToken", {}) if isinstance(step, dict) else None
        if not isinstance(special, dict) or (special and not is_text(special.get("id"))):
            raise _refused(where, f"post_processor.single has a step {shown(step)}")
        found.append(special["id"] if special else "$A")
    return found or ["$A"]


def pipeline(data: Mapping[str, Any], where: Path) -> tuple[bool, str]:
    """(legacy, own_space): what the normalizer and pre-tokenizer do to spaces; see Tokenizer.

    Known are: Prepend + Replace (transformers 4), Metaspace (transformers 5), and the pair of
    Metaspaces that our own exports have. Raises ConfigError for anything else.
    """
    found = tuple(
        tuple(_known_step(step, where, part) for step in _steps(data, part, listed, where))
        for part, listed in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers"))
    )
    if found not in _PIPELINES:
        steps = ", ".join(step for part in found for step in part) or "none"
        raise _refused(where, f"its treatment of spaces ({steps}) is not LLaMA's")
    return _PIPELINES[found]


_PREPEND, _REPLACE = "Prepend", "Replace"
_PIPELINES = {
    ((_PREPEND, _REPLACE), ()): (True, "slow"),
    ((_REPLACE,), ("Metaspace first ' '", f"Metaspace never {SPACE!r}")): (False, "first"),
    ((), (f"Metaspace first {SPACE!r}",)): (False, "metaspace"),
    ((_REPLACE,), (f"Metaspace first {SPACE!r}",)): (False, "metaspace"),
    ((), (f"Metaspace never {SPACE!r}",)): (False, "never"),
    ((_REPLACE,), ()): (False, "never"),
    ((_REPLACE,), (f"Metaspace never {SPACE!r}",)): (False, "never"),
}


def _steps(data: Mapping[str, Any], part: str, key: str, where: Path) -> list[dict[str, Any]]:
    found = Reader(data, str(where), ConfigError).object(part)
    if found.get("type") != "Sequence":
        return [found] if found else []
    steps = Reader(found, f"{where}: {part}", ConfigError).list(key)
    for step in steps:
        if not isinstance(step, dict):
            raise _refused(where, f"{part} has a step {shown(step)}")
    return steps


def _known_step(step: Mapping[str, Any], where: Path, part: str) -> str:
    """One step in a word; Metaspace with its scheme and mark."""
    kind = step.get("type")
    if kind == "Prepend" and step.get("prepend") == SPACE:
        return _PREPEND
    if kind == "Replace" and (step.get("pattern"), step.get("content")) == ({"String": " "}, SPACE):
        return _REPLACE
    if kind == "Metaspace" and not step.get("split", True):
        first = "first" if step.get("add_prefix_space") else "never"
        return f"Metaspace {step.get('prepend_scheme') or first} {step.get('replacement')!r}"
    raise _refused(where, f"its {part} {kind} is not LLaMA's")


def _vocab(model: Mapping[str, Any], where: Path) -> dict[str, int]:
    vocab = model.get("vocab")
    numbers: list[Any] = list(vocab.values()) if isinstance(vocab, dict) else [None]
    if not all(map(is_id, numbers)) or sorted(numbers) != list(range(len(numbers))):
        raise _refused(where, "model.vocab does not number its tokens from 0 on without gaps")
    vocab = dict(vocab or {})
    if not all(map(is_text, vocab)):
        raise _refused(where, "model.vocab has a token that is not a string")
    if not model.get("byte_fallback") or any(byte not in vocab for byte in _BYTES):
        raise _refused(where, "model.byte_fallback is off, or the vocabulary lacks bytes")
    return vocab


def _scores(merges: Any, vocab: Mapping[str, int], where: Path) -> dict[str, float]:
    """{piece: score}: minus the place of its merges in the file.

    sentencepiece merges any two neighbours that form a piece, best score first; so all pairs that
    form a piece must be listed, with no pair of another piece between them.
    """
    if not isinstance(merges, list):
        raise _refused(where, "model.merges is not a list")
    for merge in merges:
        if not isinstance(merge, str | list) or not all(isinstance(m, str) for m in merge):
            raise _refused(where, f"model.merges has {shown(merge)}")
    pairs = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in merges]
    if any(len(pair) != 2 or "".join(pair) not in vocab for pair in pairs):
        raise _refused(where, "model.merges has a pair that makes no token")
    scores: dict[str, float] = {}
    for piece, group in groupby(pairs, key="".join):
        ways = {(piece[:k], piece[k:]) for k in range(1, len(piece))}
        ways = {(a, b) for a, b in ways if a in vocab and b in vocab}
        if piece in scores or set(group) != ways:
            raise _refused(where, f"the merges of {piece!r} are not those of a sentencepiece model")
        scores[piece] = -float(len(scores))
    return scores


def _refused(where: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{where}: {why}", fix="copy tokenizer.model of the base model into the folder"
    )


# protobuf, written by hand: it spares the runtime -------------------------


def _model_proto(pieces: Iterable[tuple[str, float, int]], unk_id: int) -> bytes:
    """A serialized ModelProto: BPE with byte fallback, text taken as it is."""
    entries = [
        _field(1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for piece, score, kind in pieces
    ]
    trainer = _number(3, 2) + _number(4, len(entries)) + _number(35, 1) + _number(40, unk_id)
    normalizer = _field(1, b"identity") + _number(3, 1) + _number(4, 0) + _number(5, 1)
    return b"".join(entries) + _field(2, trainer) + _field(3, normalizer)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)
