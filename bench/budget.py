"""Token budgets: what prompts, caches and whole requests cost with fewer features of a picture, and the right answers.

    python -m bench budgets                    # 65 M parameters, pictures of 336 pixels
    python -m bench budgets --size 7b --batch 64   # on a GPU

One process holds the model with each budget, and they take turns. A prompt is one picture and `--text` tokens;
requests are answered `--batch` at a time with `--tokens` tokens each. The right answers are of the shipped
model, which has 16 features of a picture, to the quickstart's held-out questions.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from typing import Any

from bench import frame, models
from bench.infer import Ours, ours_alone

RULES = ("visionzip", "divprune", "pool")
SMALL = (12, 8, 4)  # of the shipped model's 16


def main(name: str, words: list[str]) -> int:
    """Prints both tables."""
    parser = frame.parser(__doc__)
    parser.add_argument("--size", choices=models.SIZES, default="65m-336")
    parser.add_argument("--budgets", type=int, nargs="+", default=[192, 128, 64])
    parser.add_argument("--by", choices=RULES, default="visionzip")
    parser.add_argument("--batch", type=int, default=8, help="requests that are answered together")
    parser.add_argument("--text", type=int, default=64, help="tokens of text in a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="that an answer has")
    parser.add_argument(
        "--pictures", type=int, default=40, help="that questions are about; 0: none"
    )
    args = parser.parse_args(words)
    with ours_alone("bench.budget:Budgets", args) as systems:
        speed = _speed(systems, args)
        right = systems.ask("llava_jax", "right")["gave"] if args.pictures else []
    head = ["features", "positions", "cache, MB", "prefill", "median", "of all", "requests a second", "median"]  # fmt: skip
    frame.show(head, speed)
    frame.show(["features", *(f"{by}, {at}" for by in RULES for at in ("consecutive", "original"))], right)  # fmt: skip
    frame.record(name, args, speed=speed, right=right)
    return 0


def _speed(systems: frame.Systems, args: argparse.Namespace) -> list[list[Any]]:
    kind = "cpu_seconds" if frame.ON_CPU else "seconds"
    facts = systems.ask("llava_jax", "facts")["gave"]  # compiles too
    turns: dict[str, list[tuple[float, float]]] = {n: [] for n in facts}
    for _ in range(args.repeats):
        for n in facts:
            one = systems.ask("llava_jax", "answer", n, 1, 1)[kind]
            many = systems.ask("llava_jax", "answer", n, args.batch, args.tokens)[kind]
            turns[n].append((one, args.batch / many))
    rows, whole = [], min(one for one, _ in next(iter(turns.values())))
    for n, found in turns.items():
        first, rate = (frame.spread([t[i] for t in found]) for i in (0, 1))
        times = [first["min"] * 1e3, first["median"] * 1e3, f"1/{whole / first['min']:.2f}"]
        rows.append([*facts[n], *times, max(rate["all"]), rate["median"]])
    return rows


class Budgets:
    """The random model with each budget, and the shipped one."""

    def __init__(self, args: argparse.Namespace):
        from llava_jax.config import TokenBudget

        self.args, made = args, {0: None, **{n: TokenBudget(n, args.by) for n in args.budgets}}
        self.each = {}
        for n, budget in made.items():
            own = argparse.Namespace(**{**vars(args), "budget": budget})
            self.each[str(n)] = Ours(own)

    def facts(self) -> dict[str, list[Any]]:
        """{budget: [features, positions of a prompt, MB of its keys and values]}; all is compiled then."""
        found = {}
        for n, ours in self.each.items():
            self.answer(n, 1, 1)
            self.answer(n, self.args.batch, self.args.tokens)
            many = ours.config.image_tokens
            length = many + self.args.text
            found[n] = [many, length, length * ours.generator.entry_bytes / 1e6]
        return found

    def answer(self, budget: str, batch: int, tokens: int) -> int:
        """Answers prompts that were not asked before."""
        return self.each[budget].answer(batch, tokens)

    def right(self) -> list[list[Any]]:
        """For each budget of the shipped model, the share of right answers by rule and positions."""
        import llava_jax
        from llava_jax.quickstart.dataset import make_dataset
        from llava_jax.train.evaluate import Question, answers, score

        with tempfile.TemporaryDirectory() as tmp:
            folder = make_dataset(tmp, train=1, held_out=self.args.pictures)
            rows = map(json.loads, (folder / "heldout.jsonl").read_text().splitlines())
            asked = [
                Question(str(folder / r["image"]), r["text"], r["answer"], r["kind"]) for r in rows
            ]

            def share(**how: Any) -> str:
                model = llava_jax.load("tiny", **how)
                found = score(asked, answers(model, asked, batch_size=64, quiet=True))
                return f"{found['right'] / found['n']:.1%}"

            table: list[list[Any]] = [[16, *[share()] * 2 * len(RULES)]]
            for n in SMALL:
                kinds = [(by, at) for by in RULES for at in ("consecutive", "original")]
                table.append([n, *(share(image_tokens=n, image_tokens_by=by, image_positions=at) for by, at in kinds)])  # fmt: skip
        return table
