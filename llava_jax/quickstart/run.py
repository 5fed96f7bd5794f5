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
from llava_jax.quickstart.cards import Card, Sheet
from llava_jax.quickstart.curves import draw_curves, read_curves
from llava_jax.quickstart.dataset import make_dataset
from llava_jax.quickstart.examples import answer_examples, wrong_cards, wrong_note
from llava_jax.quickstart.sheet import write_sheet

PICTURES, HELD_OUT = 16_000, 300
TRAINING = "tower, language model, stage 1, stage 2"
STEPS = 5


def quickstart(out: Path, *, seed: int = 0, fast: bool = False, quiet: bool = False) -> dict:
    """Runs everything in the work directory `out`, going on where an earlier run stopped.

    Returns the report that is also written to out/report.json: exact match by kind and its mean,
    seconds by step, and the paths of what was made.
    Raises ConfigError where `out` holds a run with other settings.
    """
    from llava_jax.model import load
    from llava_jax.train.stages import run_stages

    out.mkdir(parents=True, exist_ok=True)
    _same_settings(out, {"seed": seed, "fast": fast})
    clock = Clock(out / "seconds.json")
    data = out / "data"

    with clock.step("pictures and questions"):
        make_dataset(data, train=PICTURES, held_out=HELD_OUT, seed=seed)

    with clock.step(TRAINING, goes_on=True):
        trained = run_stages(_config(out, seed, fast), out, quiet=quiet)
        draw_curves(out)

    with clock.step("held-out questions"):
        model = load(trained)
        scores, follow_ups = score_held_out(model, data, quiet=quiet)

    with clock.step("example pictures"):
        cards = answer_examples(model, out, seed)

    with clock.step("export, also in Hugging Face format"):
        folder = model.save(out / "export", overwrite=True)
        hf = model.save(out / "hf", to="hf", overwrite=True)

    command = f"llava-jax chat --model {folder} --image {out / 'examples/00000.png'}"
    facts = (("size", _size(model, folder)), ("time", clock.words()))
    sheet = Sheet(
        cards,
        {**scores["kinds"], "follow-ups": follow_ups["mean"]},
        _note(scores, follow_ups),
        wrong_cards([*scores["wrong"], *follow_ups["wrong"]]),
        wrong_note(scores, follow_ups),
        read_curves(out),
        facts,
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
    (out / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False), "utf-8")
    print_report(report, cards, out)
    print(f"talk with it     {command}")
    return report


class Clock:
    """Times the steps and says when one begins. `path` keeps the seconds for a run that goes on."""

    def __init__(self, path: Path):
        self._path = path
        self._before = json.loads(path.read_text()) if path.exists() else {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def step(self, name: str, *, goes_on: bool = False) -> Iterator[None]:
        """Times what happens within, under `name`. goes_on: it is not done twice, so time adds up."""
        print(f"[{len(self.seconds) + 1}/{STEPS}] {name}", flush=True)
        start = time.perf_counter()
        before = self._before.get(name, 0.0) if goes_on else 0.0
        try:
            yield
        finally:
            self.seconds[name] = round(before + time.perf_counter() - start, 1)
            self._path.write_text(json.dumps({**self._before, **self.seconds}))

    def words(self) -> str:
        """The time in all, and of each step."""
        each = "; ".join(f"{name}: {seconds:.0f} s" for name, seconds in self.seconds.items())
        minutes, seconds = divmod(round(sum(self.seconds.values())), 60)
        return f"{minutes} min {seconds} s ({each})"


def score_held_out(model: Any, data: Path, *, quiet: bool) -> tuple[dict, dict]:
    """Scores of the held-out questions, each alone, and of those that follow others."""
    from llava_jax.train.evaluate import Question, conversation_match, exact_match, questions_of

    rows = map(json.loads, (data / "heldout.jsonl").open(encoding="utf-8"))
    alone = [Question(str(data / r["image"]), r["text"], r["answer"], r["kind"]) for r in rows]
    records = json.loads((data / "heldout_talks.json").read_text("utf-8"))
    talks = [questions_of(record, data) for record in records]
    return exact_match(model, alone, quiet=quiet), conversation_match(model, talks, quiet=quiet)


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
    from llava_jax.train.config import load_config

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
    follow_ups = report["follow_ups"]
    print(f"\nexact match on {follow_ups['n']:,} follow-up questions in conversations")
    for kind, score in follow_ups["kinds"].items():
        print(f"  {kind:14} {score:6.1%}  {'█' * round(30 * score)}")
    print(f"  {'mean':14} {follow_ups['mean']:6.1%}")
    total = sum(report["seconds"].values())
    print(
        f"\n{total:.0f} s in all ("
        + "; ".join(f"{n}: {s:.0f} s" for n, s in report["seconds"].items())
        + ")"
    )
    print(f"\nthe sheet        {out / 'sheet.html'}, {out / 'sheet.png'}")
    print(f"the loss         {out / 'loss.png'}")
    print(f"the model        {report['model']}, for Hugging Face {report['hf']}")
