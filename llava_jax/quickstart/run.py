"""The quickstart from its first picture to its last answer, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.quickstart import questions
from llava_jax.quickstart.curves import draw_curves
from llava_jax.quickstart.dataset import make_dataset, question_rows, write_pictures
from llava_jax.quickstart.scenes import render, sample
from llava_jax.quickstart.sheet import Answered, Card, write_sheet

PICTURES, HELD_OUT = 16_000, 300
EXAMPLES, EXAMPLE_SIZE, EXAMPLE_SEED = 6, 256, 2_000_003


def quickstart(out: Path, *, seed: int = 0, fast: bool = False, quiet: bool = False) -> dict:
    """Runs everything in the work directory `out`, going on where an earlier run stopped.

    Returns the report that is also written to out/report.json: exact match by kind and its mean,
    seconds by step, and the paths of what was made.
    Raises ConfigError where `out` holds a run with other settings.
    """
    from llava_jax.model import load
    from llava_jax.train.evaluate import Question, exact_match
    from llava_jax.train.stages import run_stages

    out.mkdir(parents=True, exist_ok=True)
    _same_settings(out, {"seed": seed, "fast": fast})
    clock = Clock()

    with clock.step("pictures and questions"):
        make_dataset(out / "data", train=PICTURES, held_out=HELD_OUT, seed=seed)

    with clock.step("tower, language model, stage 1, stage 2"):
        trained = run_stages(_config(out, seed, fast), out, quiet=quiet)
        draw_curves(out)

    with clock.step("held-out questions"):
        model = load(trained)
        asked = [
            Question(str(out / "data" / row["image"]), row["text"], row["answer"], row["kind"])
            for row in map(json.loads, (out / "data" / "heldout.jsonl").open(encoding="utf-8"))
        ]
        scores = exact_match(model, asked, quiet=quiet)

    with clock.step("example pictures"):
        cards = answer_examples(model, out, seed)
        note = f"{len(asked):,} questions about {HELD_OUT} pictures it never saw: {scores['mean']:.1%} right"
        sheet = write_sheet(cards, scores["kinds"], out, note)

    with clock.step("export, also in Hugging Face format"):
        folder = model.save(out / "export", overwrite=True)
        hf = model.save(out / "hf", to="hf", overwrite=True)

    report = {
        "exact_match": scores["kinds"],
        "mean": scores["mean"],
        "questions": scores["n"],
        "wrong": scores["wrong"],
        "seconds": clock.seconds,
        "model": str(folder),
        "hf": str(hf),
        "sheet": [str(path) for path in sheet],
    }
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    print_report(report, cards, out)
    return report


class Clock:
    """Times the steps and says when one begins."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times what happens within, under `name`."""
        print(f"[{len(self.seconds) + 1}/5] {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 1)


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / "quickstart.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise ConfigError(
            f"{out} holds a quickstart with other settings ({path.read_text()})",
            fix="use another --out, or delete it",
        )
    path.write_text(json.dumps(settings))


def _config(out: Path, seed: int, fast: bool) -> Any:
    """configs/quickstart.py for this run."""
    from llava_jax.train.config_file import load_config

    config = load_config("quickstart", [f"--config.data_folder={out / 'data'}"])
    config.seed = seed
    if fast:
        for settings, name in (
            (config.tiny, "tower_steps"),
            (config.tiny, "language_steps"),
            (config.stages.stage1, "steps"),
            (config.stages.stage2, "steps"),
        ):
            settings[name] //= 3
    return config


def answer_examples(model: Any, out: Path, seed: int) -> list[Card]:
    """Draws a few larger pictures into out/examples and asks every kind of question about each."""
    from PIL import Image

    from llava_jax.model import Request

    scenes = sample(EXAMPLES, seed + EXAMPLE_SEED)
    paths = write_pictures(render(scenes, EXAMPLE_SIZE), out, "examples")
    rows = list(question_rows(scenes, paths, seed + EXAMPLE_SEED))
    requests = [Request(row["text"], str(out / row["image"]), max_new_tokens=96) for row in rows]
    replies = model.generate_batch(requests, batch_size=64)
    answers = [
        Answered(row["kind"], row["text"].split("\n")[0], reply.text.strip(), row["answer"])
        for row, reply in zip(rows, replies, strict=True)
    ]
    each = len(questions.KINDS)
    return [
        Card(Image.open(out / path), answers[i * each : (i + 1) * each])
        for i, path in enumerate(paths)
    ]


def print_report(report: dict[str, Any], cards: list[Card], out: Path) -> None:
    """What a person wants to know, on the terminal."""
    for number, card in enumerate(cards, 1):
        print(f"\nexamples/{number - 1:05d}.png")
        for item in random.Random(number).sample(list(card.answers), 3):
            wrong = "" if item.right else f"   (should be {item.truth})"
            print(f"  {item.question}\n    {item.answer}{wrong}")
    print(f"\nexact match on {report['questions']:,} held-out questions")
    for kind, score in report["exact_match"].items():
        print(f"  {kind:14} {score:6.1%}  {'█' * round(30 * score)}")
    print(f"  {'mean':14} {report['mean']:6.1%}")
    total = sum(report["seconds"].values())
    print(
        f"\n{total:.0f} s in all: " + ", ".join(f"{n} {s:g}" for n, s in report["seconds"].items())
    )
    print(f"\nthe sheet        {out / 'sheet.html'}, {out / 'sheet.png'}")
    print(f"the loss         {out / 'loss.png'}")
    print(f"the model        {report['model']}, for Hugging Face {report['hf']}")
    print(
        f"talk with it     llava-jax chat --model {report['model']} --image {out / 'examples/00000.png'}"
    )
