"""What the server stands: neighbours, nonsense, slow clients, words that look like tokens.

    python -m bench.attack isolation --out bench/results/serve_isolation.json

Each of WHAT asks a server of the shipped tiny model on loopback, and exits with 1 where a promise of
docs/serving.md does not hold. tests/serve/test_attack.py runs each with small counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import attack_inputs as inputs
from bench import attack_parts as parts
from bench.serving import running

DEFAULTS: dict[str, tuple[Callable[..., dict[str, Any]], int, dict[str, Any]]] = {
    "isolation": (parts.isolation, 3200, {"slots": 8, "waiting": 256}),
    "fuzz": (parts.fuzz, 10_000, {"slots": 4, "max_body_bytes": 300_000}),
    "schema": (parts.schema, 200, {"slots": 4, "waiting": 256}),
    "slow": (parts.slow, 200, {"slots": 4}),
    "pictures": (inputs.pictures, 164, {"slots": 4}),
    "answers": (inputs.answers, 50, {"slots": 4}),
    "words": (parts.words, 1000, {"slots": 4}),
    "soak": (parts.soak, 20 * 60, {"slots": 8, "waiting": 256}),
}
"""WHAT -> (what asks, how many requests, examples, clients, files, schemas, texts or seconds, settings of the server)."""


def main() -> int:
    """Runs one of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=DEFAULTS)
    parser.add_argument("--count", type=int, help="how many, or seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    args = parser.parse_args()
    act, count, settings = DEFAULTS[args.what]
    count = args.count or count
    wall, cpu = time.monotonic(), time.process_time()
    with running(**settings) as server:
        found = act(server, count, args.seed)
    facts = {
        "what": args.what,
        "count": count,
        "seed": args.seed,
        **found,
        "seconds": round(time.monotonic() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "jax": version("jax")},
    }
    text = json.dumps(facts, indent=1)
    print(text)
    if args.out:
        args.out.write_text(f"{text}\n", encoding="utf-8")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
