"""A user types what the documents say, in order: every command ends with 0, every block runs.

Only weights, data and sites are stand-ins (standins.py), and training takes one small step. What is
not run is listed with its reason in reviewed.py. Each page has a folder of its own, in which the
outputs of its earlier lines lie.
"""

import contextlib
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llava_jax import cli
from tests.documents import standins
from tests.documents.lines import ROOT, Line, all_lines, commands
from tests.documents.reviewed import FEWER, FEWER_STAGES, NOT_RUN, PROGRAMS, SLOW, WITH_STAGES

LINES = all_lines()
OUTPUTS = ("--out", "--workdir", "--json", "--report")
BROUGHT = ("configs", "docs", "bench", "examples", "requirements", "setup.py", "pyproject.toml")


def reason_not_to_run(command: list[str]) -> str | None:
    said = " ".join(command)
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, said)), None)


def parameters() -> list:
    made = []
    for line in LINES:
        slow = any(re.search(pattern, line.text) for pattern in SLOW)
        made.append(pytest.param(line, id=line.id, marks=[pytest.mark.slow] if slow else []))
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> standins.Models:
    return standins.Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def places(models, tmp_path_factory):
    """Page -> its folder."""
    base = tmp_path_factory.mktemp("pages")
    models.fill_hub_cache(base / "hub")

    def place(page: str) -> Path:
        folder = base / page.replace("/", "_")
        if not folder.exists():
            folder.mkdir()
            for name in BROUGHT:
                (folder / name).symlink_to(ROOT / name)
        return folder

    place.hub = base / "hub"
    place.namespaces = {}
    return place


@pytest.fixture
def desk(places, models, monkeypatch):
    """Page -> a Desk in its folder, with no network and everything the hub would give."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(places.hub))
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("llava_jax.eval.fetch._download", standins.download)
    monkeypatch.setattr("llava_jax.eval.judge.endpoint.Endpoint._post", standins.judge)
    monkeypatch.setattr("llava_jax.eval.judge.endpoint.Endpoint.check", lambda endpoint: None)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")

    def open_desk(page: str) -> Desk:
        folder = places(page)
        monkeypatch.chdir(folder)
        return Desk(folder, models, monkeypatch, places.namespaces.setdefault(page, {}))

    return open_desk


class Desk:
    """Runs the lines of one page in its folder, putting there what a line needs and nobody made."""

    def __init__(self, folder: Path, models: standins.Models, monkeypatch, namespace: dict):
        self.folder, self.models, self.patch = folder, models, monkeypatch
        self.namespace = namespace

    def run(self, line: Line) -> None:
        if line.kind == "python":
            self.python(line)
            return
        for command in commands(line.text):
            if reason_not_to_run(command) is None:
                self.command(command)

    def python(self, line: Line) -> None:
        for name in re.findall(r'"([^"\n]+)"', line.text):
            if name.endswith((".jpg", ".png")):
                self.put(name)
            elif line.page.startswith("docs/conversion") and name == "my-llava":
                shutil.rmtree(self.folder / name, ignore_errors=True)  # written, and must be new
        if "def get_config" in line.text:  # a config of one's own
            named = re.match(r"# (\w+\.py)\n", line.text)
            file = named[1] if named else "own.py"
            (self.folder / file).write_text(line.text)
            assert cli.main(["train", "--config", file, "--show"]) == 0
            return
        exec(compile(line.text, line.id, "exec"), self.namespace)

    def command(self, words: list[str]) -> None:
        while re.match(r"[A-Z_]+=", words[0]):
            self.patch.setenv(*words.pop(0).split("=", 1))
        if words[0] == "srun":  # one process here; several: tests/train/test_processes.py
            words = words[words.index("llava-jax") :]
        if words[:3] == ["python", "-m", "llava_jax"]:
            words = ["llava-jax", *words[3:]]
        if words[0] == "pip":
            check_pip(words)
            return
        said = " ".join(words)
        if small := next((v for k, v in PROGRAMS.items() if re.search(k, said)), None):
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, *words[1:], *small], check=True, env=environment)
            return
        assert words[0] == "llava-jax", f"no test runs {said!r}: run it, or list it in reviewed.py"
        words = words[1:]
        self.prepare(words)
        if words[0] == "train":
            words = [*words, *fewer_steps(words)]
        typed = iter(["y"] if words[:2] == ["eval", "judge"] else ["What is this?", "/quit"])
        with contextlib.closing(Typed(typed)) as keyboard:
            self.patch.setattr("sys.stdin", keyboard)
            assert cli.main(words) == 0, " ".join(words)

    # What a line needs ----------------------------------------------------------------------------

    def prepare(self, words: list[str]) -> None:
        """Puts a stand-in for each input that the words name and no earlier line has made."""
        made = {words[2]} if words[0] == "convert" and len(words) > 2 else set()
        made |= {b for a, b in itertools.pairwise(words) if a in OUTPUTS}
        for name in made:
            path = self.folder / name
            if words[0] == "convert" and path.is_dir():
                shutil.rmtree(path)  # the next example under the same name
        if words[0] == "eval":
            self.prepare_eval(words)
        for before, word in itertools.pairwise(words):
            option, _, value = word.rpartition("=")
            if "--images" in (before, option) or option == "--config.data.image_folder":
                for name in paths_in(value):
                    self.unless_there(name, standins.image_folder)
            elif option == "--config.data_folder":
                self.unless_there(value, standins.made_set)
            elif option in ("--config.data.path", "") and ".json" in value:
                captions = any("pretrain" in w for w in words)
                for name in paths_in(value) if words[0] in ("train", "data") else ():
                    self.unless_there(name, lambda p, c=captions: standins.records(p, c))
            elif value not in made and option in ("", "--config.model.init", "--config.model.base"):
                self.put(value)
        config = ROOT / "configs" / f"{config_of(words)}.py"
        own = self.folder / f"{config_of(words)}.py"
        if own.exists():  # an earlier block of the page
            for setting, value in re.findall(r'c\.data\.(\w+) = "(.*)"', own.read_text()):
                make = {"path": standins.records, "image_folder": standins.image_folder}[setting]
                self.unless_there(value, make)
        if config.exists():
            for name in re.findall(r'"(runs/[\w/]+)"', config.read_text()):
                if name.endswith("/data"):
                    self.unless_there(name, standins.made_set)
                self.put(name)

    def put(self, name: str) -> None:
        """A picture or a model, if the name is of one."""
        if name.endswith((".jpg", ".png")):
            self.unless_there(name, standins.picture)
        elif name in standins.FOLDERS or name in ("M", "my-jax", "my-llava", "FOLDER"):
            kind = self.models.of(standins.FOLDERS.get(name, "jax"))
            self.unless_there(name, lambda p: shutil.copytree(kind, p))
        elif re.fullmatch(r"runs/\w+(/\w+)?/export", name):
            self.unless_there(name, lambda p: shutil.copytree(self.models.of("jax"), p))

    def unless_there(self, name: str, make) -> None:
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            make(path)

    def prepare_eval(self, words: list[str]) -> None:
        value = dict(itertools.pairwise(words))
        if value.get("--data") and words[1] != "fetch":
            data = self.folder / value["--data"]
            tasks = value["--tasks"].split(",") if "--tasks" in value else [words[2]]
            for task in tasks:
                folder = data / task if "--tasks" in value else data
                if not folder.exists():
                    standins.benchmark(folder, task)
            if "--answers" in value:
                standins.answers(self.folder / value["--answers"], words[2], data)
        if words[1] == "report":
            for number, name in enumerate(w for w in words[2:] if w.endswith(".json")):
                self.unless_there(
                    name, lambda p, n=number: self.result(p, ("vqav2", "pope")[n % 2])
                )

    def result(self, path: Path, task: str) -> None:
        data, answers = self.folder / "others" / task, path.with_suffix(".answers.jsonl")
        standins.benchmark(data, task)
        standins.answers(answers, task, data)
        words = ["eval", "score", task, "--answers", answers, "--data", data, "--json", path]
        assert cli.main([str(w) for w in words]) == 0


class Typed:
    """A keyboard on which a few lines are typed, one after the other."""

    def __init__(self, lines):
        self.lines = lines
        self.quiet, self._other_end = os.pipe()  # nothing more is there when it is asked

    def fileno(self) -> int:
        return self.quiet

    def close(self) -> None:
        os.close(self.quiet)
        os.close(self._other_end)

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return next((f"{line}\n" for line in self.lines), "")

    def __iter__(self):
        return iter(self.readline, "")

    def read(self) -> str:
        return "".join(self)


def config_of(words: list[str]) -> str:
    """The name of the config of a training command: finetune_7b."""
    named = dict(itertools.pairwise(words)).get("--config", "")
    return Path(named).stem


def fewer_steps(words: list[str]) -> list[str]:
    """Settings that make a run short. A micro-batch has a row for each of the 8 simulated devices."""
    if config_of(words) in WITH_STAGES:
        settings = FEWER_STAGES
    else:
        micro = re.search(r"--config\.grad_accum=(\d+)", " ".join(words))
        settings = (*FEWER, f"batch_size={8 * int(micro[1] if micro else 1)}")
    return [f"--config.{setting}" for setting in settings]


def paths_in(value: str) -> list[str]:
    """The paths of a setting that may hold one, several, or several with weights."""
    return re.findall(r"[\w./-]*[A-Za-z][\w./-]*", value)


def check_pip(words: list[str]) -> None:
    """The line parses, names files that exist, and asks only for extras that setup.py declares."""
    extras = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text(), re.M))
    assert words[1] == "install"
    rest = words[2:]
    files = [b for a, b in itertools.pairwise(rest) if a == "-r"]
    for name in files:
        assert (ROOT / name).is_file(), name
    for word in rest:
        if word.startswith("-") or word in files:
            continue
        if word.startswith("."):
            word = f"llava_jax{word[1:]}"
        need = Requirement(word)
        if canonicalize_name(need.name) == "llava-jax":
            assert need.extras <= extras, need


# Tests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", parameters())
def test_line_runs(line, desk):
    told = [reason_not_to_run(c) for c in commands(line.text)] if line.kind == "bash" else [None]
    if all(told):
        pytest.skip(told[0])
    desk(line.page).run(line)


def test_every_reviewed_entry_still_fits_a_line():
    texts = [" ".join(c) for line in LINES if line.kind == "bash" for c in commands(line.text)]
    for pattern in [*NOT_RUN, *PROGRAMS, *SLOW]:
        assert any(re.search(pattern, text) for text in texts), f"no line fits {pattern!r} any more"
