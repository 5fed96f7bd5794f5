"""The quickstart from its first picture to its last answer, to be read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.quickstart.cards import WRONG_CARDS, Card, Curve, Sheet, make_cards, wrong_note
from llava_jax.quickstart.dataset import make_dataset, question_rows, write_pictures
from llava_jax.quickstart.scenes import render, sample
from llava_jax.quickstart.sheet import write_sheet
from llava_jax.util import read_json, write_json

PICTURES, HELD_OUT = 16_000, 300
EXAMPLES, EXAMPLE_SIZE, EXAMPLE_SEED = 6, 256, 2_000_003
STAGES = {"stage1": "stage 1: projector, captions", "stage2": "stage 2: conversations"}
ROWS = 128  # of a batch of questions: one number for all, so that few shapes are compiled


def quickstart(out: Path, *, seed: int = 0, fast: bool = False, quiet: bool = False) -> dict:
    """Runs everything in the work directory `out`, going on where an earlier run stopped.

    Returns the report that is also written to out/report.json: exact match by kind and its mean,
    seconds per step, and the paths of what was made.
    Raises ConfigError for a seed below 0, and where `out` holds a run with other settings.
    """
    from llava_jax.model import load
    from llava_jax.train.stages import run_stages

    if seed < 0:
        raise ConfigError(f"--seed {seed} is below 0")
    out.mkdir(parents=True, exist_ok=True)
    _check_settings(out, {"seed": seed, "fast": fast})
    clock = Clock(out / "seconds.json", steps=4)
    data = out / "data"

    with clock.step("pictures and questions"):
        make_dataset(data, train=PICTURES, held_out=HELD_OUT, seed=seed)
        examples = _make_examples(out, seed)

    with clock.step("stage 1 and stage 2", resumes=True):
        trained = run_stages(_config(out, seed, fast), out, quiet=quiet)

    with clock.step("questions about new pictures"):
        model = load(trained)
        cards, scores, follow_ups = ask(model, data, examples, quiet=quiet)

    with clock.step("export, also in Hugging Face format"):
        folder = model.save(out / "export", overwrite=True)
        hf = model.save(out / "hf", to="hf", overwrite=True)

    command = f"llava-jax chat --model {folder} --image {out / 'examples/00000.png'}"
    sheet = Sheet(
        cards,
        {**scores["kinds"], "follow-ups": follow_ups["mean"]},
        _note(scores, follow_ups),
        make_cards([*scores["wrong"], *follow_ups["wrong"]], titles=True)[:WRONG_CARDS],
        wrong_note(scores, follow_ups),
        _curves(out),
        (("size", _size(model, folder)), ("time", clock.words())),
        command,
    )
    report = {
        "exact_match": scores["kinds"],
        "mean": scores["mean"],
        "questions": scores["n"],
        "wrong": scores["wrong"],
        "follow_ups": follow_ups,
        "seconds": clock.seconds,
        "model": str(folder),
        "hf": str(hf),
        "sheet": [str(path) for path in write_sheet(sheet, out)],
    }
    write_json(out / "report.json", report, indent=1, ensure_ascii=False)
    print_report(report, cards, out, clock)
    print(f"talk with it     {command}")
    return report


class Clock:
    """Times the steps and says when one begins. `path` keeps the seconds for a run that resumes."""

    def __init__(self, path: Path, steps: int):
        self._path, self._steps = path, steps
        self._before = read_json(path, ConfigError) if path.exists() else {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, *, resumes: bool = False) -> Iterator[None]:
        """Times what happens within, under `name`. resumes: no work is done twice, so time adds up."""
        print(f"[{len(self.seconds) + 1}/{self._steps}] {name}", flush=True)
        start = time.perf_counter()
        before = self._before.get(name, 0.0) if resumes else 0.0
        try:
            yield
        finally:
            self.seconds[name] = round(before + time.perf_counter() - start, 1)
            write_json(self._path, {**self._before, **self.seconds})

    def words(self) -> str:
        """The time in all, and of each step."""
        each = "; ".join(f"{name}: {seconds:.0f} s" for name, seconds in self.seconds.items())
        minutes, seconds = divmod(round(sum(self.seconds.values())), 60)
        return f"{minutes} min {seconds} s ({each})"


# Asking ---------------------------------------------------------------------------------------------


def ask(
    model: Any, data: Path, examples: Sequence[Any], *, quiet: bool
) -> tuple[list[Card], dict[str, Any], dict[str, Any]]:
    """(cards of the examples, scores of the held-out questions, scores of follow-up questions)."""
    from llava_jax.train.evaluate import answers, conversation_match, questions_of, score

    alone = _questions(map(json.loads, (data / "heldout.jsonl").open(encoding="utf-8")), data)
    replies = answers(model, [*examples, *alone], batch_size=ROWS, quiet=quiet)
    said = iter(replies)
    cards = make_cards([{**dataclasses.asdict(q), "said": next(said)} for q in examples])
    records = read_json(data / "heldout_talks.json")
    talks = [questions_of(record, data) for record in records]
    follow_ups = conversation_match(model, talks, batch_size=ROWS, quiet=quiet)
    return cards, score(alone, replies[len(examples) :]), follow_ups


def _make_examples(out: Path, seed: int) -> list[Any]:
    """Draws a few larger pictures into out/examples; every kind of question about each."""
    scenes = sample(EXAMPLES, seed + EXAMPLE_SEED)
    paths = write_pictures(render(scenes, EXAMPLE_SIZE), out, "examples")
    return _questions(question_rows(scenes, paths, seed + EXAMPLE_SEED), out)


def _questions(rows: Any, folder: Path) -> list[Any]:
    from llava_jax.train.evaluate import Question

    return [Question(str(folder / r["image"]), r["text"], r["answer"], r["kind"]) for r in rows]


# Words ----------------------------------------------------------------------------------------------


def _curves(out: Path) -> list[Curve]:
    from llava_jax.train.log import METRICS, read_metrics

    return [
        Curve(title, [row["loss"] for row in read_metrics(out / name / METRICS)])
        for name, title in STAGES.items()
    ]


def _note(scores: dict[str, Any], follow_ups: dict[str, Any]) -> str:
    return (
        f"{scores['n']:,} questions about {HELD_OUT} pictures it never saw: {scores['mean']:.1%} "
        f"right; {follow_ups['n']:,} follow-up questions in conversations: "
        f"{follow_ups['mean']:.1%} right"
    )


def _size(model: Any, folder: Path) -> str:
    count = sum(value.size for _, value in model.generator.params())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{count:,} parameters, {size / 1e6:.1f} MB on disk"


def _check_settings(out: Path, settings: dict[str, Any]) -> None:
    path = out / "quickstart.json"
    if path.exists() and read_json(path, ConfigError) != settings:
        raise ConfigError(
            f"{out} holds a quickstart with other settings ({path.read_text()})",
            fix="use another --out, or delete it",
        )
    write_json(path, settings)


def _config(out: Path, seed: int, fast: bool) -> Any:
    """configs/quickstart.py for this run."""
    from llava_jax.train.config import load_config

    config = load_config("quickstart", [f"--config.data_folder={out / 'data'}"])
    config.seed = seed
    if fast:
        config.stages.stage2.steps //= 3
    return config


def print_report(report: dict[str, Any], cards: list[Card], out: Path, clock: Clock) -> None:
    """Prints what a person wants to know."""
    for i, card in enumerate(cards):
        print(f"\nexamples/{i:05d}.png")
        for result in random.Random(i).sample(list(card.results), 3):
            wrong = "" if result.right else f"   (should be {result.truth})"
            print(f"  {result.question}\n    {result.answer}{wrong}")
    follow_ups = report["follow_ups"]
    for what, count, kinds, mean in (
        ("held-out questions", report["questions"], report["exact_match"], report["mean"]),
        (
            "follow-up questions in conversations",
            follow_ups["n"],
            follow_ups["kinds"],
            follow_ups["mean"],
        ),
    ):
        print(f"\nexact match on {count:,} {what}")
        for kind, value in kinds.items():
            print(f"  {kind:14} {value:6.1%}  {'█' * round(30 * value)}")
        print(f"  {'mean':14} {mean:6.1%}")
    print(f"\n{clock.words()}")
    print(f"\nthe sheet        {out / 'sheet.html'}, {out / 'sheet.png'}")
    print(f"the loss         {out / 'loss.png'}")
    print(f"the model        {report['model']}, for Hugging Face {report['hf']}")
