"""Answers in OpenAI's shapes: whole, in pieces, and the log-probabilities of both routes."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from llava_jax.generate import Job
from llava_jax.serve.worker import News
from llava_jax.text.tokenizer import SPACE, Tokenizer

_LOWEST = -9999.0  # in place of minus infinity, which JSON lacks; OpenAI's own value


class Form:
    """One reply's fixed parts. chat: of /v1/chat/completions, else of /v1/completions."""

    def __init__(self, model: str, tokenizer: Tokenizer, *, chat: bool, stream: bool, tops: int):
        self.chat, self.stream, self.tops, self._tokenizer = chat, stream, tops, tokenizer
        self._at: Counter[int] = Counter()  # characters of each answer's text so far
        self._silent = frozenset(tokenizer.special_tokens.values())
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{kind}.chunk" if chat and stream else kind,
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, jobs: Sequence[Job], texts: Sequence[str], *, logprobs: bool) -> dict[str, Any]:
        """The reply of answers that have ended."""
        choices = []
        for i, (job, text) in enumerate(zip(jobs, texts)):
            said: dict[str, Any] = {"index": i, "finish_reason": job.reason, "logprobs": None}
            if self.chat:
                said["message"] = {"role": "assistant", "content": text, "refusal": None}
            else:
                said["text"] = text
            if logprobs:
                said["logprobs"] = self.logprobs(i, job.ids, job.logprobs, job.tops)
            choices.append(said)
        return {**self._head, "choices": choices, "usage": usage(jobs)}

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of an answer of a chat, which names the role."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._piece({"index": index, "delta": delta, "finish_reason": None})

    def piece(self, index: int, news: News, *, logprobs: bool) -> dict[str, Any]:
        """What came of an answer."""
        said: dict[str, Any] = {"index": index, "finish_reason": news.reason or None}
        if self.chat:
            said["delta"] = {"content": news.text} if news.text else {}
        else:
            said["text"] = news.text
        said["logprobs"] = None
        if logprobs:
            said["logprobs"] = self.logprobs(index, news.ids, news.logprobs, news.tops)
        return self._piece(said)

    def closing(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The last piece: tokens of all answers, where they were asked for."""
        return {**self._head, "choices": [], "usage": usage(jobs)}

    def _piece(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice]}

    def logprobs(self, index: int, ids: Any, values: Any, tops: Any) -> dict[str, Any]:
        """One entry for each token that came of an answer since the last call, the end token included."""
        tops = tops or [()] * len(ids)
        if self.chat:
            rows = []
            for id_, value, others in zip(ids, values, tops):
                best = [self._entry(other, at) for other, at in others]
                rows.append({**self._entry(id_, value), "top_logprobs": best})
            return {"content": rows, "refusal": None}
        texts = [token_text(self._tokenizer, id_) for id_ in ids]
        best = [
            {token_text(self._tokenizer, other): _finite(at) for other, at in row} for row in tops
        ]
        return {
            "tokens": texts,
            "token_logprobs": [_finite(value) for value in values],
            "top_logprobs": best if self.tops else None,
            "text_offset": [self._place(index, id_) for id_ in ids],
        }

    def _place(self, index: int, id_: int) -> int:
        """Where a token begins in the text of its answer, which has no white space in front."""
        at, byte = self._at[index], self._tokenizer.byte_value(id_)
        text = "" if id_ in self._silent else token_text(self._tokenizer, id_)
        if byte is not None:  # the first of a character's bytes counts for all of them
            text = "" if byte & 0xC0 == 0x80 else chr(byte)
        self._at[index] += len(text if at else text.lstrip())
        return at

    def _entry(self, id_: int, value: float) -> dict[str, Any]:
        text, byte = token_text(self._tokenizer, id_), self._tokenizer.byte_value(id_)
        data = [byte] if byte is not None else list(text.encode())
        return {"token": text, "logprob": _finite(value), "bytes": data}


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens of all answers; each prompt counts once, its image features included."""
    prompts = {id(job.prompt): job for job in reversed(jobs)}.values()
    asked, said = sum(job.length for job in prompts), sum(len(job.ids) for job in jobs)
    return {
        "prompt_tokens": asked,
        "completion_tokens": said,
        "total_tokens": asked + said,
        "prompt_tokens_details": {"cached_tokens": sum(job.reused for job in prompts)},
    }


def token_text(tokenizer: Tokenizer, id_: int) -> str:
    """A token as it stands in a text: the vocabulary's mark for a space is a space.

    A model may have rows that its tokenizer does not name (padding); they have no text.
    """
    if id_ >= len(tokenizer):
        return ""
    return tokenizer.token_text(id_).replace(SPACE, " ")


def _finite(value: float) -> float:
    return max(float(value), _LOWEST)
