"""POPE (COCO val2014: random, popular, adversarial).

Scorer: LLaVA eval_pope.py = the owner's evaluate.py. It zips answers to labels by position, so the
8,910 questions of LLaVA with today's 3 x 3,000 labels give a random accuracy of 50.2 % without a
word. Here answers find their label by split, image and question; the script's zip is given too.
"""

from pathlib import Path

from llava_jax.eval.answers import Answer, AnswerFile, join, read_answers
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import ID, expect, find
from llava_jax.eval.task import (
    DEFAULT,
    SHORT,
    Options,
    Question,
    Result,
    Sample,
    Task,
    llava_questions,
    rows_of,
)

SPLITS = ("random", "popular", "adversarial")


class Pope(Task):
    name = "pope"
    title = "POPE"
    data_files = "coco_pope_{random,popular,adversarial}.json; llava_pope_test.jsonl to ask"

    def questions(self, data: Path, options: Options = DEFAULT) -> list[Question]:
        own = llava_questions(data, ("llava_pope_*.jsonl",))
        if own is not None:
            return own
        questions = []
        for split, rows in self._labels(data).items():
            for row in rows:
                record = {
                    "question_id": f"{split}/{row['question_id']}",
                    "prompt": row["text"] + SHORT,
                    "category": split,
                    "image": row["image"],
                }
                key = str(record["question_id"])
                questions.append(Question(key, row["text"] + SHORT, (row["image"],), record))
        return questions

    def score(self, answers: Path, data: Path, options: Options = DEFAULT) -> Result:
        labels = self._labels(data)
        truth = {
            (split, r["image"], _question(r["text"])): r["label"]
            for split, rows in labels.items()
            for r in rows
        }
        given = read_answers(
            answers,
            id_keys=("question_id",),
            text_keys=("text", "answer"),
            skip_bad_lines=options.skip_bad_lines,
        )
        asked = self._asked(given, data)
        images = {key: place[1] for key, place in asked.items()}
        joined, coverage = join(asked, given, images=images, strict=options.strict)
        samples: dict[str, Sample] = {}
        for key, place in asked.items():
            if place not in truth:
                raise DataError(
                    f"{data}: question {key} ({place[0]}, {place[1]}: {place[2]!r}) has no label",
                    fix="are these the labels of the same POPE set (COCO, A-OKVQA, GQA)?",
                )
            samples[key] = _sample(joined.get(key), place, truth[place])
        tables = {"per split": {}, "LLaVA script (zip by position)": {}}
        for split, rows in labels.items():
            mine = [s for s in samples.values() if s.groups["split"] == split]
            if not mine:
                continue
            pairs = [(str(s.parsed), s.truth) for s in mine]
            tables["per split"][split] = pope_scores(pairs)
            order = [a for a in given.rows if asked.get(a.id, ("",))[0] == split]
            zipped = [(pope_answer(a.text), _yes_no(r["label"])) for a, r in zip(order, rows)]
            tables["LLaVA script (zip by position)"][split] = pope_scores(zipped)
        return self._result(samples, coverage, tables, labels, len(asked))

    def _result(self, samples, coverage, tables, labels, asked: int) -> Result:
        mean, script = (
            sum(t["F1 score"] for t in table.values()) / len(table) for table in tables.values()
        )
        totals = {"f1": 100 * mean, "mean_f1": mean, "mean_f1_llava_script": script}
        for key in ("Accuracy", "Yes ratio"):
            values = [t[key] for t in tables["per split"].values()]
            totals[key.lower().replace(" ", "_")] = sum(values) / len(values)
        result = Result(self.name, "f1", totals, samples, coverage, tables)
        unasked = sum(map(len, labels.values())) - asked
        if unasked:
            result.notes.append(f"the label files hold {unasked} questions that were not asked")
        if len(tables["per split"]) < len(SPLITS):
            result.notes.append(f"splits in it: {', '.join(tables['per split'])}")
        return result

    def _labels(self, data: Path) -> dict[str, list[dict[str, str]]]:
        found = {}
        for split in SPLITS:
            path = find(
                data, (f"coco_pope_{split}.json", f"*pope_{split}.json*"), f"{split} labels"
            )
            found[split] = rows_of(
                path, {"question_id": ID, "image": str, "text": str, "label": str}
            )
        return found

    def _asked(self, given: AnswerFile, data: Path) -> dict[str, tuple[str, str, str]]:
        """Question id -> (split, image, question), from LLaVA's question file, else from our own
        numbering of the label files ("random/17")."""
        asked = {}
        for q in self.questions(data):
            expect(q.record, f"POPE question {q.key}", {"category": str})
            if not q.images:
                raise DataError(f"POPE question {q.key}: no image")
            asked[q.key] = (q.record["category"], str(q.images[0]), _question(q.prompt))
        return asked


def pope_answer(text: str) -> str:
    """ "no" if No, not or no is a word of the first sentence, else "yes" (also for "" and "Nope")."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def pope_scores(pairs: list[tuple[str, str]]) -> dict[str, float]:
    """The script's numbers of (predicted, true) pairs of "yes" and "no", in 0..1."""
    tp, fp, tn, fn = (
        pairs.count(pair) for pair in (("yes", "yes"), ("yes", "no"), ("no", "no"), ("no", "yes"))
    )
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / (tp + fn) if tp + fn else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {
        "TP": tp,
        "FP": fp,
        "TN": tn,
        "FN": fn,
        "Accuracy": (tp + tn) / len(pairs) if pairs else 0.0,
        "Precision": precision,
        "Recall": recall,
        "F1 score": f1,
        "Yes ratio": (tp + fp) / len(pairs) if pairs else 0.0,
    }


def _question(text: str) -> str:
    # The owner has since mended "imange" in the label files; LLaVA's question file still has it.
    return text.split("\n")[0].replace("imange", "image")


def _yes_no(label: str) -> str:
    return "no" if label == "no" else "yes"


def _sample(answer: Answer | None, place: tuple[str, str, str], label: str) -> Sample:
    truth = _yes_no(label)
    # No answer is neither: it must not pass for the "yes" that an empty answer is.
    parsed = pope_answer(answer.text) if answer else "missing"
    return Sample(
        float(parsed == truth),
        answer.text if answer else "",
        truth,
        parsed=parsed,
        prompt=place[2],
        image=place[1],
        groups={"split": place[0]},
    )


TASK = Pope()
