"""A judge behind an OpenAI-compatible endpoint: rate limit, retries, and a transcript that caches.

Every reply is appended to the transcript before it is used, keyed by all that was asked, so a run
that stops goes on without paying twice. The key is read from the environment and written nowhere.
"""

import hashlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava_jax.errors import LlavaError

logger = logging.getLogger(__name__)

_RETRY = {408, 409, 429, 500, 502, 503, 504, 529}


class JudgeError(LlavaError):
    """The judge cannot be reached, refuses, or answers nonsense."""


@dataclass(frozen=True)
class Reply:
    """What the judge said, the model name it gave itself, and the tokens it counted."""

    text: str
    model: str
    tokens_in: int = 0
    tokens_out: int = 0


@dataclass
class Endpoint:
    """An OpenAI-compatible `chat/completions` service.

    url: up to and with "/v1". model: the judge. key_env: variable of the key; a server without one
    (a local model) needs none. transcript: jsonl of all exchanges, read at start.
    per_minute: most requests a minute. retries: tries after the first, waits doubling from `wait` s.
    """

    url: str
    model: str
    transcript: Path
    key_env: str = "OPENAI_API_KEY"
    per_minute: float = 60.0
    retries: int = 6
    wait: float = 1.0
    timeout: float = 120.0
    _cache: dict[str, Reply] = field(default_factory=dict)
    _last: float = 0.0

    def __post_init__(self):
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise JudgeError(f"{self.url!r} is not an http(s) address")
        if self.per_minute <= 0:
            raise JudgeError("--per-minute must be above 0")
        if parts.hostname == "api.openai.com" and not os.environ.get(self.key_env):
            raise JudgeError(f"no key in ${self.key_env}", fix=f"export {self.key_env}=…")
        if self.transcript.exists():
            self._read_transcript()

    def ask(
        self, messages: list[dict[str, str]], *, temperature: float, max_tokens: int, again: int = 0
    ) -> Reply:
        """The judge's reply, from the transcript if the same was asked before.

        again: 1, 2, … asks anew what was asked already (further runs of a graded set).
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        key = request_key(body, again)
        if key not in self._cache:
            reply = self._parse(self._post(body))
            self._write({"key": key, "request": body, "reply": reply.__dict__, "time": time.time()})
            self._cache[key] = reply
        return self._cache[key]

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        for attempt in range(self.retries + 1):
            self._pace()
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return json.load(response)
            except urllib.error.HTTPError as e:
                problem = f"HTTP {e.code} {_said(e)}".strip()
                wait = _retry_after(e)
                if e.code not in _RETRY:
                    raise JudgeError(f"{self.url}: {problem}") from None
            except (urllib.error.URLError, TimeoutError, ConnectionError) as e:
                problem, wait = str(getattr(e, "reason", e)), None
            except json.JSONDecodeError:
                problem, wait = "the reply is not JSON", None
            if attempt < self.retries:
                seconds = self.wait * 2**attempt if wait is None else wait
                logger.warning("judge: %s; again in %.1f s", problem, seconds)
                time.sleep(seconds)
        raise JudgeError(f"{self.url}: {problem} ({self.retries + 1} tries)")

    def _pace(self) -> None:
        pause = self._last + 60 / self.per_minute - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        self._last = time.monotonic()

    def _parse(self, value: dict[str, Any]) -> Reply:
        try:
            text = value["choices"][0]["message"]["content"]
            usage = value.get("usage") or {}
        except (KeyError, IndexError, TypeError):
            raise JudgeError(f"{self.url}: no choices in the reply {str(value)[:80]!r}") from None
        return Reply(
            text or "",
            str(value.get("model") or self.model),
            int(usage.get("prompt_tokens") or 0),
            int(usage.get("completion_tokens") or 0),
        )

    def _write(self, row: dict[str, Any]) -> None:
        self.transcript.parent.mkdir(parents=True, exist_ok=True)
        with open(self.transcript, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")

    def _read_transcript(self) -> None:
        raw = self.transcript.read_text(encoding="utf-8")
        whole = raw[: raw.rfind("\n") + 1]
        if whole != raw:  # a kill in the middle of a line
            self.transcript.write_text(whole, encoding="utf-8")
        for number, line in enumerate(whole.split("\n")[:-1], 1):
            try:
                row = json.loads(line)
                self._cache[row["key"]] = Reply(**row["reply"])
            except (json.JSONDecodeError, KeyError, TypeError):
                raise JudgeError(f"{self.transcript} line {number}: not a transcript") from None


def request_key(body: dict[str, Any], again: int) -> str:
    """A hash of a whole request and of how often it was asked before."""
    text = json.dumps([body, again], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _said(error: urllib.error.HTTPError) -> str:
    try:
        value = json.loads(error.read(10_000))
        return str(value["error"]["message"])[:200]
    except Exception:  # whatever an unknown server sends must not hide the status
        return ""


def _retry_after(error: urllib.error.HTTPError) -> float | None:
    try:
        return min(float(error.headers.get("Retry-After", "")), 120.0)
    except ValueError:
        return None
