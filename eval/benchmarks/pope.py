"""POPE (COCO val2014: random, popular, adversarial).

Scorer: LLaVA eval_pope.py = the owner's evaluate.py. It zips answers to labels by position, so the
8,910 questions of LLaVA with today's 3 x 3,000 labels give a random accuracy of 50.2 % silently. Here answers find their label by split, image and question; the script's zip is given too.
"""

from pathlib import Path
from typing import Any

from llava_jax.errors import counted
from llava_jax.eval.answers import Answer, join
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, expect, find, read_checked
from llava_jax.eval.questions import SHORT, Question, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings

SPLITS = ("random", "popular", "adversarial")
Place = tuple[str, str, str]  # split, image, question: what a label is found by


class Pope(Task):
    name = "pope"
    headline = "f1"
    data_files = "coco_pope_{random,popular,adversarial}.json; llava_pope_test.jsonl to ask"
    llava_files = ("llava_pope_*.jsonl",)

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        for split, rows in _read_labels(data).items():
            for row in rows:
                number, image = f"{split}/{row['question_id']}", row["image"]
                more = {"category": split, "image": image}
                questions.append(question(number, row["text"] + SHORT, image, **more))
        return questions

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        labels, asked = _read_labels(data), self._asked(data)
        every = [(split, r) for split, rows in labels.items() for r in rows]
        truth: dict[Place, str] = {}
        both: dict[Place, None] = {}
        for split, r in every:
            place, label = (split, r["image"], _question(r["text"])), _yes_no(r["label"])
            if truth.setdefault(place, label) != label:
                both[place], truth[place] = None, label
        given = self.read(answers, settings)
        how: dict[str, Any] = {"images": {key: [image] for key, (_, image, _) in asked.items()}}
        how |= {"left_out_of": ("f1_llava_script",), "strict": settings.strict}
        joined, coverage = join(asked, given, **how)
        samples: dict[str, Sample] = {}
        for key, place in asked.items():
            if place not in truth:
                what = f"{data}: question {key} ({place[0]}, {place[1]}: {place[2]!r}) has no label"
                fix = "are these the labels of the same POPE set (COCO, A-OKVQA, GQA)?"
                raise DataError(what, fix=fix)
            samples[key] = _sample(joined.get(key), place, truth[place])
        ours, script = {}, {}
        for split, rows in labels.items():
            mine = [s for s in samples.values() if s.groups["split"] == split]
            if not mine:
                continue
            ours[split] = pope_scores([(str(s.parsed), s.truth) for s in mine])
            order = [a for a in given.rows if a.id in asked and asked[a.id][0] == split]
            zipped = [(pope_answer(a.text), _yes_no(r["label"])) for a, r in zip(order, rows)]
            script[split] = pope_scores(zipped)
        totals = {"f1": _mean(ours, "F1 score"), "f1_llava_script": _mean(script, "F1 score")}
        totals |= {"accuracy": _mean(ours, "Accuracy"), "yes_ratio": _mean(ours, "Yes ratio")}
        notes = []
        if unasked := len(every) - len(asked):
            notes.append(f"the label files hold {unasked} questions that were not asked")
        if both:
            split, image, text = next(iter(both))
            found = f"{counted(len(both), 'question')} labelled yes and no: the last label counts"
            notes.append(f"{found} ({split}, {image}: {text!r})")
        if len(ours) < len(SPLITS):
            notes.append(f"splits in it: {', '.join(ours)}")
        tables = {"per split": ours, "LLaVA script (zip by position)": script}
        return Result(self, totals, samples, coverage, tables, notes)

    def _asked(self, data: Path) -> dict[str, Place]:
        """Question id -> its place, from LLaVA's question file, else from our own numbering of the
        label files ("random/17")."""
        asked = {}
        for q in self.questions(data):
            expect(q.record, f"POPE question {q.key}", {"category": str})
            if not q.images:
                raise DataError(f"POPE question {q.key}: no image")
            asked[q.key] = (q.record["category"], str(q.images[0]), _question(q.prompt))
        return asked


def _read_labels(data: Path) -> dict[str, list[dict[str, str]]]:
    fields = {"question_id": ID, "image": str, "text": str, "label": str}
    patterns = {s: (f"coco_pope_{s}.json", f"*pope_{s}.json*") for s in SPLITS}
    return {s: read_checked(find(data, p, f"{s} labels"), fields) for s, p in patterns.items()}


def _mean(table: dict[str, dict[str, float]], name: str) -> float:
    return sum(row[name] for row in table.values()) / len(table)


def pope_answer(text: str) -> str:
    """ "no" if No, not or no is a word of the first sentence, else "yes" (also for "" and "Nope")."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """The script's numbers of (predicted, true) pairs of "yes" and "no", its rates in percent.

    Whatever else is predicted ("missing") is wrong: a false negative where the truth is "yes", a false
    positive where it is "no". The yes ratio is over the answers that there are.
    """
    tp, tn = pairs.count(("yes", "yes")), pairs.count(("no", "no"))
    truths, said = [t for _, t in pairs], [p for p, _ in pairs]
    fn, fp = truths.count("yes") - tp, truths.count("no") - tn
    answered = said.count("yes") + said.count("no")
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"TP": tp, "FP": fp, "TN": tn, "FN": fn} | {
        "Accuracy": 100 * (tp + tn) / len(pairs) if pairs else 0.0,
        "Precision": 100 * precision,
        "Recall": 100 * recall,
        "F1 score": 100 * f1,
        "Yes ratio": 100 * said.count("yes") / answered if answered else 0.0,
    }


def _question(text: str) -> str:
    # The owner has since fixed "imange" in the label files; LLaVA's question file still has it.
    return text.split("\n")[0].replace("imange", "image")


def _yes_no(label: str) -> str:
    return "no" if label == "no" else "yes"


def _sample(answer: Answer | None, place: Place, truth: str) -> Sample:
    # No answer must not pass for the "yes" that an empty answer is.
    parsed, text = (pope_answer(answer.text), answer.text) if answer else ("missing", "")
    split, image, asked = place
    return Sample(float(parsed == truth), text, truth, parsed, asked, image, {"split": split})
