"""GQA (testdev_balanced). Owner's scorer: eval.py of the GQA download (plain string equality).

LLaVA: scripts/convert_gqa_for_eval.py strips a final "." and lower-cases, nothing else: "Yes " or
"the man" are wrong. Validity and plausibility need choice files that v1.2 does not ship.
"""

import string
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from llava_jax.eval.errors import DataError
from llava_jax.eval.files import expect, find
from llava_jax.eval.questions import SHORT, Question, llava_questions, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent
from llava_jax.util import read_object

FILES = ("testdev_balanced_questions.json", "*uestions*.json")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Reasoning steps that eval.py does not count (operation and argument).
_FREE_STEPS = ("exist", "query: name", "choose name")


class GQA(Task):
    name = "gqa"
    headline = "accuracy"
    data_files = "testdev_balanced_questions.json; or llava_gqa_testdev_balanced.jsonl to ask"
    llava_files = ("llava_gqa_*.jsonl",)
    has_splits = True
    id_keys = ("questionId", "question_id")
    text_keys = ("text",)

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        truth = _read_truth(data, settings).items()
        return [question(i, q["question"] + SHORT, f"{q['imageId']}.jpg") for i, q in truth]

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        questions = _read_truth(data, settings)
        # Unbalanced questions only serve the consistency metric: eval.py does not ask for them.
        balanced = [i for i, q in questions.items() if q.get("isBalanced", True)]
        asked = {i: q["question"] for i, q in questions.items()}
        joined, coverage = self.join(questions, answers, settings, scored=balanced, asked=asked)
        predicted = {i: gqa_prediction(a.row, a.text) for i, a in joined.items()}
        lenient = dict.fromkeys(balanced, 0.0)  # and lmms-eval counts all that were asked
        for i, a in joined.items():
            lenient[i] = float(_lenient(a.text) == _lenient(questions[i]["answer"]))
        samples = {}
        for i in balanced:
            q, read = questions[i], predicted.get(i)
            right, truth = float(read == q["answer"]), q["answer"]
            image = f"{q['imageId']}.jpg" if "imageId" in q else ""
            how = (read or "", q["question"], image, _groups(q), {"lmms_eval": lenient[i]})
            samples[i] = Sample(right, joined.text(i), truth, *how)
        scores = list(samples.values())
        kinds = by_group(scores, "kind")
        totals: dict[str, Any] = {"accuracy": percent(s.score for s in scores)}
        totals |= {k: kinds[k]["score"] for k in ("binary", "open") if k in kinds}
        totals["distribution"] = _distribution(samples, questions)
        totals["lmms_eval_exact_match"] = percent(lenient.values())
        if (consistency := _consistency(questions, predicted, samples)) is not None:
            totals["consistency"] = consistency
        cuts = ("structural", "semantic", "steps", "length")
        tables = {f"per {g}": by_group(scores, g) for g in cuts}
        return Result(self, totals, samples, coverage, tables)

    def upload(self, answers: Path, data: Path, settings: TaskSettings) -> list[dict[str, Any]]:
        """The predictions file of eval.py and of the server: [{questionId, prediction}], in the order
        of the answers."""
        asked = llava_questions(data, self.llava_files, settings.split)
        keys = _read_truth(data, settings) if asked is None else [q.key for q in asked]
        joined, coverage = self.join(keys, answers, settings)
        self.warn_of(coverage, "missing")
        pairs = ((a.row.get("question_id", a.id), a) for a in joined.values())
        return [{"questionId": i, "prediction": gqa_prediction(a.row, a.text)} for i, a in pairs]


def gqa_prediction(row: dict[str, Any], text: str) -> str:
    """The string eval.py compares. A row of a predictions file is taken as it is."""
    return text if "questionId" in row else text.rstrip(".").lower()


def _read_truth(data: Path, settings: TaskSettings) -> dict[str, dict[str, Any]]:
    path = find(data, FILES, "questions file", settings.split)
    questions = read_object(path, DataError)
    for key, q in questions.items():
        where = f"{path}: question {key}"
        expect(q, where, {"question": str, "answer": str})
        expect(q, where, {n: list for n in ("semantic", "entailed") if n in q})
        if "types" in q:
            expect(q["types"], f"{where}: types", {"structural": str, "semantic": str})
        for n, step in enumerate(q.get("semantic", ())):
            expect(step, f"{where}: step {n}", {"operation": str, "argument": str})
    return questions


def _groups(q: dict[str, Any]) -> dict[str, str]:
    groups = {"length": str(len(q["question"].split()))}
    if types := q.get("types"):
        groups |= {"structural": types["structural"], "semantic": types["semantic"]}
        groups["kind"] = "open" if types["structural"] == "query" else "binary"
    if "semantic" in q:
        steps = [f"{c['operation']}: {c['argument']}" for c in q["semantic"]]
        groups["steps"] = str(sum(not any(f in s for f in _FREE_STEPS) for s in steps))
    return groups


def _distribution(samples: dict[str, Sample], questions: dict[str, dict[str, Any]]) -> float:
    """Chi-square between gold and predicted answers per global group, weighted by group size, over
    100 (lower is better)."""
    gold: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for i, s in samples.items():
        groups = questions[i].get("groups")
        group = groups.get("global") if isinstance(groups, dict) else None
        if isinstance(group, str):
            gold[group][s.truth] += 1
            predicted[group][s.parsed] += 1
    weighted = size = 0.0
    for group, answers in gold.items():
        chi = sum((predicted[group][a] - e) ** 2 / e for a, e in answers.items())
        weighted += chi * answers.total()
        size += answers.total()
    return weighted / size / 100 if size else 0.0


def _consistency(
    questions: dict[str, dict[str, Any]], predicted: dict[str, str], samples: dict[str, Sample]
) -> float | None:
    """Accuracy on what a correctly answered question entails; None if the file lacks some of those
    (testdev_balanced does: eval.py needs the full questions for --consistency)."""
    scores = []
    for i, s in samples.items():
        entailed = [str(e) for e in questions[i].get("entailed", ()) if e != i]
        if s.score and entailed:
            # Of the questions that are asked a missing answer is wrong; others may not be there.
            if any(e not in samples and not (e in questions and e in predicted) for e in entailed):
                return None
            right = [predicted.get(e) == questions[e]["answer"] for e in entailed]
            scores.append(sum(right) / len(right))
    return percent(scores) if scores else None


def _lenient(text: str) -> str:
    """lmms-eval's exact_match with ignore_case and ignore_punctuation."""
    return text.lower().translate(_NO_PUNCTUATION)
