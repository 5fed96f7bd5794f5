"""More of bench/attack.py: a corpus of bad pictures, and answers by random schemas, both over HTTP."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from bench.attack_parts import GOLDEN, answer_of, held
from bench.schemas import schema
from bench.serving import KEY, NAME, Running, ask, picture, said, shown

DATA = "LLAVA_JAX_TEST_DATA"
_REFUSED = (400, 413, 422)


def corpus() -> Path:
    """Where bad-images is: beside the checkout, or in the folder that $LLAVA_JAX_TEST_DATA names."""
    beside = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
    return Path(os.environ.get(DATA) or beside) / "bad-images"


class Peak:
    """The most memory that this process had while it stood in a `with`, above what it had before, in MB."""

    def __enter__(self) -> Peak:
        self.grown, self._stop, self._process = 0.0, threading.Event(), psutil.Process()
        self._before = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.grown = max(self.grown, (self._process.memory_info().rss - self._before) / 2**20)


def pictures(server: Running, count: int, seed: int) -> dict[str, Any]:
    """Every picture of the corpus, shown to the server: its verdict, and the limits of time and memory.

    count: files at most, evenly chosen. Seconds are the process's own (CPU), client included.
    """
    rows = [
        json.loads(line)
        for line in (corpus() / "manifest.jsonl").read_text("utf-8").split("\n")
        if line
    ]
    rows = rows[seed % max(1, len(rows) // count) :: max(1, len(rows) // count)]
    golden, before = answer_of(server.post(GOLDEN).json()), held(server)
    told, wrong, slowest, largest = Counter(), [], 0.0, 0.0
    for row in rows:
        data = (corpus() / row["file"]).read_bytes()
        cpu = time.process_time()
        with Peak() as peak:
            reply = server.post(ask([shown(data), said("What is it?")], max_tokens=1))
        cpu = time.process_time() - cpu
        verdict = "ok" if reply.is_success else "reject"
        told[f"{row['expect']}: {reply.status_code}"] += 1
        text = reply.text
        fine = row["expect"] in (verdict, "either") and (
            reply.is_success or reply.status_code in _REFUSED
        )
        fine = fine and not any(
            s in text for s in ("Traceback", " at 0x", "site-packages", str(corpus()))
        )
        if not fine or cpu > row["max_seconds"] or peak.grown > row["max_rss_growth_mb"]:
            wrong.append(
                [row["file"], row["expect"], reply.status_code, round(cpu, 2), round(peak.grown)]
            )
        slowest, largest = max(slowest, cpu), max(largest, peak.grown)
    rest, again, after = server.at_rest(), answer_of(server.post(GOLDEN).json()), held(server)
    return {"files": len(rows), "replies": dict(sorted(told.items())), "wrong": wrong[:20],
            "slowest_cpu_seconds": round(slowest, 2), "most_MB_grown": round(largest),
            "golden answer stays": again == golden, "before": before, "after": after,
            "ok": rest and not wrong and again == golden and after["busy"] == 0
            and after["compiles"] == before["compiles"] and after["files"] <= before["files"] + 1}  # fmt: skip


def answers(server: Running, count: int, seed: int) -> dict[str, Any]:
    """OpenAI's client asks for answers by random schemas: those that end by themselves parse and are valid."""
    import jsonschema
    import openai

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    wrong, reasons, kinds = [], Counter(), Counter()
    before = held(server)
    for i in range(seed, seed + count):
        wanted = schema(i)
        form: Any = {"type": "json_schema", "json_schema": {"name": "seen", "schema": wanted}}
        content: Any = [shown(picture("red")), said("Describe it.")] if i % 2 else "Describe it."
        reply = client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": content}], response_format=form,
            max_tokens=700, temperature=1.2 if i % 3 else 0, seed=i,
        )  # fmt: skip
        choice = reply.choices[0]
        reasons[choice.finish_reason] += 1
        kinds.update(key for key in ("$ref", "anyOf", "pattern", "enum", "minimum", "prefixItems", "format")
                     if f'"{key}"' in json.dumps(wanted))  # fmt: skip
        try:
            check = jsonschema.Draft202012Validator(wanted)
            check.validate(json.loads(choice.message.content or ""))
        except (ValueError, jsonschema.ValidationError) as error:
            if choice.finish_reason == "stop":
                wrong.append([i, str(error)[:200]])
    after = held(server)
    return {"schemas": count, "finish reasons": dict(reasons), "schemas with": dict(kinds), "wrong": wrong[:20],
            "ok": not wrong and reasons["stop"] == count and server.at_rest()
            and after["compiles"] == before["compiles"]}  # fmt: skip
