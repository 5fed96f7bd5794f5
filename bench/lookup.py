"""Prompt lookup: a decoded token with so many guessed in every pass, and tokens a pass by kind of question.

    python -m bench lookup                      # 65 M parameters
    python -m bench lookup --size 7b --batch 1  # on a GPU

Random weights soon repeat themselves, which is as well as guessing can do; the first table says how often the
model ran, and what a token cost. The second is of the shipped model and the quickstart's held-out questions,
asked one by one: a pass without guesses gives one token.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from bench import frame, models
from bench.infer import Ours, ours_alone


def main(name: str, words: list[str]) -> int:
    """Prints both tables. Ends the program if guessing changes an answer."""
    parser = frame.parser(__doc__)
    parser.add_argument("--size", choices=models.SIZES, default="65m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--guesses", type=int, nargs="+", default=[0, 4, 8])
    parser.add_argument("--text", type=int, default=64, help="tokens of text in a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="that a timed answer has")
    parser.add_argument("--pictures", type=int, default=20, help="that questions are about")
    args = parser.parse_args(words)
    with ours_alone("bench.lookup:Lookup", args) as systems:
        rows = [row for batch in args.batch for row in _rows(systems, args, batch)]
        kinds = []
        if args.pictures:
            kinds = systems.ask("llava_jax", "kinds", max(args.guesses))["gave"]
    frame.show(["rows", "guesses", "tokens a pass", "a token, ms", "median", "of none"], rows)
    frame.show(["kind of question", "tokens", "passes", "tokens a pass"], kinds)
    frame.record(name, args, rows=rows, kinds=kinds)
    return 0


def _rows(systems: frame.Systems, args: argparse.Namespace, batch: int) -> list[list[Any]]:
    """A line for each number of guesses; answers long and short in turns, as in bench.infer."""
    kind = "cpu_seconds" if frame.ON_CPU else "seconds"
    taken: dict[int, list[float]] = {n: [] for n in args.guesses}
    passes: dict[int, int] = dict.fromkeys(args.guesses, 0)
    for n in args.guesses:
        systems.ask("llava_jax", "check", batch, n)
    for _ in range(args.repeats):
        for n in args.guesses:
            short, long = (
                systems.ask("llava_jax", "guess", batch, tokens, n)
                for tokens in (1, args.tokens + 1)
            )
            taken[n].append((long[kind] - short[kind]) / args.tokens)
            passes[n] += long["gave"]
    rows, none = [], min(taken[args.guesses[0]])
    for n, times in taken.items():
        t = frame.spread(times)
        rows.append([batch, n, args.repeats * args.tokens / passes[n], t["min"] * 1e3, t["median"] * 1e3, f"{t['min'] / none:.2f}"])  # fmt: skip
    return rows


class Lookup(Ours):
    """The engine, asked with prompt_lookup."""

    def guess(self, batch: int, tokens: int, guesses: int) -> int:
        """Answers prompts that were not asked before; how often the model ran for them after the first token."""
        self.turn += 1
        counts = self._engine(batch).counts
        before = counts["lookup_passes"]
        self._jobs(batch, self.turn, tokens, prompt_lookup=guesses)
        return counts["lookup_passes"] - before if guesses else tokens - 1

    def check(self, batch: int, guesses: int) -> None:
        """Ends the program if guessing changes an answer; compiles too."""
        alone, guessed = (
            self._jobs(batch, 0, self.args.tokens + 1, prompt_lookup=n) for n in (0, guesses)
        )
        if [job.ids for job in alone] != [job.ids for job in guessed]:
            raise SystemExit("prompt lookup changes an answer")

    def kinds(self, guesses: int) -> list[list[Any]]:
        """[kind, tokens of its answers, passes, tokens a pass] of the shipped model."""
        import llava_jax
        from llava_jax.quickstart.dataset import make_dataset

        found: dict[str, list[int]] = {}
        model = llava_jax.load("tiny")
        with tempfile.TemporaryDirectory() as tmp:
            folder = make_dataset(tmp, train=1, held_out=self.args.pictures)
            for row in map(json.loads, (folder / "heldout.jsonl").read_text().splitlines()):
                chat = model.chat(prompt_lookup=guesses)
                for times in ("", ", asked again"):
                    counts = model.engine().counts
                    before = counts["lookup_passes"]
                    shown = [] if times else [folder / row["image"]]
                    reply = chat.say(row["text"], shown)
                    one = found.setdefault(f"{row['kind']}{times}", [0, 0])
                    one[0] += len(reply.ids) - 1  # the first token is the prompt's
                    one[1] += counts["lookup_passes"] - before
        return [[kind, *n, f"{n[0] / max(n[1], 1):.2f}"] for kind, n in sorted(found.items())]
