"""How fast the server answers: time to the first token, between tokens, requests a second.

    python -m bench.serve --out bench/results/serve_speed.json

A random model of 65 M parameters (and with --model tiny the shipped one) is served by a process of its
own, and asked by 1, 8 and 64 clients at once: prompts of 10 to 200 words, every second one with a
picture of its own, 100 tokens each. The last line of comparison serves the same requests of 8
clients with one slot, one at a time. On a busy machine only the server's processor seconds say something.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.serving import CHAT, HEADERS, KEY, ask, noise, said, shown

TOKENS = 100


def random_model(folder: Path) -> str:
    """Saves a model of 65 M parameters with the tiny model's tokenizer."""
    import numpy as np

    from llava_jax.config import LanguageConfig, LlavaConfig, VisionConfig
    from llava_jax.llava import abstract_params
    from llava_jax.model import LlavaModel, load

    language = LanguageConfig(vocab_size=32000, width=512, layers=8, heads=8, kv_heads=8, head_width=64,
                              mlp_width=1376, max_positions=1024)  # fmt: skip
    vision = VisionConfig(
        image_size=112, patch_size=14, width=256, layers=8, heads=4, mlp_width=1024
    )
    config, rng, params = (
        LlavaConfig(vision=vision, language=language),
        np.random.default_rng(0),
        {},
    )
    for name, leaf in abstract_params(config).items():
        width = leaf.shape[-2] if name.endswith("kernel") else 512
        value = rng.standard_normal(leaf.shape, np.float32) * width**-0.5
        params[name] = 1 + 0 * value if name.endswith("scale") else value
    LlavaModel(config, params, load("tiny").tokenizer).save(folder)
    return str(folder)


@contextmanager
def served(model: str, slots: int) -> Iterator[tuple[str, psutil.Process, float]]:
    """(address, process, seconds until it was ready) of `llava-jax serve`."""
    words = [
        sys.executable,
        "-m",
        "llava_jax",
        "serve",
        "--model",
        model,
        "--name",
        "tiny",
        "--port",
        "0",
    ]
    words += ["--api-key", KEY, "--slots", str(slots), "--waiting", "256"]
    start = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout or ():
            if found := re.search(r"answers at (http://\S+)/v1", line):
                yield found[1], psutil.Process(process.pid), time.monotonic() - start
                break
    finally:
        process.terminate()
        process.wait(60)


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Mixed ones: each of 100 tokens, whatever the model would rather say.

    Log-probabilities come with every token; text does not, of a random model.
    """
    dice, made = random.Random(seed), []
    for i in range(count):
        words = said("word " * dice.randrange(10, 200))
        content = [shown(noise(1000 * seed + i, 112)), words] if i % 2 else [words]
        made.append(ask(content, max_tokens=TOKENS, logit_bias={"2": -100}, stream=True, logprobs=True,
                        stream_options={"include_usage": True}))  # fmt: skip
    return made


async def one(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token, and between tokens."""
    start, first, last, tokens = time.monotonic(), 0.0, 0.0, 0
    async with http.stream("POST", CHAT, json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            piece = json.loads(line[6:])
            if piece.get("usage"):
                tokens = piece["usage"]["completion_tokens"]
            elif piece["choices"][0]["delta"].get("role") is None:
                last = time.monotonic()
                first = first or last
    return first - start, (last - first) / max(1, tokens - 1)


async def crowd(url: str, bodies: list[dict[str, Any]], clients: int) -> list[tuple[float, float]]:
    """All of them, by so many clients at once."""
    left, found = list(bodies), []

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            found.append(await one(http, left.pop()))

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(
        base_url=url, headers=HEADERS, timeout=None, limits=limits
    ) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return found


def measure(url: str, process: psutil.Process, clients: int, count: int) -> dict[str, Any]:
    """One row."""
    bodies = requests(count, seed=clients)
    cpu, wall = sum(process.cpu_times()[:2]), time.monotonic()
    found = asyncio.run(crowd(url, bodies, clients))
    wall, cpu = time.monotonic() - wall, sum(process.cpu_times()[:2]) - cpu
    first, between = (sorted(column) for column in zip(*found))
    return {
        "clients": clients,
        "requests": count,
        "first_token_seconds": {"median": round(statistics.median(first), 3), "p90": round(first[int(0.9 * len(first))], 3)},
        "between_tokens_ms": {"median": round(1e3 * statistics.median(between), 2)},
        "requests_per_second": round(count / wall, 3),
        "tokens_per_second": round(TOKENS * count / wall, 1),
        "server_cpu_seconds_per_request": round(cpu / count, 3),
    }  # fmt: skip


def main() -> int:
    """Prints a row for each number of clients, and the comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="65m", help="65m (random), or as for llava-jax serve")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument(
        "--requests", type=int, default=16, help="of each row; as many as clients at least"
    )
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "65m") if args.model == "65m" else args.model
        for slots, clients in ((args.slots, args.clients), (1, [8])):
            with served(model, slots) as (url, process, ready):
                measure(url, process, 1, 2)  # does not count
                for many in clients:
                    row = measure(url, process, many, max(args.requests, many))
                    rows.append({"slots": slots, "ready_seconds": round(ready, 1), **row})
                    print(json.dumps(rows[-1]), flush=True)
    facts: dict[str, Any] = {"model": args.model, "tokens": TOKENS, "rows": rows}
    at_8 = [row for row in rows if row["clients"] == 8]
    if len(at_8) == 2:
        for name, key, up in (
            ("wall", "requests_per_second", 1),
            ("cpu", "server_cpu_seconds_per_request", -1),
        ):
            facts[f"continuous over one at a time, 8 clients, {name}"] = round(
                (at_8[0][key] / at_8[1][key]) ** up, 2
            )
    facts |= {"load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count(),
              "versions": {"python": platform.python_version(), "jax": version("jax")}}  # fmt: skip
    print(json.dumps(facts, indent=1))
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
