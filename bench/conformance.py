"""Asks any server with OpenAI's API the same scripted questions, and compares its answers with ours.

    python -m bench.conformance http://127.0.0.1:8000 --key KEY --model NAME
    python -m bench.conformance URL --key KEY --model NAME --against other.json

For an export that another engine serves: vLLM, SGLang, KServe. Each check says what it holds; with
--out the answers are kept, and --against compares texts with those of another server of the same
weights (token by token up to the first difference: engines round differently). Exits with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from bench.serving import picture, said, shown

QUESTIONS = (
    "What color is the circle?",
    "What shape is it?",
    "Describe the picture in one sentence.",
)


class Asked:
    """A server, and what it was asked."""

    def __init__(self, url: str, key: str, model: str):
        base = url.rstrip("/").removesuffix("/v1")
        self.http = httpx.Client(
            base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=300
        )
        self.model = model or self.http.get("/v1/models").json()["data"][0]["id"]
        self.texts: dict[str, str] = {}

    def post(self, content: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
        """One request; content: of one user message, or all messages."""
        if isinstance(content, str) or "role" not in content[0]:
            content = [{"role": "user", "content": content}]
        body = {
            "model": self.model,
            "messages": content,
            "temperature": 0,
            "max_tokens": 32,
            **more,
        }
        return self.http.post(path, json=body)

    def chat(self, content: Any, **more: Any) -> dict[str, Any]:
        """One answer."""
        reply = self.post(content, **more)
        reply.raise_for_status()
        return reply.json()

    def text(self, name: str, content: Any, **more: Any) -> str:
        """One text, kept under a name."""
        self.texts[name] = self.chat(content, **more)["choices"][0]["message"]["content"]
        return self.texts[name]


def red(question: str = QUESTIONS[0]) -> list[dict[str, Any]]:
    """A picture and a question."""
    return [shown(picture("red")), said(question)]


def models(s: Asked) -> bool:
    """the model is listed under the name that answers"""
    return s.model in [m["id"] for m in s.http.get("/v1/models").json()["data"]]


def texts(s: Asked) -> bool:
    """three questions about a picture have answers, the same when asked again"""
    first = [s.text(f"question {i}", red(q)) for i, q in enumerate(QUESTIONS)]
    return all(first) and first[0] == s.chat(red())["choices"][0]["message"]["content"]


def sees(s: Asked) -> bool:
    """another picture has other log-probabilities: the picture is seen"""
    found = [
        s.chat([shown(picture(c)), said(QUESTIONS[0])], logprobs=True, max_tokens=4)
        for c in ("red", "blue")
    ]
    return found[0]["choices"][0]["logprobs"] != found[1]["choices"][0]["logprobs"]


def counts(s: Asked) -> bool:
    """usage counts the picture's positions, and each picture once"""
    none, one, two = (
        s.chat([*[shown(picture("red"))] * n, said("What?")], max_tokens=1)["usage"][
            "prompt_tokens"
        ]
        for n in range(3)
    )
    return one - none >= 16 and abs((two - one) - (one - none)) <= 4


def streams(s: Asked) -> bool:
    """a stream joins to the whole answer, ends with [DONE] and has its usage"""
    whole = s.chat(red())
    lines = s.post(red(), stream=True, stream_options={"include_usage": True}).text.split("\n\n")
    pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(c["delta"].get("content") or "" for p in pieces for c in p["choices"])
    usage = [p["usage"] for p in pieces if p.get("usage")][-1:]
    same = text.strip() == whole["choices"][0]["message"]["content"].strip()
    return (
        same and "data: [DONE]" in [x.strip() for x in lines] and usage[0]["completion_tokens"] > 0
    )


def turns(s: Asked) -> bool:
    """a second turn with another picture is answered, and counts both"""
    first = s.chat(red())["choices"][0]["message"]["content"]
    rows = [{"role": "user", "content": red()}, {"role": "assistant", "content": first},
            {"role": "user", "content": [shown(picture("blue")), said("And now?")]}]  # fmt: skip
    return bool(s.text("second turn", rows)) and s.chat(rows)["usage"]["prompt_tokens"] > 32


def logprobs(s: Asked) -> bool:
    """log-probabilities with alternatives, the chosen token the likeliest"""
    rows = s.chat(red(), logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    return all(
        r["logprob"] <= 0 and r["top_logprobs"][0]["logprob"] >= r["logprob"] - 1e-4 for r in rows
    )


def stops(s: Asked) -> bool:
    """max_tokens cuts with length; a stop string ends before it"""
    cut = s.chat("Count from one to ten.", max_tokens=1)["choices"][0]["finish_reason"] in (
        "length",
        "stop",
    )
    whole = s.chat(red())["choices"][0]["message"]["content"]
    mark = whole[len(whole) // 2 :][:2]
    short = s.chat(red(), stop=[mark])["choices"][0]["message"]["content"]
    return cut and mark not in short


def seeds(s: Asked) -> bool:
    """n answers of one seed, the same again"""
    how = {"temperature": 1.5, "seed": 7, "n": 2}
    first, again = (
        [c["message"]["content"] for c in s.chat(red(), **how)["choices"]] for _ in range(2)
    )
    return len(first) == 2 and first == again


def schemas(s: Asked) -> bool:
    """a JSON schema holds"""
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}, "sure": {"type": "boolean"}},
              "required": ["color", "sure"], "additionalProperties": False}  # fmt: skip
    form = {
        "type": "json_schema",
        "json_schema": {"name": "answer", "schema": schema, "strict": True},
    }
    found = json.loads(s.text("schema", red(), response_format=form, max_tokens=64))
    return found["color"] in ("red", "blue") and isinstance(found["sure"], bool)


def words_are_words(s: Asked) -> bool:
    """`<image>` in a text binds no picture"""
    plain = s.chat("say picture", max_tokens=1)["usage"]["prompt_tokens"]
    reply = s.post("say <image>", max_tokens=1)
    return reply.status_code == 400 or reply.json()["usage"]["prompt_tokens"] < plain + 16


def refuses(s: Asked) -> bool:
    """an unknown model is 404, a damaged picture and a file's path are 4xx in OpenAI's form, a wrong key is 401"""
    unknown = s.post("hi", model="no-such-model").status_code == 404
    bad = [s.post([{"type": "image_url", "image_url": {"url": u}}, said("?")]) for u in
           ("data:image/png;base64,AAAA", "file:///etc/passwd")]  # fmt: skip
    key = s.http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code
    return (
        unknown
        and all(400 <= b.status_code < 500 and "error" in b.json() for b in bad)
        and key == 401
    )


CHECKS: tuple[Callable[[Asked], bool], ...] = (models, texts, sees, counts, streams, turns, logprobs, stops,
    seeds, schemas, words_are_words, refuses)  # fmt: skip


def run(server: Asked) -> Iterator[tuple[str, bool, str]]:
    """(what a check holds, whether it does, why not) of each."""
    for check in CHECKS:
        try:
            yield check.__doc__ or "", check(server), ""
        except (httpx.HTTPError, KeyError, IndexError, TypeError, ValueError) as error:
            yield check.__doc__ or "", False, f"{type(error).__name__}: {error}"[:200]


def main() -> int:
    """Prints a line for each check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--key", default=os.environ.get("LLAVA_JAX_API_KEY", "none"))
    parser.add_argument("--model", default="", help="default: the first that the server lists")
    parser.add_argument("--out", type=Path, help="keep the answers here")
    parser.add_argument("--against", type=Path, help="answers of another server, to compare with")
    args = parser.parse_args()
    server = Asked(args.url, args.key, args.model)
    failed = 0
    for what, holds, why in run(server):
        failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'} {what}{f' ({why})' if why else ''}", flush=True)
    if args.out:
        args.out.write_text(json.dumps(server.texts, indent=1) + "\n", encoding="utf-8")
    if args.against:
        other = json.loads(args.against.read_text(encoding="utf-8"))
        for name, text in server.texts.items():
            pairs = list(zip(text, other.get(name, "")))
            same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
            equal = text == other.get(name)
            failed += not equal
            print(
                f"{'ok    ' if equal else 'FAILED'} {name}: {'equal' if equal else f'differs after {same} characters'}"
            )
    print(f"{len(CHECKS)} checks, {failed} failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
