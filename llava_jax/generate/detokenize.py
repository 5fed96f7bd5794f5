"""The text of one growing answer: pieces fit to be shown at once, and stop strings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava_jax.text.tokenizer import SPACE, Tokenizer

_WINDOW = 32  # ids decoded again for every new one, at most about twice that


class Detokenizer:
    """Ids become text, without special tokens and without white space around it.

    The answer ends before the first of the `stop` strings, wherever it falls among tokens; a stop
    string that is a token of its own (`</s>`, or `<|im_end|>` of some models) means that token, not
    its letters. Joined, the pieces that `push` and `finish` return are `text`; what may turn out to
    be the start of a stop string, half a character or trailing space is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._decoder = StreamDecoder(tokenizer)
        special = tokenizer.special_tokens
        self._stop = tuple(s for s in stop if s and s not in special)
        self._stop_ids = {special[s] for s in stop if s in special}
        self._raw = ""
        self._shown = 0  # characters of the stripped text that were returned
        self.count = 0  # ids taken, the one that completed a stop string included
        self.stopped = False

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._raw.strip()

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain to follow; ids after a stop string are ignored."""
        for id_ in map(int, ids):
            if self.stopped:
                break
            self.count += 1
            if id_ in self._stop_ids:
                self._add(self._decoder.flush())
                self.stopped = True
            else:
                self._add(self._decoder.push(id_))
        return self._piece(self._raw if self.stopped else self._raw[: self._certain()])

    def finish(self) -> str:
        """The rest, when no more ids come."""
        if not self.stopped:
            self._add(self._decoder.flush())
        return self._piece(self._raw)

    def _add(self, piece: str) -> None:
        before = len(self._raw)
        self._raw += piece
        starts = [self._raw.find(stop, max(0, before - len(stop) + 1)) for stop in self._stop]
        found = [at for at in starts if at >= 0]
        if found:
            self.stopped = True
            self._raw = self._raw[: min(found)]

    def _certain(self) -> int:
        """Length of the text without a tail that may be the start of a stop string."""
        tails = [
            n
            for stop in self._stop
            for n in range(1, min(len(stop), len(self._raw) + 1))
            if self._raw.endswith(stop[:n])
        ]
        return len(self._raw) - max(tails, default=0)

    def _piece(self, certain: str) -> str:
        text = certain.strip()
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


class StreamDecoder:
    """Turns ids into text as they come: joined, the pieces equal `decode` with `skip_special`.

    Text is held back while its last bytes may be the start of a longer UTF-8 character. (Special
    tokens cannot be shown: with `legacy`, one of them changes the text in front of it.)
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # characters of decode(self._ids) that were returned

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
        if byte is None or byte < 0x80:
            return 0
        if byte >= 0xC0:  # a lead byte: 2, 3 or 4 bytes in all
            size = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return n if byte < 0xF8 and n < size else 0
    return 0
