"""The tokenizers of tests/text."""

from tests.text.conftest import im_tok, legacy_tok, model, tok  # noqa: F401
