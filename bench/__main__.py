"""Every benchmark by one command.

    python -m bench --list
    python -m bench decode --batch 1 --out decode.json
    python -m bench prefill decode --repeats 5
    python -m bench --all --out-dir results

Each prints a table and, with --out (of one) or --out-dir (of several), writes JSON with machine, versions,
settings, commit, date and load. Other options go to every benchmark that is named.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time

ENTRIES: dict[str, tuple[str, str]] = {
    "machine": ("bench.machine", "matmul peak, bandwidths of a copy and a matvec"),
    "train": ("bench.train", "an optimizer step, beside transformers"),
    "prefill": ("bench.infer", "prompts read, tower included, beside transformers"),
    "decode": ("bench.infer", "a decoded token, beside transformers and the bandwidth's limit"),
    "budgets": ("bench.budget", "fewer features of a picture: prefill, cache, requests a second, right answers"),
    "lookup": ("bench.lookup", "a token with prompt lookup, and how many one pass gives, by kind of question"),
    "requests": ("bench.infer", "requests a second over slots that are taken anew, beside transformers"),
    "pictures": ("bench.data", "JPEG bytes to normalised pixels, beside transformers"),
    "load": ("bench.start", "weights read from a file, and the memory that takes, beside transformers"),
    "start": ("bench.start", "process start to loaded model and first token, compile cache cold and warm"),
    "compile": ("bench.compile", "compile time, and the programs of mixed requests"),
    "aot": ("bench.aot", "bytes of a decoded token in programs compiled for absent TPUs and GPUs"),
    "checkpoint": ("bench.checkpoint", "a checkpoint of 1 GB saved and restored, beside orbax"),
}  # fmt: skip
"""{name: (module, what it measures)}. A module's main takes the name and the words after it."""


def main(words: list[str]) -> int:
    """Runs the named benchmarks in order; the number of those that failed."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, options = words[:count], words[count:]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--out-dir")
    given, options = parser.parse_known_args(options)
    names = list(ENTRIES) if given.all else names
    if given.list or not names:
        print(__doc__)
        for name, (_, what) in ENTRIES.items():
            print(f"  {name:12}{what}")
        return 0 if given.list else 2
    if wrong := [name for name in names if name not in ENTRIES]:
        print(f"there is no benchmark {wrong[0]}: --list names them", file=sys.stderr)
        return 2
    folder = given.out_dir
    if any(word.partition("=")[0] == "--out" for word in options) and (folder or len(names) > 1):
        print("--out is of one benchmark alone: --out-dir has a file of each", file=sys.stderr)
        return 2
    if len(names) == 1 and folder is None:
        return importlib.import_module(ENTRIES[names[0]][0]).main(names[0], options)
    failed = 0
    for name in names:
        print(f"\n{name}: {ENTRIES[name][1]}", flush=True)
        more = ["--out", os.path.join(folder, f"{name}.json")] if folder else []
        begun, cores = time.monotonic(), _cores()
        try:
            failed += importlib.import_module(ENTRIES[name][0]).main(name, [*options, *more]) != 0
        except SystemExit as end:  # one that fails does not take the others along
            print(f"{name} failed: {end}", file=sys.stderr)
            failed += 1
        _cores(cores)
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
    return failed


def _cores(back: set[int] | None = None) -> set[int]:
    """The cores that this process may use; gives some back that a benchmark took away."""
    if not hasattr(os, "sched_setaffinity"):
        return set()
    if back:
        os.sched_setaffinity(0, back)
    return os.sched_getaffinity(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
