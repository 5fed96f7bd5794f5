"""Answers read by a model where the rule reads none: VLMEvalKit's way for options, MathVista's step.

VLMEvalKit (vlmeval/dataset/utils/multiple_choice.py) takes what its exact rule infers (rules.read_letter)
and has a model match the rest with an option, or with none (Z, wrong). MathVista (evaluation/extract_answer.py)
has a model extract what is no option and no number. The words that a model is asked in are ours. A
reply that names no option is asked for again and then counted apart: the exact number stands beside it.
"""

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_jax.errors import LlavaError, counted
from llava_jax.eval.answers import join
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.files import read_checked
from llava_jax.eval.judge import store
from llava_jax.eval.judge.endpoint import Asked, Endpoint
from llava_jax.eval.questions import LETTER, SHORT
from llava_jax.eval.rules import named_letters
from llava_jax.eval.simple import asked_of
from llava_jax.eval.task import DEFAULT, Result, Task, TaskSettings

EXTRACT_TOKENS = 128


def open_answers(
    task: Task, answers: Path, data: Path, settings: TaskSettings = DEFAULT
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """By key: the options' letters of the answered items; what the rule reads; and, where it reads
    nothing, the message for a model."""
    found = task.items(data, settings)
    items = {i.key: i for i in found if task.letters(i) or task.free_answers}
    if not items:
        raise LlavaError(f"{task.name} has no answers that a model could extract")
    given = task.read(answers, settings)
    joined, _ = join([i.key for i in found], given, **asked_of(found))  # some must fit
    kinds = ("option", "answer")
    forms = {k: Path(__file__).with_name(f"extract_{k}.txt").read_text("utf-8") for k in kinds}
    letters, read, asked = {}, {}, {}
    for key, answer in joined.items():
        if (item := items.get(key)) is None:
            continue
        letters[key] = task.letters(item)
        if (settled := task.inferred(answer.text, item)) is not None:
            read[key] = settled
        else:
            question = item.prompt.removesuffix(LETTER).removesuffix(SHORT)
            form = forms["option" if letters[key] else "answer"]
            asked[key] = form.format(question=question, answer=answer.text)
    return letters, read, asked


def requests(task: Task, answers: Path, data: Path, settings: TaskSettings) -> Asked:
    """(row, message) of each answer that a model is to read."""
    letters, _, asked = open_answers(task, answers, data, settings)
    if settings.strict:  # scoring knows which answers must be there
        task.score(answers, data, settings)
    return [({"question_id": k, "letters": letters[k]}, m) for k, m in asked.items()]


def extract_answers(
    requests: Asked, out: Path, endpoint: Endpoint, runs: int = 1, threads: int = 8
) -> None:
    """Appends what `out` lacks: question_id, extracted (null where no reply could be read), content.

    Raises:
      AnswerError: `out` holds what was read of another answer, or by another model.
    """

    def extract(row: dict[str, Any], message: str) -> dict[str, Any]:
        read, reply = store.ask_until_read(endpoint, reader(row), tries(message))
        return {**row, "extracted": read, "content": reply.text}

    there = store.kept_lines(out, _read)
    store.judge_missing(requests, out, endpoint, threads, there, extract)


def tries(message: str) -> list[dict[str, Any]]:
    """What is sent until a reply can be read."""
    how = {"messages": [{"role": "user", "content": message}], "temperature": 0.0}
    return [{**how, "max_tokens": EXTRACT_TOKENS, "again": n} for n in range(1 + store.RETRIES)]


def reader(row: dict[str, Any]) -> Callable[[str], str | None]:
    """What reads a reply about a request's row."""
    return lambda text: read_reply(text, row["letters"])


def read_reply(reply: str, letters: str) -> str | None:
    """The one letter of the options, or Z, that a reply names; without letters its first line that
    does not only announce the answer ("Here it is:"). None where there is none."""
    if not letters:
        said = [x.strip() for x in reply.strip().removeprefix("Final answer:").split("\n")]
        return next((x for x in said if x and not x.endswith(":")), None)
    named = named_letters(reply, f"{letters}Z")
    return named[0] if len(named) == 1 else None


def _read(path: Path) -> list[dict[str, Any]]:
    rows = read_checked(path, {"question_id": str, "request": str, "judge_model": str})
    for row in rows:
        if not isinstance(row.get("extracted"), str | None) or "extracted" not in row:
            raise AnswerError(f"{path}: question {row['question_id']}: extracted is not text")
    return rows


def score_extracted(
    task: Task, answers: Path, data: Path, settings: TaskSettings, extracted: Path
) -> Result:
    """The task's result with `<headline>_model_extracted` beside the headline.

    That number is by the owner's formula over the letters that the rule or the model reads. Answers of
    whose replies nothing could be read are counted in `unread_extractions` and are not in it.

    Raises:
      AnswerError: an answer has not been read, or was another when it was read.
    """
    from llava_jax.eval.report.stats import headline_of

    result = task.score(answers, data, settings)
    letters, read, asked = open_answers(task, answers, data, settings)
    rows = {r["question_id"]: r for r in _read(extracted)}
    if absent := [k for k in asked if k not in rows]:
        shown = ", ".join(absent[:5]) + (", …" if len(absent) > 5 else "")
        what = f"{extracted}: {counted(len(absent), 'answer')} not in it: {shown}"
        line = task.next_line("extract", answers, data, settings, extracted)
        raise AnswerError(what, fix=f"have them read: {line}")
    models = {rows[k]["judge_model"] for k in asked}
    for key, message in asked.items():
        store.check_same(extracted, key, rows[key], message, rows[key]["judge_model"])
    found = {k: rows[k]["extracted"] for k in asked}
    unread = [k for k, text in found.items() if text is None]
    texts = task.read(answers, settings).rows
    texts = {a.id: a.text for a in texts} | read | {k: t for k, t in found.items() if t is not None}
    with tempfile.TemporaryDirectory() as folder:
        lines = [json.dumps({"question_id": k, "text": t}) + "\n" for k, t in texts.items()]
        (path := Path(folder) / "extracted.jsonl").write_text("".join(lines), encoding="utf-8")
        samples = task.score(path, data, replace(settings, strict=False)).samples
    holds = {row: k for k, s in samples.items() for row in s.details.get("rows", (k,))}
    for key, text in {**read, **found}.items():
        if key in holds and text == "Z" and letters[key]:
            samples[holds[key]].score = 0.0  # none of the options, whatever the owner guesses then
    for key in asked:
        if key in holds and holds[key] in result.samples:
            result.samples[holds[key]].details.setdefault("extracted", {})[key] = found[key]
    apart = {holds[k] for k in unread if k in holds}
    name = f"{result.headline or task.headline}_model_extracted"
    if read_all := {k: s for k, s in samples.items() if k not in apart}:
        task.weigh([*read_all.values()])
        kept = {k: s.to_json() for k, s in read_all.items()}
        result.totals[name] = headline_of(task.name, kept)
    made = len(asked) - len(unread)
    result.totals |= {"extracted_by_model": made, "unread_extractions": len(unread)}
    result.totals["extraction_model"] = ", ".join(sorted(models)) or "none was needed"
    if unread:
        without = f"{name} has them not" if read_all else f"there is no {name}"
        result.notes.append(f"no answer could be extracted for {len(unread)}; {without}")
    return result
