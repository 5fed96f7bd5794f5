"""The text of one growing answer: stop strings, and pieces fit to be shown at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from llava_jax.text.stream import StreamDecoder
from llava_jax.text.tokenizer import Tokenizer


class Answer:
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
        self._shown = 0  # characters of the stripped text that were given out
        self.count = 0  # ids taken, the one that completed a stop string included
        self.stopped = False

    def watches(self, eos_ids: Iterable[int]) -> bool:
        """Whether the answer may end before a token of `eos_ids`, so that it must be read as it grows."""
        return bool(self._stop) or not self._stop_ids <= set(eos_ids)

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._raw.strip()

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain to follow; ids behind a stop string are ignored."""
        for id_ in ids:
            if self.stopped:
                break
            self.count += 1
            if int(id_) in self._stop_ids:
                self._add(self._decoder.flush())
                self.stopped = True
            else:
                self._add(self._decoder.push(int(id_)))
        return self._piece(self._raw if self.stopped else self._raw[: self._certain()])

    def finish(self) -> str:
        """The rest, when no more ids come."""
        if not self.stopped:
            self._add(self._decoder.flush())
        return self._piece(self._raw)

    def _add(self, piece: str) -> None:
        before = len(self._raw)
        self._raw += piece
        found = [
            at
            for stop in self._stop
            if (at := self._raw.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
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
