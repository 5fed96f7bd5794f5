"""`llava-jax eval --model M --tasks …`: asks a model, scores its answers, writes the report.

OUT/<task>/answers.jsonl grows batch by batch, and a killed run resumes where it stopped; next to it
are run.json (what was asked of whom), result.json and the upload file where a server has the truth.
Over several hosts of one mesh every host asks the same batches and the first one writes; separate
processes each take a part (--chunk K/N), and the one that completes the last part joins them.
"""

import argparse
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava_jax.errors import LlavaError
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.questions import Question
from llava_jax.eval.report.text import as_text, complete
from llava_jax.eval.run.predict import answered_lines, choose, merge, predict
from llava_jax.eval.task import DEFAULT, TASKS, Task, TaskSettings, get_task
from llava_jax.progress import progress
from llava_jax.util import read_object, write_json

if TYPE_CHECKING:
    from llava_jax.model import LlavaModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """How to run. data: holds a folder per task, or is the one task's. chunk: this part of how many.
    max_new_tokens: in place of the paper's. The rest as in `llava-jax eval --help`."""

    data: Path
    out: Path
    model_id: str
    images: Path | None = None
    batch: int = 16
    limit: int | None = None
    shuffle_seed: int | None = None
    chunk: tuple[int, int] = (0, 1)
    max_new_tokens: int | None = None
    task: TaskSettings = DEFAULT
    writes: bool = True
    show_progress: bool = True


def run_task(model: "LlavaModel", task: Task, settings: RunSettings) -> dict[str, Any] | None:
    """Asks one benchmark and scores it.

    Returns:
      The result as written to result.json; None where it cannot be scored here and now: other parts
      are still out, a judge must read the answers first, or only a server has the truth.
    """
    data = task_folder(settings.data, task)
    folder = settings.out / task.name
    questions = task.questions(data, settings.task)
    chosen = choose(questions, limit=settings.limit, shuffle_seed=settings.shuffle_seed)
    part = choose(chosen, chunk=settings.chunk)
    answers = _part(folder, *settings.chunk)
    if settings.writes:
        _check_run(folder / "run.json", task, settings, chosen, model.config.template)
    quiet = not (settings.writes and settings.show_progress)
    # Time per answer over the whole run, so that the first compilations do not mislead for long.
    with progress(len(part), task.title, "q", quiet=quiet, smoothing=0.05) as bar:
        predict(
            model,
            part,
            answers,
            model_id=settings.model_id,
            max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
            batch=settings.batch,
            folders=image_folders(settings, data, task),
            progress=bar.update,
            writes=settings.writes,
        )
    if not settings.writes or not _joined(folder, settings.chunk, questions, len(chosen)):
        return None
    return _score(task, folder, data, settings)


def task_folder(data: Path, task: Task) -> Path:
    """The task's folder in `data`, or `data` itself if it has none.

    Raises:
      DataError: there is none, or `data` holds folders of other tasks and none of this.
    """
    if not data.is_dir():
        raise DataError(f"{data}: no such folder")
    own = data / task.name
    if own.is_dir():
        return own
    others = [name for name in TASKS if (data / name).is_dir()]
    if others and data.name != task.name:
        raise DataError(
            f"{own}: no such folder; {data} holds {', '.join(others)}",
            fix=f"it needs {task.data_files}",
        )
    return data


def image_folders(settings: RunSettings, data: Path, task: Task) -> list[Path]:
    """Where images may lie: the given folder, the data folder, and the usual places in them."""
    images = settings.images
    roots = [images / task.name, images, data] if images else [data]
    usual = ("", "images", "test2015", "val2014", "test", "val", "train_images", "coco/val2014",
             "images/test", "mm-vet/images", "MME_Benchmark_release_version")  # fmt: skip
    return [f for root in roots for name in usual if (f := root / name).is_dir()]


def _part(folder: Path, index: int, parts: int) -> Path:
    return folder / ("answers.jsonl" if parts == 1 else f"answers-{index}-of-{parts}.jsonl")


def _joined(
    folder: Path, chunk: tuple[int, int], questions: Sequence[Question], count: int
) -> bool:
    """Whether answers.jsonl holds the `count` answers asked for; joins the parts if all of them are.

    It is then in the order of `questions`, which the scripts of LLaVA and POPE rely on.
    """
    parts = [_part(folder, i, chunk[1]) for i in range(chunk[1])]
    complete = sum(len(answered_lines(p)) for p in parts) >= count
    if complete:
        merge(parts, questions, _part(folder, 0, 1))
    return complete


def _check_run(
    path: Path, task: Task, settings: RunSettings, chosen: Sequence[Question], template: str
) -> None:
    """Writes what is asked of whom, or compares it with what the folder's answers are from.

    Raises:
      AnswerError: the folder belongs to another model, prompts or settings.
    """
    keys = sorted(f"{q.key}\n{q.prompt}" for q in chosen)
    run = {
        "task": task.name,
        "model": settings.model_id,
        "template": template,
        "max_new_tokens": settings.max_new_tokens or task.max_new_tokens,
        "questions": len(chosen),
        "prompts": hashlib.sha256("\0".join(keys).encode()).hexdigest(),
        "parts": settings.chunk[1],
    }
    if path.exists():
        old = read_object(path, AnswerError)
        if changed := [k for k, v in run.items() if old.get(k) != v]:
            was = ", ".join(f"{k} was {old.get(k)!r}" for k in changed if k != "prompts")
            raise AnswerError(
                f"{path.parent}: holds answers of another run ({was or 'other prompts'})",
                fix="use another --out, or move that folder away",
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"run.{settings.chunk[0]}.json")  # the parts may start at the same time
    write_json(own, run, indent=1)
    own.replace(path)


def _score(task: Task, folder: Path, data: Path, settings: RunSettings) -> dict[str, Any] | None:
    answers = folder / "answers.jsonl"
    if task.judge:
        print(f"{task.title}: answered; now: llava-jax eval judge {task.name} --answers {answers}")
        return None
    try:
        scored = task.score(answers, data, settings.task)
    except DataError as e:
        # test-dev, test: a server has the truth, and takes the upload file.
        logger.warning("%s: not scored here: %s", task.title, e)
        try:
            upload = task.submission(answers, data, folder / "upload.json", settings.task)
            print(f"{task.title}: upload {upload}")
        except LlavaError as no:
            logger.warning("%s: no upload file either: %s", task.title, no)
        return None
    result = complete(scored, only_answered=settings.limit is not None)
    result["run"] = settings.model_id
    write_json(folder / "result.json", result, indent=1, ensure_ascii=False)
    return result


def parse_chunk(text: str) -> tuple[int, int]:
    """ "K/N" as two numbers, K from 0; raises LlavaError."""
    index, slash, parts = text.partition("/")
    if not (slash and index.isdigit() and parts.isdigit() and int(index) < int(parts)):
        raise LlavaError(f"--chunk {text}: expected K/N with K from 0 to N-1")
    return int(index), int(parts)


def run_command(args: argparse.Namespace) -> int:
    """The command line's run: all tasks, then the report."""
    import jax

    from llava_jax.eval.cli import task_settings_of
    from llava_jax.eval.run.model import load_model

    tasks = [get_task(name) for name in args.tasks.replace(" ", "").split(",") if name]
    task_settings = task_settings_of(args, tasks)
    chunk = parse_chunk(args.chunk)
    for name in ("batch_size", "limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise LlavaError(f"--{name.replace('_', '-')} must be at least 1")
    for task in tasks:  # a missing file shows before the model is loaded
        task.questions(task_folder(args.data, task), task_settings)
    model = load_model(
        args.model,
        mesh=args.mesh,
        template=args.template,
        base=args.base,
        vision_tower=args.vision_tower,
        allow_pickle=args.allow_pickle,
    )
    settings = RunSettings(
        data=args.data,
        out=args.out,
        model_id=args.name or Path(args.model).name,
        images=args.images,
        batch=args.batch_size,
        limit=args.limit,
        shuffle_seed=args.shuffle_seed,
        chunk=chunk,
        max_new_tokens=args.max_new_tokens,
        task=task_settings,
        writes=jax.process_index() == 0,
    )
    written = []
    for task in tasks:
        if result := run_task(model, task, settings):
            print(as_text(result, tables=False))
            written.append(args.out / task.name / "result.json")
    if written:
        from llava_jax.eval.report.write import write_report

        html, _ = write_report(written, args.out / "report", images=args.images or args.data)
        print(f"report: {html}")
    return 0
