"""Whether the tokens of a tokenizer fit the embedding rows of a model."""

from __future__ import annotations

from pathlib import Path

from llava_jax.errors import ConfigError
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.tokenizer import Tokenizer

PADDING = ("<pad>", "[PAD]", "<PAD>")  # usual spellings; a folder may name another pad token too


def load_fitting(folder: Path | None, rows: int, where: str | Path) -> Tokenizer:
    """The tokenizer in `folder` for the model at `where`, whose embedding has `rows` rows.

    Raises ConfigError if there is no tokenizer, and as `fitted` does.
    """
    if folder is None:
        raise ConfigError(
            f"{where}: there is no tokenizer (tokenizer.model or tokenizer.json)",
            fix="copy the tokenizer files of its base model into the folder",
        )
    return fitted(Tokenizer.load(folder), rows, folder)


def fitted(tokenizer: Tokenizer, rows: int, where: str | Path = "the tokenizer") -> Tokenizer:
    """`tokenizer` without the tokens beyond the last row that text never becomes (see `never_text`).

    transformers and the original run such a checkpoint, and so do we; we pad with `<unk>` then.
    Raises ConfigError for any other token beyond the last row, naming the first.
    """
    if len(tokenizer) <= rows:
        return tokenizer
    past = [token for token, id_ in tokenizer.added.items() if id_ >= rows]
    used = [token for token in past if not never_text(token, tokenizer.pad_token)]
    if tokenizer.vocab_size > rows or used:
        named = used[0] if used else tokenizer.token_text(rows)
        raise ConfigError(
            f"{where} has {len(tokenizer)} tokens, the model {rows} rows: none for {named!r}",
            fix="use the tokenizer of this model, or add rows to the model",
        )
    added = {token: id_ for token, id_ in tokenizer.added.items() if token not in past}
    pad = tokenizer.unk_token if tokenizer.pad_token in past else None
    return tokenizer.with_added(added, pad_token=pad)


def never_text(token: str, pad: str | None) -> bool:
    """Whether a token never reaches the embedding: `<image>`, `pad`, or another spelling of padding.

    An example is Llama 2's `<pad>`, whose id is 32000 where the model has 32,000 rows.
    """
    return token in (IMAGE_TAG, pad, *PADDING)
