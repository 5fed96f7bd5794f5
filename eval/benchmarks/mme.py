"""MME: perception (10 tasks) and cognition (4), up to 200 points a task.

Owner's scorer: BradyFU eval_tool/calculation.py. Answers are the tool's `<task>.txt` files (image,
question, truth, answer by tabs, two lines an image), or LLaVA's jsonl, whose question_id is the
image and so appears twice; those are joined by (task, image, question).
"""

from collections import Counter
from pathlib import Path

from llava_jax.eval.answers import Answer, AnswerFile, Coverage, join, read_answers
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.task import (
    DEFAULT,
    SHORT,
    Options,
    Question,
    Result,
    Sample,
    Task,
    llava_questions,
)

PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
YES_NO = "Please answer yes or no."


class Mme(Task):
    name = "mme"
    title = "MME"
    data_files = "MME_Benchmark_release_version/<task>/; llava_mme.jsonl to ask"

    def questions(self, data: Path, options: Options = DEFAULT) -> list[Question]:
        own = llava_questions(data, ("llava_mme*.jsonl",))
        if own is not None:
            return own
        questions = []
        for task, image, question, _ in _release(data):
            text = question.replace(YES_NO, "").strip() + SHORT
            record = {"question_id": f"{task}/{image}", "prompt": text, "category": task}
            key = f"{task}/{image}/{question}"
            questions.append(Question(key, text, (f"{task}/{image}",), record))
        return questions

    def score(self, answers: Path, data: Path, options: Options = DEFAULT) -> Result:
        if answers.is_dir() or answers.suffix == ".txt":
            samples, coverage = _from_tool_files(answers)
        else:
            samples, coverage = self._from_jsonl(answers, data, options)
        tasks = {t: [s for s in samples.values() if s.groups["task"] == t] for t in TASKS}
        table = {t: mme_task(s) for t, s in tasks.items() if s}
        totals = {
            "perception": sum(table[t]["score"] for t in PERCEPTION if t in table),
            "cognition": sum(table[t]["score"] for t in COGNITION if t in table),
        }
        result = Result(
            self.name, "perception", totals, samples, coverage, {"per task": table}, unit=2000
        )
        absent = [t for t in TASKS if t not in table]
        if absent:
            result.notes.append(f"no answers to, and no points for: {', '.join(absent)}")
        return result

    def submission(self, answers: Path, data: Path, out: Path, options: Options = DEFAULT) -> Path:
        """Writes the tool's `<task>.txt` files into the folder `out`, answers on one line."""
        samples, _ = self._from_jsonl(answers, data, options)
        out.mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            lines = [
                "\t".join(
                    [s.groups["pair"], s.prompt, s.truth.capitalize(), " ".join(s.answer.split())]
                )
                for s in samples.values()
                if s.groups["task"] == task
            ]
            if lines:
                text = "".join(line + "\n" for line in lines)
                (out / f"{task}.txt").write_text(text, encoding="utf-8")
        return out

    def _from_jsonl(
        self, path: Path, data: Path, options: Options
    ) -> tuple[dict[str, Sample], Coverage]:
        given = read_answers(
            path,
            id_keys=("question_id",),
            text_keys=("text", "answer"),
            skip_bad_lines=options.skip_bad_lines,
        )
        truth: dict[str, tuple[str, str, str, str]] = {}
        seen: Counter[str] = Counter()
        for row in _release(data):
            task, image, question, _ = row
            truth[_nth(f"{task}/{_stem(image)}/{_core(question)}", seen)] = row
        seen.clear()
        rows = []
        for a in given.rows:
            if "prompt" not in a.row:
                raise AnswerError(f"{path} line {a.line}, question_id {a.id}: no prompt to join by")
            task, image = a.id.split("/")[0], a.id.split("/")[-1]
            key = _nth(f"{task}/{_stem(image)}/{_core(a.row['prompt'])}", seen)
            rows.append(Answer(key, a.text, a.line, a.row))
        joined, coverage = join(
            truth, AnswerFile(path, rows, given.bad_lines), strict=options.strict
        )
        samples = {
            key: _sample(task, image, question, label, joined[key].text if key in joined else "")
            for key, (task, image, question, label) in truth.items()
        }
        return samples, coverage


def mme_answer(text: str) -> str:
    """ "yes" or "no" if it stands in the first four characters, whatever the case, else "other"."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_task(samples: list[Sample]) -> dict[str, float]:
    """score = 100 acc + 100 acc+ (both questions of an image right), of samples in image pairs."""
    pairs: dict[str, list[float]] = {}
    for s in samples:
        pairs.setdefault(s.groups["pair"], []).append(s.score)
    acc = sum(s.score for s in samples) / len(samples)
    plus = sum(sum(p) == 2 for p in pairs.values()) / len(pairs)
    other = sum(s.parsed == "other" for s in samples)
    return {
        "score": acc * 100 + plus * 100,
        "acc": 100 * acc,
        "acc+": 100 * plus,
        "other": other,
        "n": len(samples),
    }


def _sample(task: str, image: str, question: str, label: str, text: str) -> Sample:
    parsed, truth = mme_answer(text), label.lower()
    return Sample(
        float(parsed == truth),
        text,
        truth,
        parsed=parsed,
        prompt=question,
        image=f"{task}/{image}",
        groups={"task": task, "pair": image},
    )


def _from_tool_files(path: Path) -> tuple[dict[str, Sample], Coverage]:
    files = [path] if path.is_file() else sorted(path.glob("*.txt"))
    files = [f for f in files if f.stem in TASKS]
    if not files:
        raise AnswerError(f"{path}: no file of an MME task (existence.txt, …)")
    samples: dict[str, Sample] = {}
    for file in files:
        lines = file.read_text(encoding="utf-8").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        if len(lines) % 2:
            raise AnswerError(f"{file}: {len(lines)} lines, but every image has two questions")
        for n, line in enumerate(lines):
            cells = line.split("\t")
            if len(cells) != 4:
                raise AnswerError(
                    f"{file} line {n + 1}: {len(cells)} cells between tabs, not 4 "
                    f"(image, question, truth, answer)"
                )
            if cells[2].lower() not in ("yes", "no"):
                raise AnswerError(f"{file} line {n + 1}: the truth is {cells[2]!r}, not yes or no")
            sample = _sample(file.stem, *cells)
            # The tool pairs lines by position, whatever image they name.
            sample.groups["pair"] = str(n // 2)
            samples[f"{file.stem}/{n}"] = sample
    return samples, Coverage(expected=len(samples), answered=len(samples))


def _release(data: Path) -> list[tuple[str, str, str, str]]:
    """(task, image, question, truth) of the release, whose larger tasks keep images/ and
    questions_answers_YN/ apart, or of the tool's 3-column `<task>.txt` templates."""
    root = data / "MME_Benchmark_release_version"
    root = root if root.is_dir() else data
    rows = []
    for task in TASKS:
        folder, template = root / task, root / f"{task}.txt"
        if template.is_file():
            rows += [(task, *_cells(template, n, line, 3)) for n, line in _lines(template)]
        elif folder.is_dir():
            apart = folder / "questions_answers_YN"
            for file in sorted((apart if apart.is_dir() else folder).glob("*.txt")):
                image = _image_of(folder, file.stem)
                rows += [(task, image, *_cells(file, n, line, 2)) for n, line in _lines(file)]
    if not rows:
        raise DataError(f"{data}: no MME task folder in it (existence/, count/, …)")
    return rows


def _lines(path: Path) -> list[tuple[int, str]]:
    text = path.read_text(encoding="utf-8").split("\n")
    return [(n, line.strip()) for n, line in enumerate(text, 1) if line.strip()]


def _cells(path: Path, number: int, line: str, count: int) -> list[str]:
    cells = line.split("\t")[:count]
    if len(cells) != count or cells[-1].lower() not in ("yes", "no"):
        raise DataError(f"{path} line {number}: not {count} cells ending in Yes or No")
    return cells


def _image_of(folder: Path, stem: str) -> str:
    for place in ("images", ""):
        for suffix in (".jpg", ".png", ".jpeg"):
            if (folder / place / (stem + suffix)).is_file():
                return f"{place}/{stem}{suffix}" if place else stem + suffix
    return f"{stem}.jpg"


def _stem(image: str) -> str:
    return image.split("/")[-1].split(".")[0]


def _core(question: str) -> str:
    """A question without what LLaVA and MME append to it."""
    return question.replace(SHORT.strip(), "").replace(YES_NO, "").strip()


def _nth(key: str, seen: Counter[str]) -> str:
    seen[key] += 1
    return key if seen[key] == 1 else f"{key}#{seen[key]}"


TASK = Mme()
