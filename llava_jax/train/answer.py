"""Questions that a run asks its own model while it trains: exact match, benchmarks, and samples to look at."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax import storage
from llava_jax.data.check import open_data
from llava_jax.data.settings import DataSettings
from llava_jax.errors import LlavaError
from llava_jax.images.decode import open_image
from llava_jax.model import LlavaModel
from llava_jax.text.labels import training_version
from llava_jax.train.distributed import gather, is_main, together
from llava_jax.train.evalsets import EvalSet, benchmark_settings
from llava_jax.train.evaluate import Question, answers, questions_of, score
from llava_jax.train.model_io import Opened
from llava_jax.train.step import Params, computed_with
from llava_jax.train.supervise import alive

log = logging.getLogger(__name__)

LONGEST, SIDE = 128, 336
"""Of a sample that is looked at: tokens of an answer, pixels of the picture's longer side."""


@dataclass(frozen=True)
class Shown:
    """A question that is answered at every validation. picture: its file below the work directory."""

    id: str
    question: Question
    picture: str


class Asker:
    """Asks the questions of a run's validation sets. All processes ask alike, over the run's mesh.

    Generation is compiled once; between validations it holds no parameters.
    """

    def __init__(
        self, config: Any, opened: Opened, mesh: Mesh, workdir: Path, sets: Sequence[EvalSet]
    ):
        self._config, self._opened, self._mesh, self._workdir = config, opened, mesh, workdir
        self._sets, self._model = sets, None
        self._limits = DataSettings.read(config.data).image_limits
        self._asked: dict[str, list[Question]] = {}
        self._shown: dict[str, list[Shown]] = {}
        together(self._read)

    def _read(self) -> None:
        caption = training_version(self._config.data.version).kind == "plain"
        for s in self._sets:
            if not (s.path or s.held) or not (s.ask or self._config.eval_samples):
                continue
            data = open_data({**self._config.data, **s.settings()}, say=False)
            questions, shown = [], []
            for n, (record, file, name) in enumerate(zip(data.records, data.file, data.ids)):
                if len(questions) >= s.ask and len(shown) >= self._config.eval_samples:
                    break
                if int(data.index[n]) in data.bad:
                    continue
                folder = data.files[file].image_folder
                found = questions_of(record, folder, self._config.data.turns, caption=caption)
                questions += found
                if found and len(shown) < self._config.eval_samples:
                    picture = f"samples/{s.name}-{len(shown)}.jpg" if found[0].image else ""
                    shown.append(Shown(name, found[0], picture))
            self._asked[s.name], self._shown[s.name] = questions[: s.ask], shown

    def ask(
        self,
        step: int,
        trained: Params,
        frozen: Params,
        found: dict[str, Any],
        run_log: Any,
        stop: threading.Event,
    ) -> bool:
        """Adds the scores of each set to `found`, and writes what was said about the samples.

        False where a process was asked to stop, which is looked at before each set.
        """
        if not any((*self._asked.values(), *self._shown.values())) and not any(
            s.benchmark for s in self._sets
        ):
            return True
        # The loop's mesh is not the generator's business, which sets its own.
        with jax.set_mesh(Mesh(np.empty((), object), ())):
            return self._ask(step, self._with(trained, frozen), found, run_log, stop)

    def _ask(
        self, step: int, model: LlavaModel, found: dict[str, Any], run_log: Any, stop: Any
    ) -> bool:
        try:
            for s in self._sets:
                alive(steps=False)
                if any(gather(stop.is_set())):
                    return False
                if questions := self._asked.get(s.name):
                    result = score(questions, answers(model, questions, quiet=True))
                    found[s.name] |= {"exact_match": result["mean"] or 0.0, "asked": result["n"]}
                if s.benchmark:
                    found[s.name] |= self._benchmark(model, s, step)
                shown = self._shown.get(s.name, [])
                said = answers(model, [x.question for x in shown], quiet=True, longest=LONGEST)
                for sample, answer in zip(shown, said):
                    run_log.answer(self._row(step, s, sample, answer))
            return True
        finally:
            model.drop_params()

    def _with(self, trained: Params, frozen: Params) -> LlavaModel:
        """The model with these parameters."""
        params = {**frozen, **computed_with(trained, jnp.dtype(self._config.dtype))}
        if self._model is None:
            more: Any = {"mesh": self._mesh if self._mesh.size > 1 else None}
            tokenizer, config = self._opened.tokenizer, self._opened.config
            self._model = LlavaModel(config, params, tokenizer, limits=self._limits, **more)
        else:
            self._model.generator.set_params(params)
        return self._model

    def _benchmark(self, model: LlavaModel, s: EvalSet, step: int) -> dict[str, Any]:
        """{benchmark: its headline number} on the first questions."""
        from llava_jax.eval.run.command import run_task
        from llava_jax.eval.task import get_task

        task = get_task(s.benchmark)
        out = self._workdir / "eval" / s.name / f"{step:07d}"
        name = f"{self._config.name}, step {step}"
        settings = benchmark_settings(s, out, name, writes=is_main(), show_progress=False)
        # The main one alone scores; what it raises is to be raised by all.
        result = together(lambda: run_task(model, task, settings))
        value = gather(result["totals"][result["headline"]] if result else None)[0]
        if value is None:
            log.warning("data.eval %s: %s gave no score", s.name, s.benchmark)
            return {}
        return {s.benchmark: float(value)}

    def _row(self, step: int, s: EvalSet, sample: Shown, answer: str | None) -> dict[str, Any]:
        """What is logged of a sample; writes its picture the first time."""
        picture = self._workdir / sample.picture if sample.picture else None
        if picture and is_main() and not picture.exists():
            self._draw(sample.question, picture)
        row = {
            "step": step,
            "set": s.name,
            "id": sample.id,
            "question": sample.question.words,
            "truth": sample.question.answer,
            "answer": answer,
        }
        return row | ({"picture": sample.picture} if picture and picture.exists() else {})

    def _draw(self, question: Question, target: Path) -> None:
        image = question.image if isinstance(question.image, str) else (question.image or [""])[0]
        try:
            picture = open_image(storage.source(image), self._limits)
        except LlavaError as error:
            log.debug("no picture: %s", error)
            return
        picture.thumbnail((SIDE, SIDE))
        with contextlib.suppress(OSError):  # a full disk stops no training
            target.parent.mkdir(parents=True, exist_ok=True)
            picture.save(target, quality=85)
