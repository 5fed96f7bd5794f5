"""Whether a tokenizer and the rows of a model's vocabulary fit together."""

from __future__ import annotations

from pathlib import Path

from llava_jax.errors import ConfigError
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.tokenizer import Tokenizer

PADDING = ("<pad>", "[PAD]", "<PAD>")  # as people spell it; folders often name another one as well


def load_fitting(folder: Path | None, rows: int, where: str | Path) -> Tokenizer:
    """The tokenizer in `folder` for the model at `where`, whose vocabulary has `rows` rows.

    Raises ConfigError if there is no tokenizer, or it has tokens that the model lacks.
    """
    if folder is None:
        raise ConfigError(
            f"{where}: there is no tokenizer (tokenizer.model or tokenizer.json)",
            fix="copy the tokenizer files of its base model into the folder",
        )
    return fitted(Tokenizer.load(folder), rows, folder)


def fitted(tokenizer: Tokenizer, rows: int, where: str | Path = "the tokenizer") -> Tokenizer:
    """`tokenizer` for a model of `rows` rows, without those tokens past them that no text becomes.

    See `never_text`: transformers and the original run such a folder, and so do we, padding with
    `<unk>`. Raises ConfigError, naming them, for other tokens past the last row.
    """
    if len(tokenizer) <= rows:
        return tokenizer
    past = {token: id_ for token, id_ in tokenizer.added.items() if id_ >= rows}
    used = [token for token in past if not never_text(token, tokenizer.pad_token)]
    if tokenizer.vocab_size > rows or used:
        named = used[0] if used else tokenizer.token_text(rows)
        raise ConfigError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model {rows} rows: "
            f"none for {named!r}",
            fix="use the tokenizer of this model, or give the model rows for them",
        )
    added = {token: id_ for token, id_ in tokenizer.added.items() if token not in past}
    pad = tokenizer.unk_token if tokenizer.pad_token in past else None
    return tokenizer.with_added(added, pad_token=pad)


def never_text(token: str, pad: str | None) -> bool:
    """Whether a token never reaches the embedding: `<image>`, and padding, `pad` or by its spelling.

    Llama 2's `<pad>`, id 32000 of 32,000 rows, is one.
    """
    return token in (IMAGE_TAG, pad, *PADDING)
