"""An OpenAI-compatible endpoint: the `openai` client, a rate limit, and a transcript.

The client retries (with Retry-After). Every reply is appended to the transcript before it is used,
keyed by all that was asked, so a run that stops goes on without paying twice. The key is read from
the environment and written nowhere.
"""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from llava_jax.errors import LlavaError, counted
from llava_jax.util import need, read_text, write_text

REASONING_TOKENS = 8192  # room to think, for models that count it among the tokens of a reply
_THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)
Row = dict[str, Any]
Asked = Sequence[tuple[Row, str]]  # a row to fill, and the message to a judge
A = TypeVar("A")
B = TypeVar("B")


class JudgeError(LlavaError):
    """The judge cannot be reached, refuses, or answers nonsense.

    refused: it takes this request for a bad one (HTTP 400, 413, 422), and others perhaps not.
    """

    refused = False


@dataclass(frozen=True)
class JudgeReply:
    """What the judge said, the model name it gave itself, and the tokens it counted.

    no_answer: why the text is no answer of the model's, "" where it is one. sent: parameters that were
    not sent as asked; None for one that was left out.
    """

    text: str
    model: str
    tokens_in: int = 0
    tokens_out: int = 0
    no_answer: str = ""
    sent: dict[str, Any] = field(default_factory=dict)


class Endpoint:
    """An OpenAI-compatible `chat/completions` service, which several threads may ask at once.

    url: up to and with "/v1". model: its name there. transcript: jsonl of all exchanges, read at
    start; None keeps none. key_env: variable of the key; a server without one needs none.
    per_minute: most requests per minute. retries: tries after the first. timeout: seconds per try.
    tokens_in, tokens_out: what the replies so far took, those of the transcript not counted.
    """

    def __init__(
        self,
        url: str,
        model: str,
        transcript: Path | None,
        key_env: str = "OPENAI_API_KEY",
        per_minute: float = 60.0,
        retries: int = 6,
        timeout: float = 120.0,
    ):
        if set("@?#") & set(url):  # it is written into results, transcripts and messages
            what = "the address of the endpoint holds a user, a password or a query"
            raise JudgeError(what, fix=f"leave it out; the key is read from ${key_env}")
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and parts.netloc and parts.port != 0
        except ValueError:  # a port that is no number, half of an IPv6 address
            right = False
        if not right or not url.isprintable():
            raise JudgeError(f"{url!r} is not an http(s) address")
        if not per_minute > 0:
            raise JudgeError("--per-minute must be above 0")
        key = os.environ.get(key_env, "")
        if parts.hostname == "api.openai.com" and not key:
            raise JudgeError(f"no key in ${key_env}", fix=f"export {key_env}=…")
        self.url, self.model, self.transcript = url, model, transcript
        self.retries, self._pause, self._next = retries, 60 / per_minute, 0.0
        self.tokens_in = self.tokens_out = 0
        self._replies = read_transcript(transcript) if transcript else {}
        self._lock, self._turn = threading.Lock(), threading.Lock()
        self._completion_tokens = self._no_temperature = False
        self._openai = need("openai", "to ask a server", "llava_jax[eval]")
        self._has_key, self._key_env = bool(key), key_env
        # A hook of the client's HTTP library: it sees every try, retries included.
        http = self._openai.DefaultHttpxClient(event_hooks={"request": [self._before_try]})
        how: dict[str, Any] = {"max_retries": retries, "timeout": timeout, "http_client": http}
        how["api_key"] = key or "none"  # it insists on one
        self._client = self._openai.OpenAI(base_url=url, **how)

    def check(self, seconds: float = 10.0) -> None:
        """Raises JudgeError within seconds where nobody answers at the address."""
        try:
            self._client.with_options(max_retries=0, timeout=seconds).models.list()
        except self._openai.APIConnectionError as e:
            raise JudgeError(f"{self.url}: {e.__cause__ or e}", fix="is the server up?") from None
        except (self._openai.OpenAIError, ValueError):
            pass  # somebody is there

    def ask(
        self, messages: list[dict[str, Any]], *, temperature: float, max_tokens: int, again: int = 0
    ) -> JudgeReply:
        """The judge's reply, from the transcript if the same was asked before.

        again: 1, 2, … repeats a request that was made before (further runs of a graded set).
        Raises JudgeError, naming the endpoint, where there is no reply after all tries.
        """
        body = {"model": self.model, "messages": messages}
        body |= {"temperature": temperature, "max_tokens": max_tokens}
        key = request_key(body, again) if self.transcript else ""
        with self._lock:
            if key in self._replies:
                return self._replies[key]
        reply = self._post(body)
        with self._lock:
            self.tokens_in += reply.tokens_in
            self.tokens_out += reply.tokens_out
            if self.transcript:
                row = {"key": key, "request": body, "reply": asdict(reply), "time": time.time()}
                self.transcript.parent.mkdir(parents=True, exist_ok=True)
                with open(self.transcript, "a", encoding="utf-8") as f:
                    f.write(json.dumps(row) + "\n")
                self._replies[key] = reply
        return reply

    def _post(self, body: dict[str, Any]) -> JudgeReply:
        tries = f"({counted(self.retries + 1, 'time')})"
        served = self._as_served(body)
        try:
            got = self._client.chat.completions.create(**served)
        except self._openai.APIStatusError as e:
            if self._learns(e, served):
                return self._post(body)
            said = e.body if isinstance(e.body, dict) else {"message": e.body}
            error = " ".join(str(said.get("message") or said.get("detail") or "").split())
            retried = e.status_code in (408, 409, 429) or e.status_code >= 500
            words = [f"HTTP {e.status_code}", error[:200], tries if retried else ""]
            key = f"the key is read from ${self._key_env} (--key-env)"
            what = f"{self.url}: {' '.join(w for w in words if w)}"
            failed = JudgeError(what, fix=key if e.status_code == 401 else None)
            failed.refused = e.status_code in (400, 413, 422)
            raise failed from None
        except self._openai.APIConnectionError as e:
            raise JudgeError(f"{self.url}: {e.__cause__ or e} {tries}") from None
        except (self._openai.OpenAIError, ValueError, RecursionError) as e:  # not JSON
            raise JudgeError(f"{self.url}: the reply cannot be read ({e})") from None
        try:  # the client checks no fields of a reply
            (text, no_answer), usage = answer_of(got.choices[0]), got.usage
        except (AttributeError, IndexError, TypeError, KeyError):
            has_json = hasattr(got, "to_json")
            shown = got.to_json(indent=None, warnings=False) if has_json else str(got)
            raise JudgeError(f"{self.url}: no choices in the reply {shown[:80]!r}") from None
        counts = [getattr(usage, n, 0) for n in ("prompt_tokens", "completion_tokens")]
        read, written = (n if isinstance(n, int) else 0 for n in counts)
        names = dict.fromkeys([*served, *body])
        sent = {n: served.get(n) for n in names if served.get(n) != body.get(n)}
        return JudgeReply(text, str(got.model or self.model), read, written, no_answer, sent)

    def _as_served(self, body: dict[str, Any]) -> dict[str, Any]:
        """A request with the parameters that this server turned out to take."""
        body = dict(body)
        if self._no_temperature:
            del body["temperature"]
        if self._completion_tokens:
            body["max_completion_tokens"] = body.pop("max_tokens") + REASONING_TOKENS
        return body

    def _learns(self, error: Any, served: dict[str, Any]) -> bool:
        """Whether the refusal names a parameter of `served` that this server wants otherwise: reasoning
        models take max_completion_tokens, which holds their thoughts too, and no temperature.

        What was sent decides, not what is known by now: requests on their way learn the same.
        """
        said = json.dumps(error.body, default=str) if error.status_code in (400, 422) else ""
        if "max_completion_tokens" in said and "max_tokens" in served:
            self._completion_tokens = True
        elif "temperature" in said and "temperature" in served:
            self._no_temperature = True
        else:
            return False
        return True

    def _before_try(self, request: Any) -> None:
        """Waits for the next turn; sends no key where there is none."""
        if not self._has_key:
            request.headers.pop("Authorization", None)
        with self._turn:
            start = max(self._next, time.monotonic())
            self._next = start + self._pause
        if (pause := start - time.monotonic()) > 0:
            time.sleep(pause)


def in_parallel(work: Callable[[A], B], items: Sequence[A], threads: int) -> Iterator[B]:
    """The results of `work` in the order of `items`, so many at a time; the first error stops all
    that has not begun."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        yield from pool.map(work, items)


def answer_of(choice: Any) -> tuple[str, str]:
    """The text of a reply's choice, and why it is no answer, "" where it is one.

    No answer: what the server filtered, and a reply without text (null, other parts, thoughts alone).
    """
    text, end = content_text(choice.message.content), getattr(choice, "finish_reason", None)
    if end == "content_filter":
        return text, "the server filtered the reply"
    if text.strip():
        return text, ""
    refusal = getattr(choice.message, "refusal", None)
    cut = ", cut at the token limit" if end == "length" else ""
    return "", f"the model refused: {refusal}" if refusal else f"the reply has no text{cut}"


def content_text(content: Any) -> str:
    """The text of a reply's content: text, null, or a list of parts; without its thoughts."""
    if isinstance(content, list):
        parts = [p if isinstance(p, dict) else getattr(p, "__dict__", {}) for p in content]
        content = "".join(str(p.get("text") or "") for p in parts if p.get("type") == "text")
    text = content if isinstance(content, str) else ""
    if "</think" in text or "<think" in text:
        text = _THINKING.sub("", text)
        # The server may eat the opening tag, and the token limit the closing one.
        text = re.split(r"</think(?:ing)?>", text)[-1].lstrip().split("<think")[0]
    return text


def read_transcript(path: Path) -> dict[str, JudgeReply]:
    """The replies of a transcript by request_key, none where there is no file."""
    if not path.exists():
        return {}
    repair_lines(path)
    replies = {}
    for number, line in enumerate(read_text(path, JudgeError).split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            replies[row["key"]] = JudgeReply(**row["reply"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise JudgeError(f"{path} line {number}: not a transcript") from None
    return replies


def repair_lines(path: Path) -> None:
    """Cuts off a last line that a kill left without its end."""
    text = read_text(path, JudgeError)
    whole = text[: text.rfind("\n") + 1]
    try:
        json.loads(text[len(whole) :])  # a file from elsewhere without a last line feed
        whole = text + "\n"
    except ValueError:
        pass
    if whole != text:
        write_text(path, whole)


def request_key(body: dict[str, Any], again: int) -> str:
    """A hash of a whole request and of how often it was asked before."""
    return hashlib.sha256(json.dumps([body, again], sort_keys=True).encode()).hexdigest()


def not_asked(
    plan: Iterable[tuple[Sequence[Row], Callable[[str], Any]]], transcript: Path, model: str
) -> list[Sequence[Row]]:
    """The tries that `ask_until_read` may still send for each request: at least the first of them.

    plan: the tries of a request, and what reads a reply. Requests that the transcript answers are left out.
    """
    replies, left = read_transcript(transcript), []
    for tries, read in plan:
        for n, how in enumerate(tries):
            body = {"model": model, **how}
            reply = replies.get(request_key(body, body.pop("again", 0)))
            if reply is None:
                left.append(tries[n:])
            if reply is None or (not reply.no_answer and read(reply.text) is not None):
                break
    return left
