"""`llava-jax eval --model M --tasks …`: asks a model, scores its answers, writes the report.

OUT/<task>/answers.jsonl grows batch by batch, and a killed run resumes where it stopped; next to it
are run.json (what was asked of whom), result.json and the upload file where a server has the truth.
Over several hosts of one mesh every host asks the same batches and the first one writes; separate
processes each take a part (--chunk K/N), and the one that completes the last part joins them.
"""

import argparse
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError, counted
from llava_jax.eval.errors import DataError, NoTruthError
from llava_jax.eval.files import check_folder, locked
from llava_jax.eval.judge.endpoint import JudgeError
from llava_jax.eval.report.text import as_text, complete
from llava_jax.eval.run.experiment import experiment_of, resolve, tasks_of
from llava_jax.eval.run.identity import Digests, check_run, held, model_identity, versions
from llava_jax.eval.run.model import alone
from llava_jax.eval.run.predict import Line, answered_lines, check_asked, choose, merge, predict
from llava_jax.eval.task import DEFAULT, TASKS, Task, TaskSettings
from llava_jax.progress import progress
from llava_jax.settings import loading_options
from llava_jax.util import write_json, write_text

logger = logging.getLogger(__name__)
Lines = Mapping[str, Line]


@dataclass(frozen=True)
class RunSettings:
    """How to run. data: holds a folder per task, or is the one task's. chunk: this part of how many.
    max_new_tokens: in place of the paper's. identity: what the model is (see identity.py).
    experiment: the options that ask this again. The rest as in `llava-jax eval --help`."""

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
    identity: Mapping[str, Any] = field(default_factory=dict)
    experiment: Mapping[str, Any] = field(default_factory=dict)
    writes: bool = True
    show_progress: bool = True


def run_task(model: Any, task: Task, settings: RunSettings) -> dict[str, Any] | None:
    """Asks one benchmark and scores it.

    Args:
      model: a LlavaModel, or what answers Requests as its generate_batch does.
    Returns:
      The result as written to result.json; None where it cannot be scored here and now: other parts
      are still out, a judge must read the answers first, or only a server has the truth.
    Raises:
      DataError: its truth is wrong, or missing where no upload can be made of the answers, which stay.
      AnswerError: another process asks the same questions into this folder, or see `predict`.
    """
    index, count = settings.chunk
    lock = settings.out / task.name / f".answers-{index}-of-{count}.lock"
    with held(lock) if settings.writes else nullcontext():
        return _run_alone(model, task, settings)


def _run_alone(model: Any, task: Task, settings: RunSettings) -> dict[str, Any] | None:
    data = task_folder(settings.data, task)
    folder = settings.out / task.name
    questions = task.questions(data, settings.task)
    many: dict[str, Any] = {"limit": settings.limit, "shuffle_seed": settings.shuffle_seed}
    chosen = choose(questions, group_of=task.group_of, **many)
    part = choose(questions, group_of=task.group_of, chunk=settings.chunk, **many)
    index, count = settings.chunk
    parts = [folder / f"answers-{n}-of-{count}.jsonl" for n in range(count)]
    parts = parts if count > 1 else [folder / "answers.jsonl"]
    run = _run_of(task, settings, model.config.template)
    if settings.writes:
        check_run(folder / "run.json", run, f"run.{index}.json")
    folders = image_folders(settings, data, task)
    quiet = not (settings.writes and settings.show_progress)
    # Time per answer over the whole run, so that the first compilations do not mislead for long.
    with progress(len(part), task.title, "q", quiet=quiet, smoothing=0.05) as bar:
        predict(
            model,
            part,
            parts[index],
            model_id=settings.model_id,
            max_new_tokens=run["max_new_tokens"],
            batch=settings.batch,
            folders=folders,
            digests=Digests(folder / f"pictures-{index}-of-{count}.json"),
            others=[p for p in parts if p != parts[index]],
            progress=bar.update,
            writes=settings.writes,
        )
    if not settings.writes:
        return None
    turn = locked(folder / ".join.lock", wait=True) if count > 1 else nullcontext()
    with turn:  # of the parts that end together
        lines = {key: line for p in parts for key, line in answered_lines(p, repair=False).items()}
        if any(q.key not in lines for q in chosen):
            return None
        for n, path in enumerate(parts):  # another machine may have other data
            if n != index:
                digests = Digests(folder / f"pictures-{n}-of-{count}.json")
                check_asked(path, answered_lines(path, repair=False), chosen, folders, digests)
        merge(parts, questions, folder / "answers.jsonl")
        asked = {q.key: lines[q.key] for q in chosen}
        with tempfile.TemporaryDirectory() as scratch:
            result = _score(task, settings, data, asked, lines, Path(scratch))
        if result is not None:
            sent, notes = _as_sent(asked)
            result["notes"] += _unanswered(asked) + notes
            result |= {"run": settings.model_id, "settings": run | sent, "versions": versions()}
            result["experiment"] = dict(settings.experiment)
            write_json(folder / "result.json", result, indent=1, ensure_ascii=False)
        return result


def _run_of(task: Task, settings: RunSettings, template: str) -> dict[str, Any]:
    """What run.json holds: whatever an answer depends on besides its question."""
    run = {"task": task.name, "model": settings.model_id, **settings.identity, "template": template}
    run["max_new_tokens"] = settings.max_new_tokens or task.max_new_tokens
    return run | {"temperature": 0.0, "split": settings.task.split, "parts": settings.chunk[1]}


def _unanswered(lines: Lines) -> list[str]:
    """A note on the questions that got no answer, and why."""
    failed = [f"{key} ({line.error})" for key, line in lines.items() if line.error]
    more = ", …" if len(failed) > 5 else ""
    what = f"{counted(len(failed), 'question')} got no answer, and the next run asks again"
    return [f"{what}: {'; '.join(failed[:5])}{more}"] if failed else []


def _as_sent(lines: Lines) -> tuple[dict[str, Any], list[str]]:
    """The settings that a server took otherwise than they were asked, and a note where that changed."""
    given = [line for line in lines.values() if not line.error]
    kinds = {json.dumps(line.sent, sort_keys=True): line.sent for line in given}
    names = {"max_completion_tokens": "max_new_tokens"}
    found = {names.get(k, k): v for sent in kinds.values() for k, v in sent.items()}
    found.pop("max_tokens", None)
    if served := {line.served for line in given} - {""}:
        found["served_as"] = max(served)
    note = f"the answers were not all asked with the same settings: {', '.join(sorted(kinds))}"
    return found, [note] if len(kinds) > 1 else []


def task_folder(data: Path, task: Task, alone: bool = True) -> Path:
    """The task's folder in `data`, or `data` itself where it is of one task.

    Args:
      alone: no other task is run from `data`.
    Raises:
      DataError: there is none, or `data` is or holds folders of other tasks.
    """
    if not data.is_dir():
        raise DataError(f"{data}: no such folder")
    own = data / task.name
    if own.is_dir():
        return own
    what, others = "", [name for name in TASKS if (data / name).is_dir()]
    if others and data.name != task.name:
        what = f"holds {', '.join(others)}"
    elif data.name in TASKS and data.name != task.name:
        what = f"is the folder of {data.name}"
    elif not alone:
        what = "is asked for several benchmarks"
    if what:
        raise DataError(f"{own}: no such folder; {data} {what}", fix=f"it needs {task.data_files}")
    return data


def image_folders(settings: RunSettings, data: Path, task: Task) -> list[Path]:
    """Where images may lie: the given folder, the data folder, and the usual places in them."""
    images = settings.images
    roots = [images / task.name, images, data] if images else [data]
    usual = ("", "images", "test2015", "val2014", "test", "val", "train_images", "coco/val2014",
             "images/test", "mm-vet/images", "MME_Benchmark_release_version")  # fmt: skip
    return [f for root in roots for name in usual if (f := root / name).is_dir()]


def _score(
    task: Task, settings: RunSettings, data: Path, asked: Lines, lines: Lines, scratch: Path
) -> dict[str, Any] | None:
    """asked: of the folder's lines, those of the questions that this run asks."""
    folder = settings.out / task.name
    answers = folder / "answers.jsonl"
    if task.judge:
        line = task.next_line("judge", answers, data, settings.task)
        print(f"{task.title}: answered; now: {line}")
        return None
    if len(asked) < len(lines):  # of an earlier run with another --limit or --shuffle-seed
        answers = scratch / "answers.jsonl"
        write_text(answers, "".join(f"{line.text}\n" for line in asked.values()))
    try:
        scored = task.score(answers, data, settings.task)
    except DataError as e:
        # test-dev, test: a server has the truth, and takes the upload file. A truth that is there and
        # cannot be read is no success either way.
        logger.warning("%s: not scored here: %s", task.title, e)
        try:
            upload = task.submission(answers, data, folder / task.upload_name, settings.task)
            print(f"{task.title}: upload {upload}")
        except LlavaError as no:
            logger.warning("%s: no upload file either: %s", task.title, no)
            raise e from None  # a run without a figure or a file is no success; its answers stay
        if not isinstance(e, NoTruthError):
            raise
        return None
    if settings.limit is None:
        return complete(scored)
    unasked = scored.coverage.missing
    if any(line.error for line in asked.values()):  # asked, and missing all the same
        rows = [json.loads(line.text) for line in asked.values()]
        rows = [{k: v for k, v in row.items() if k != "metadata"} for row in rows]
        write_text(scratch / "all.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        unasked = task.score(scratch / "all.jsonl", data, settings.task).coverage.missing
    return complete(scored, unasked)


def parse_chunk(text: str) -> tuple[int, int]:
    """ "K/N" as two numbers, K from 0; raises LlavaError."""
    index, slash, parts = text.partition("/")
    if not (slash and index.isdigit() and parts.isdigit() and int(index) < int(parts)):
        raise LlavaError(f"--chunk {text}: expected K/N with K from 0 to N-1")
    return int(index), int(parts)


def run_command(args: argparse.Namespace, options: Mapping[str, str]) -> int:
    """The command line's run: all tasks, then the report. options: of --set."""
    from llava_jax.eval.report.write import need_jinja2, write_report

    named = args.include
    wanted = resolve(args)
    if args.include is not None and named is None:  # of the experiment's file
        from llava_jax.eval.outside import include

        include(args.include)
    needed = {"model": args.model, "tasks": wanted, "data": args.data, "out": args.out}
    for name, value in needed.items():
        if value is None:
            raise LlavaError(f"--{name} is missing", fix="see llava-jax eval --help")
    if not (tasks := tasks_of(wanted, args.split, options)):
        raise LlavaError("--tasks names no benchmark", fix=f"some of {', '.join(TASKS)}")
    check_folder("--images", args.images)
    chunk = parse_chunk(args.chunk)
    for name in ("batch_size", "limit", "max_new_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise LlavaError(f"--{name.replace('_', '-')} must be at least 1")
    for task, own in tasks:  # a missing file or package shows before the model is loaded
        data = task_folder(args.data, task, alone=len(tasks) == 1)
        task.questions(data, own)
        task.check_packages(data, own)
    if not all(task.judge for task, _ in tasks):
        need_jinja2()
    model, identity, writes = _model(args)
    same = ("data", "out", "images", "limit", "shuffle_seed", "max_new_tokens")
    how: dict[str, Any] = {name: getattr(args, name) for name in same}
    name = args.name or Path(os.path.abspath(args.model)).name  # "." has no name of its own
    how |= {"model_id": name, "batch": args.batch_size}
    how |= {"chunk": chunk, "identity": identity, "writes": writes}
    results, errors = [], []
    for task, own in tasks:
        settings = RunSettings(**how, task=own, experiment=experiment_of(args, task, own))
        try:
            result = run_task(model, task, settings)
        except LlavaError as e:
            errors.append(e)
            if len(tasks) > 1:
                logger.error("%s: %s", task.title, e)
            # Where the server is gone, and on other hosts, which are still at this task, nothing follows.
            if isinstance(e, JudgeError) or not alone():
                break
            continue
        if result:
            print(as_text(result, tables=False))
            results.append(args.out / task.name / "result.json")
    if results:
        with locked(args.out / ".report.lock", wait=True):  # another part may end now
            html, _ = write_report(results, args.out / "report", images=args.images or args.data)
        print(f"report: {html}")
    if errors:
        raise errors[0]
    return 0


def _model(args: argparse.Namespace) -> tuple[Any, dict[str, Any], bool]:
    """(what answers, what it is, whether this process writes)."""
    if args.endpoint:
        from llava_jax.eval.run.remote import RemoteModel

        given = {**loading_options(args), "mesh": args.mesh, "template": args.template}
        for name, value in given.items():
            if value:
                option = f"--{name.replace('_', '-')}"
                raise LlavaError(f"{option}: does nothing with --endpoint, whose server decides it")
        remote = RemoteModel(args.endpoint, args.model, args.key_env, args.per_minute)
        return remote, remote.identity, True
    import jax

    from llava_jax.eval.run.model import load_model
    from llava_jax.generate.compile_cache import use_compile_cache

    use_compile_cache()

    how = {"mesh": args.mesh, "template": args.template, **loading_options(args)}
    model = load_model(args.model, **how)
    return model, model_identity(model), jax.process_index() == 0
