"""A judge over an OpenAI-compatible endpoint: the `openai` client, a rate limit, and a transcript.

The client retries (with Retry-After). Every reply is appended to the transcript before it is used,
keyed by all that was asked, so a run that stops goes on without paying twice. The key is read from
the environment and written nowhere.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llava_jax.errors import LlavaError, counted
from llava_jax.util import need, read_text, write_text


class JudgeError(LlavaError):
    """The judge cannot be reached, refuses, or answers nonsense."""


@dataclass(frozen=True)
class JudgeReply:
    """What the judge said, the model name it gave itself, and the tokens it counted."""

    text: str
    model: str
    tokens_in: int = 0
    tokens_out: int = 0


class Endpoint:
    """An OpenAI-compatible `chat/completions` service.

    url: up to and with "/v1". model: the judge. transcript: jsonl of all exchanges, read at start.
    key_env: variable of the key; a server without one (a local model) needs none.
    per_minute: most requests per minute. retries: tries after the first. timeout: seconds per try.
    """

    def __init__(
        self,
        url: str,
        model: str,
        transcript: Path,
        key_env: str = "OPENAI_API_KEY",
        per_minute: float = 60.0,
        retries: int = 6,
        timeout: float = 120.0,
    ):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise JudgeError(f"{url!r} is not an http(s) address")
        if per_minute <= 0:
            raise JudgeError("--per-minute must be above 0")
        key = os.environ.get(key_env, "")
        if parts.hostname == "api.openai.com" and not key:
            raise JudgeError(f"no key in ${key_env}", fix=f"export {key_env}=…")
        self.url, self.model, self.transcript = url, model, transcript
        self.retries, self._pause, self._last = retries, 60 / per_minute, 0.0
        self._replies = _read_transcript(transcript)
        self._openai = need("openai", "to ask a judge", "llava_jax[eval]")
        self._has_key = bool(key)
        # A hook of the client's HTTP library: it sees every try, retries included.
        http = self._openai.DefaultHttpxClient(event_hooks={"request": [self._before_try]})
        self._client = self._openai.OpenAI(
            base_url=url,
            api_key=key or "none",  # it insists on one
            max_retries=retries,
            timeout=timeout,
            http_client=http,
        )

    def ask(
        self, messages: list[dict[str, str]], *, temperature: float, max_tokens: int, again: int = 0
    ) -> JudgeReply:
        """The judge's reply, from the transcript if the same was asked before.

        again: 1, 2, … repeats a request that was made before (further runs of a graded set).
        Raises JudgeError, naming the endpoint, where there is no reply after all tries.
        """
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        key = request_key(body, again)
        if key not in self._replies:
            reply = self._post(body)
            row = {"key": key, "request": body, "reply": asdict(reply), "time": time.time()}
            self.transcript.parent.mkdir(parents=True, exist_ok=True)
            with open(self.transcript, "a", encoding="utf-8") as f:
                f.write(json.dumps(row) + "\n")
            self._replies[key] = reply
        return self._replies[key]

    def _post(self, body: dict[str, Any]) -> JudgeReply:
        tries = f"({counted(self.retries + 1, 'time')})"
        try:
            got = self._client.chat.completions.create(**body)
        except self._openai.APIStatusError as e:
            error = e.body.get("message", "") if isinstance(e.body, dict) else ""
            retried = e.status_code in (408, 409, 429) or e.status_code >= 500
            words = [f"HTTP {e.status_code}", str(error)[:200], tries if retried else ""]
            raise JudgeError(f"{self.url}: {' '.join(w for w in words if w)}") from None
        except self._openai.APIConnectionError as e:
            raise JudgeError(f"{self.url}: {e.__cause__ or e} {tries}") from None
        except (self._openai.OpenAIError, ValueError) as e:  # a reply that is not JSON
            raise JudgeError(f"{self.url}: the reply cannot be read ({e})") from None
        try:  # the client checks no fields of a reply
            text, usage = got.choices[0].message.content, got.usage
        except (AttributeError, IndexError, TypeError):
            shown = got if isinstance(got, str) else got.to_json(indent=None)
            raise JudgeError(f"{self.url}: no choices in the reply {shown[:80]!r}") from None
        return JudgeReply(
            text or "",
            str(got.model or self.model),
            int(getattr(usage, "prompt_tokens", 0) or 0),
            int(getattr(usage, "completion_tokens", 0) or 0),
        )

    def _before_try(self, request: Any) -> None:
        """Waits for the next turn; sends no key where there is none."""
        if not self._has_key:
            request.headers.pop("Authorization", None)
        pause = self._last + self._pause - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        self._last = time.monotonic()


def _read_transcript(path: Path) -> dict[str, JudgeReply]:
    if not path.exists():
        return {}
    text = read_text(path, JudgeError)
    whole = text[: text.rfind("\n") + 1]
    if whole != text:  # a kill in the middle of a line
        write_text(path, whole)
    replies = {}
    for number, line in enumerate(whole.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            replies[row["key"]] = JudgeReply(**row["reply"])
        except (ValueError, KeyError, TypeError):
            raise JudgeError(f"{path} line {number}: not a transcript") from None
    return replies


def request_key(body: dict[str, Any], again: int) -> str:
    """A hash of a whole request and of how often it was asked before."""
    text = json.dumps([body, again], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
