"""A small sentencepiece vocabulary for a tiny language model, trained on its own training text.

It is built as Llama's is (BPE, byte fallback, a dummy leading space, no normalisation; <unk>, <s>
and </s> are 0, 1 and 2), so that the same tokenizer code reads both, and any text can be written in
it. Phrases that stand in every prompt become single tokens: a short sequence is what makes training
in minutes possible. They are ordinary BPE pieces, reached by a chain of merges (A B, then AB C, ...),
because tokenizers other than sentencepiece's own do not honour its user-defined symbols.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from llava_jax.errors import ConfigError

SPACE = "\u2581"  # how sentencepiece writes a space
_BASE = 3 + 256  # <unk>, <s>, </s> and the byte tokens
_COUNT_CAP = 20  # of one text: more would not change which words become whole


def train(
    texts: Iterable[str], path: str | Path, *, phrases: Iterable[str] = (), size: int = 640
) -> Path:
    """Trains on `texts` and writes the model to `path`, byte for byte the same for the same input.

    phrases: made single tokens where they follow a space, a newline or punctuation; a leading space
        belongs to the phrase.
    size: entries before the phrases are added; fewer where the text has no more pairs to merge.

    Raises ConfigError when `size` has no room for the characters of the text.
    """
    counts = Counter(line for text in texts for line in text.split("\n"))
    counts.update({line: _COUNT_CAP for phrase in phrases for line in phrase.split("\n") if line})
    characters = {c for text in counts for c in text} | {SPACE}
    if _BASE + len(characters) > size:
        raise ConfigError(
            f"a vocabulary of {size} is too small for the text's {len(characters)} characters"
        )
    model = _add_phrases(_train_bpe(counts, size), list(phrases))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model)
    return path


def _train_bpe(counts: Counter[str], size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
        sentence_iterator=_repeated(counts),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _repeated(counts: Counter[str]) -> Iterator[str]:
    for text, number in counts.items():
        yield from [text] * min(number, _COUNT_CAP)


def _add_phrases(model: bytes, phrases: list[str]) -> bytes:
    """The model with the newline and with the pieces by which each phrase merges into one token."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # pyright: ignore[reportAttributeAccessIssue]
    score = min(piece.score for piece in proto.pieces)
    known = {piece.piece for piece in proto.pieces}

    def add(piece: str):
        nonlocal score
        if piece not in known:
            score -= 1  # the pair with the highest score merges first: later pieces come last
            known.add(piece)
            proto.pieces.add(piece=piece, score=score)

    add("\n")
    proto.normalizer_spec.add_dummy_prefix = False  # the phrase as it stands inside a prompt
    for phrase in phrases:
        processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        parts = processor.encode(phrase, out_type=str)  # type: ignore[attr-defined]
        if "".join(parts) != phrase.replace(" ", SPACE):
            raise ConfigError(f"the phrase {phrase!r} has characters the text does not have")
        for end in range(2, len(parts) + 1):
            add("".join(parts[:end]))
    proto.normalizer_spec.add_dummy_prefix = True
    return proto.SerializeToString()
