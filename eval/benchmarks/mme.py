"""MME: perception (10 tasks) and cognition (4), up to 200 points per task.

Owner's scorer: BradyFU eval_tool/calculation.py. Answers are the tool's `<task>.txt` files (image,
question, truth, answer by tabs, two lines per image), or LLaVA's jsonl, whose question_id is the
image and so appears twice; those are joined by (task, image, question).
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llava_jax.eval.answers import Answer, Coverage, Joined, join
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.questions import SHORT, Question, numbered, question
from llava_jax.eval.task import DEFAULT, Result, Sample, Task, TaskSettings
from llava_jax.util import read_text, write_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters",
    "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
YES_NO = "Please answer yes or no."


class Item(NamedTuple):
    """One question of the release. label: "Yes" or "No", in any case."""

    task: str
    image: str
    question: str
    label: str


class Mme(Task):
    name = "mme"
    headline = "perception"
    unit = 2000
    unit_note = "points: at most 2,000 for perception, 800 for cognition"
    data_files = "MME_Benchmark_release_version/<task>/; llava_mme.jsonl to ask"
    llava_files = ("llava_mme*.jsonl",)

    def owner_questions(self, data: Path, settings: TaskSettings) -> list[Question]:
        questions = []
        for task, image, asked, _ in _read_release(data):
            prompt, path = asked.replace(YES_NO, "").strip() + SHORT, f"{task}/{image}"
            key = f"{path}/{asked}"
            questions.append(question(path, prompt, path, key=key, category=task))
        return questions

    def group_of(self, question: Question) -> str:
        return str(question.images[0]) if question.images else question.key

    def score(self, answers: Path, data: Path, settings: TaskSettings = DEFAULT) -> Result:
        if answers.is_dir() or answers.suffix == ".txt":
            samples = _from_tool_files(answers)
            coverage = _add_missing(samples, answers, data, settings)
        else:
            items, joined, coverage = self._join(answers, data, settings)
            given = {k: a.text for k, a in joined.items()}
            samples = {k: _sample(item, given.get(k)) for k, item in items.items()}
        tasks = {t: [s for s in samples.values() if s.groups["task"] == t] for t in TASKS}
        table = {t: mme_task(s) for t, s in tasks.items() if s}
        halves = {"perception": PERCEPTION, "cognition": COGNITION}
        totals = {k: sum(table[t]["score"] for t in h if t in table) for k, h in halves.items()}
        absent = ", ".join(t for t in TASKS if t not in table)
        notes = [f"no answers to, and no points for: {absent}"] if absent else []
        return Result(self, totals, samples, coverage, {"per task": table}, notes)

    def submission(
        self, answers: Path, data: Path, out: Path, settings: TaskSettings = DEFAULT
    ) -> Path:
        """Writes the tool's `<task>.txt` files into the folder `out`, answers on one line."""
        items, joined, coverage = self._join(answers, data, settings)
        self.warn_of(coverage)
        files: dict[str, str] = {}
        for key, (task, image, asked, label) in items.items():
            cells = [image, asked, label.capitalize(), " ".join(joined.text(key).split())]
            files[task] = files.get(task, "") + "\t".join(cells) + "\n"
        out.mkdir(parents=True, exist_ok=True)
        for task, text in files.items():
            write_text(out / f"{task}.txt", text)
        return out

    def _join(
        self, path: Path, data: Path, settings: TaskSettings
    ) -> tuple[dict[str, Item], Joined, Coverage]:
        """The release's items and their answers in LLaVA's jsonl, by task, image and question."""
        given, seen = self.read(path, settings), Counter[str]()
        items = {_key(i.task, i.image, i.question, seen): i for i in _read_release(data)}
        seen.clear()

        def id_of(a: Answer) -> str:
            if "prompt" not in a.row:
                raise AnswerError(f"{path} line {a.line}, question_id {a.id}: no prompt to join by")
            return _key(a.id.split("/")[0], a.id, a.row["prompt"], seen)

        joined, coverage = join(items, given.with_ids(id_of), strict=settings.strict)
        return items, joined, coverage


def _key(task: str, image: str, question: str, seen: Counter[str]) -> str:
    """Task, image and question without what LLaVA and MME append to it; "#2", … where all repeat."""
    asked = question.replace(SHORT.strip(), "").replace(YES_NO, "").strip()
    return numbered(f"{task}/{image.split('/')[-1].split('.')[0]}/{asked}", seen)


def mme_answer(text: str) -> str:
    """ "yes" or "no" if it stands in the first four characters, whatever the case, else "other"."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def mme_task(samples: list[Sample]) -> dict[str, float]:
    """score = 100 acc + 100 acc+ (both questions of an image right), of samples in image pairs."""
    pairs: dict[str, list[float]] = {}
    for s in samples:
        pairs.setdefault(s.groups["pair"], []).append(s.score)
    acc = sum(s.score for s in samples) / len(samples) * 100
    plus = sum(sum(p) == 2 for p in pairs.values()) / len(pairs) * 100
    other = sum(s.parsed == "other" for s in samples)
    return {"score": acc + plus, "acc": acc, "acc+": plus, "other": other, "n": len(samples)}


def _sample(item: Item, text: str | None) -> Sample:
    """text: the answer, or None where there is none, which is wrong."""
    parsed, truth = "missing" if text is None else mme_answer(text), item.label.lower()
    groups, image = {"task": item.task, "pair": item.image}, f"{item.task}/{item.image}"
    return Sample(float(parsed == truth), text or "", truth, parsed, item.question, image, groups)


def _from_tool_files(path: Path) -> dict[str, Sample]:
    files = [path] if path.is_file() else sorted(path.glob("*.txt"))
    files = [f for f in files if f.stem in TASKS]
    if not files:
        raise AnswerError(f"{path}: no file of an MME task (existence.txt, …)")
    samples: dict[str, Sample] = {}
    for file in files:
        lines = read_text(file, AnswerError).replace("\r\n", "\n").split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        if len(lines) % 2:
            raise AnswerError(f"{file}: {len(lines)} lines, but every image has two questions")
        for n, line in enumerate(lines):
            cells, where = line.split("\t"), f"{file} line {n + 1}"
            if len(cells) != 4:
                named = "(image, question, truth, answer)"
                raise AnswerError(f"{where}: {len(cells)} cells between tabs, not 4 {named}")
            if cells[2].lower() not in ("yes", "no"):
                raise AnswerError(f"{where}: the truth is {cells[2]!r}, not yes or no")
            sample = _sample(Item(file.stem, *cells[:3]), cells[3])
            # The tool pairs lines by position, whatever image they name.
            sample.groups["pair"] = str(n // 2)
            samples[f"{file.stem}/{n}"] = sample
    return samples


def _add_missing(
    samples: dict[str, Sample], answers: Path, data: Path, settings: TaskSettings
) -> Coverage:
    """Adds the questions of the release that the tool's files lack, as wrong."""
    try:
        release = [] if data.resolve() == answers.resolve() else _read_release(data)
    except DataError:
        release = []
    coverage = Coverage(answered=len(samples), open_end="" if release else f"no release in {data}")
    seen, again, alone = Counter[str](), Counter[str](), Counter[str]()
    given = {_key(s.groups["task"], s.image, s.prompt, seen) for s in samples.values()}
    for item in release:
        if (key := _key(item.task, item.image, item.question, again)) not in given:
            samples[key] = _sample(item, None)
            # The files pair lines by position, so what they lack is paired in its own order.
            samples[key].groups["pair"] = f"missing {alone[item.task] // 2}"
            alone[item.task] += 1
            coverage.missing.append(key)
    coverage.expected = len(samples)
    coverage.check(answers, settings.strict)
    return coverage


def _read_release(data: Path) -> list[Item]:
    """The release, whose larger tasks keep images/ and questions_answers_YN/ apart, or the tool's
    3-column `<task>.txt` templates."""
    root = data / "MME_Benchmark_release_version"
    root = root if root.is_dir() else data
    items = []
    for task in TASKS:
        folder, template = root / task, root / f"{task}.txt"
        if template.is_file():
            items += [Item(task, *cells) for cells in _read_cells(template, 3)]
        elif folder.is_dir():
            apart = folder / "questions_answers_YN"
            for file in sorted((apart if apart.is_dir() else folder).glob("*.txt")):
                image = _image_of(folder, file.stem)
                items += [Item(task, image, *cells) for cells in _read_cells(file, 2)]
    if not items:
        raise DataError(f"{data}: no MME task folder in it (existence/, count/, …)")
    return items


def _read_cells(path: Path, count: int) -> Iterator[list[str]]:
    for number, line in enumerate(read_text(path, DataError).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.strip().split("\t")[:count]
        if len(cells) != count or cells[-1].lower() not in ("yes", "no"):
            raise DataError(f"{path} line {number}: not {count} cells ending in Yes or No")
        yield cells


def _image_of(folder: Path, stem: str) -> str:
    names = [f"{place}{stem}{s}" for place in ("images/", "") for s in (".jpg", ".png", ".jpeg")]
    return next((name for name in names if (folder / name).is_file()), f"{stem}.jpg")
