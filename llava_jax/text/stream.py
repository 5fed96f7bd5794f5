"""Text of a growing answer, piece by piece, without ever showing half a character."""

from __future__ import annotations

from llava_jax.text.tokenizer import SPACE, Tokenizer

_WINDOW = 32  # ids decoded again for every new one, at most about twice that


class StreamDecoder:
    """Turns ids into text as they come: joined, the pieces equal `decode` with `skip_special`.

    Text is held back while its last bytes may be the start of a longer UTF-8 character. (Special
    tokens cannot be shown: with `legacy`, one of them changes the text in front of it.)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of decode(self._ids) that were given out

    def push(self, *ids: int) -> str:
        """The text that `ids` add; may be empty."""
        # skipped ones must not stand between two bytes of one character
        self._ids += [i for i in ids if not self._tokenizer.is_skipped(i)]
        held = _unfinished_bytes(self._tokenizer, self._ids)
        text = self._take(len(self._ids) - held)
        if not held and len(self._ids) > 2 * _WINDOW:
            self._forget()
        return text

    def flush(self) -> str:
        """What is still held back, at the end of the answer."""
        return self._take(len(self._ids))

    def _take(self, count: int) -> str:
        text = self._tokenizer.decode(self._ids[:count], skip_special=True)
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _forget(self) -> None:
        """Drops all ids before one from which on the text does not depend on what came before."""
        for i in range(len(self._ids) - 1, len(self._ids) - _WINDOW, -1):
            id_ = self._ids[i]
            if self._tokenizer.is_word(id_) and self._tokenizer.token_text(id_).strip(SPACE):
                rest = self._ids[i:]
                gone = len(self._tokenizer.decode(self._ids, skip_special=True))
                self._shown -= gone - len(self._tokenizer.decode(rest, skip_special=True))
                self._ids = rest
                return


def _unfinished_bytes(tokenizer: Tokenizer, ids: list[int]) -> int:
    """How many ids at the end are the first bytes of a UTF-8 character that needs more (0 to 3)."""
    for n in range(1, min(3, len(ids)) + 1):
        byte = tokenizer.byte_value(ids[-n])
        if byte is None:
            return 0
        if byte >= 0xC0:  # a lead byte: 2, 3 or 4 bytes in all
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return n if byte < 0xF8 and n < size else 0
        if byte < 0x80:
            return 0
    return 0
