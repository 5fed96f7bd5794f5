"""MMBench (dev 20230712) and MMBench-CN (dev 20231003), circular.

A question counts if it is right in every rotation of its options.

Scorer: VLMEvalKit dataset/utils/multiple_choice.py and utils/matching_util.py at exact matching
(no GPT): an answer whose option cannot be inferred counts as Z, wrong. LLaVA uploads an Excel file
(scripts/convert_mmbench_for_submission.py). Single-pass accuracy is another number (75.4 against
67.7 for 13B) and is given as vanilla_acc.
"""

import base64
import csv
from itertools import takewhile
from pathlib import Path
from typing import Any

from llava_jax.eval.answers import AnswerFile, Coverage, as_id, join
from llava_jax.eval.errors import AnswerError, DataError, NoTruthError
from llava_jax.eval.files import (
    TABLES,
    by_id,
    find,
    find_optional,
    need_xlsx,
    read_rows,
    write_xlsx,
)
from llava_jax.eval.questions import LETTER, Question
from llava_jax.eval.rules import read_letter
from llava_jax.eval.simple import Item, choices
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings, by_group, percent

# What pandas reads as no value at all, in a tsv or an Excel file.
_NO_VALUE = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
     "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)  # fmt: skip
ROTATION = 1_000_000  # row index = question + rotation * this
GROUPS = ("l2-category", "category", "split")
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")


class MMBench(Task):
    name = "mmbench"
    headline = "circular_acc"
    max_new_tokens = 1024
    data_files = "mmbench_dev_20230712.tsv (images inside)"
    suffix = LETTER
    takes_split = True
    files = ("mmbench_dev_2*.tsv", "MMBench_DEV_EN*.tsv", "*.tsv")
    chinese = False
    id_keys = ("index", "question_id")
    text_keys = ("text",)

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        for row in self._table(data, settings):
            # LLaVA stops at the first option that is not a value.
            options: Any = [*takewhile(lambda x: not _is_none(x), map(row.get, "ABCD"))]
            hint = "" if _is_none(row.get("hint")) else f"{row['hint']}\n"
            prompt = choices(f"{hint}{row['question']}", options, "")
            record = {"question_id": int(_index(row["index"])), "round_id": 0, "prompt": prompt}
            record |= {"options": options, "option_char": list("ABCD"[: len(options)])}
            key, images = str(row["index"]), (_image_bytes(row),)
            questions.append(Question(key, prompt + self.suffix, images, record))
        return questions

    def items(self, data: Path, settings: TaskSettings = DEFAULT) -> list[Item]:
        found = [(r, tuple(_options(r).values())) for r in self._table(data, settings)]
        every = [(_index(r["index"]), choices(r["question"], of, ""), of) for r, of in found if of]
        return [Item(key, asked, "", (), of) for key, asked, of in every]

    def group_of(self, question: Question) -> str:
        return str(int(question.key) % ROTATION)

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        given = self.read(answers, settings)
        truths, complete = self._truth(given, data, settings)
        truth = {_index(r["index"]): r for r in truths}
        table = self._find(data, settings)
        end = "" if complete else "the truth is the answer file's own"
        how: dict[str, Any] = {"open_end": end, "strict": settings.strict}
        asked = {key: str(row["question"]) for key, row in truth.items()}
        joined, coverage = join(truth, given, asked=asked, **how)
        rows: dict[str, Sample] = {}
        for key, row in truth.items():
            inferred = read_letter(joined[key].text, _options(row)) if key in joined else "Z"
            score, truth = float(inferred == row["answer"]), row["answer"]
            image = f"{table.name}#{key}" if table else ""
            groups = {k: str(row[k]) for k in GROUPS if row.get(k)}
            asked = str(row["question"])
            rows[key] = Sample(score, joined.text(key), truth, inferred, asked, image, groups)
        result = self._circular(rows, coverage)
        result.totals["not_inferred"] = sum(rows[key].parsed == "Z" for key in joined)
        return result

    def _circular(self, rows: dict[str, Sample], coverage: Coverage) -> Result:
        """The result of the groups of rows that ask one question in different rotations."""
        groups: dict[str, list[str]] = {}
        for key in rows:
            groups.setdefault(str(int(key) % ROTATION), []).append(key)
        samples = {}
        for g, keys in groups.items():
            if g not in rows:  # as VLMEvalKit: a group is its base row, its rotations do not count
                continue
            base = rows[g]
            every = [(k, rows[k]) for k in keys]
            shown = {
                k: {"inferred": s.parsed, "truth": s.truth, "answer": s.answer} for k, s in every
            }
            base.details = {"vanilla": base.score, "rows": shown}
            base.score = float(all(s.score for _, s in every))
            samples[g] = base
        if not samples:
            raise DataError(f"MMBench: no row with an index below {ROTATION:,}")
        scores = list(samples.values())
        totals: dict[str, Any] = {"circular_acc": percent(s.score for s in scores)}
        totals["vanilla_acc"] = percent(s.details["vanilla"] for s in scores)
        totals |= {"groups": len(scores), "rows": len(rows)}
        tables = {f"per {g}": table for g in GROUPS if (table := by_group(scores, g))}
        notes = ["the file has no rotations: circular_acc is vanilla accuracy"]
        notes = notes if len(rows) == len(samples) else []
        return Result(self, totals, samples, coverage, tables, notes)

    upload_name = "upload.xlsx"

    def check_packages(self, data: Path, settings: TaskSettings) -> None:
        if _no_value(self._table(data, settings)[0].get("answer")):  # it ends with an upload
            need_xlsx()

    def submission(
        self, answers: Path, data: Path, out: Path, settings: TaskSettings = DEFAULT
    ) -> Path:
        """The server's table, .xlsx or .csv by the name of `out`: the tsv's columns less hint,
        categories, source, image and comment, with `prediction` as the seventh."""
        table = self._table(data, settings)
        ids = [str(r["index"]) for r in table]
        joined, coverage = self.join(ids, answers, settings)
        self.warn_of(coverage)
        header = [c for c in table[0] if c not in DROPPED]
        header.insert(6, "prediction")
        rows = []
        for key, row in zip(ids, table):
            answer = joined[key].text if key in joined else None
            cells = {**row, "index": int(key), "prediction": answer}
            rows.append([None if _no_value(cells[c]) else cells[c] for c in header])
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".csv":
            with open(out, "w", newline="", encoding="utf-8") as f:
                csv.writer(f).writerows([header, *rows])
        else:
            write_xlsx(out, header, rows)
        return out

    def read(self, path: Path, settings: TaskSettings, **how: Any) -> AnswerFile:
        return super().read(path, settings, empty_is_none=path.suffix.lower() in TABLES, **how)

    def _truth(
        self, given: AnswerFile, data: Path, settings: TaskSettings
    ) -> tuple[list[dict[str, Any]], bool]:
        """Rows with options and answer, and whether these are all: the tsv's are, those that the
        answer file itself carries (as VLMEvalKit's result files and the upload file do) may not be."""
        if table := self._find(data, settings):
            rows = self._table(data, settings)
            if not _no_value(rows[0].get("answer")):
                return rows, True
            if not any("A" in a.row for a in given.rows):
                raise NoTruthError(f"{table}: has no answers (this split is scored by a server)")
        for a in given.rows:
            if not {"A", "B", "question", "answer"} <= a.row.keys():
                what = f"no tsv under {data} and the row lacks question, A, B or answer"
                raise AnswerError(f"{given.path} line {a.line}, index {a.id}: {what}")
            a.row.setdefault("index", a.id)
        return list({a.id: a.row for a in given.rows}.values()), False

    def _find(self, data: Path, settings: TaskSettings) -> Path | None:
        path = find_optional(data, self.files, "table", settings.split)
        name = path.name.lower() if path else ""
        if name.startswith("mmbench") and ("_cn" in name) != self.chinese:
            what = f"{path}: by its name, not the table of {self.title}"
            raise DataError(what, fix="--tasks mmbench is the English one, mmbench_cn the Chinese")
        return path

    def _table(self, data: Path, settings: TaskSettings) -> list[dict[str, Any]]:
        path = self._find(data, settings) or find(data, self.files, "table", settings.split)
        rows = [row for _, row in read_rows(path)]
        if not rows or not {"index", "question", "A", "B"} <= rows[0].keys():
            raise DataError(f"{path}: no columns index, question, A, B")
        by_id(rows, "index", path)
        return rows


class MMBenchCN(MMBench):
    name = "mmbench_cn"
    data_files = "mmbench_dev_cn_20231003.tsv (images inside)"
    suffix = "\n请直接回答选项字母。"
    files = ("mmbench_dev_cn_*.tsv", "MMBench_DEV_CN*.tsv", "*.tsv")
    chinese = True


def _options(row: dict[str, Any]) -> dict[str, str]:
    return {c: str(row[c]) for c in "ABCD" if not _no_value(row.get(c))}


def _index(value: Any) -> str:
    key = as_id(value, "MMBench: index")
    if not key.isdigit():
        raise DataError(f"MMBench: index {key!r} is not a number")
    return key


def _no_value(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and value in _NO_VALUE)


def _is_none(value: Any) -> bool:
    """LLaVA's is_none (model_vqa_mmbench.py), of a cell as pandas reads it."""
    return _no_value(value) or str(value).lower() in ("nan", "none")


def _image_bytes(row: dict[str, Any]) -> bytes:
    try:
        return base64.b64decode(row["image"], validate=True)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"MMBench index {row['index']}: no base64 image") from None
