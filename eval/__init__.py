"""The benchmarks of LLaVA-1.5: prompts, runs, and scores by each owner's exact rule.

Scoring needs neither jax nor a model: `score("pope", "answers.jsonl", "data/pope")`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava_jax.eval.task import Result


def score(task: str, answers: str | Path, data: str | Path, **settings) -> "Result":
    """Scores an answer file.

    Args:
      task: a name of `llava_jax.eval.task.TASKS` ("pope").
      answers: the answer file (jsonl, json, txt, tsv, csv or xlsx, as the benchmark uses).
      data: folder with the owner's files.
      **settings: fields of `llava_jax.eval.task.TaskSettings`.
    Raises:
      AnswerError, DataError: naming file and line or id.
    """
    from llava_jax.eval.task import TaskSettings, get_task

    return get_task(task).score(Path(answers), Path(data), TaskSettings(**settings))
