"""Tasks that are not in the package: a YAML or Python file, the rules, parquet, and an entry point."""

import importlib.metadata
import io
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.eval import outside
from llava_jax.eval.errors import DataError
from llava_jax.eval.files import read_rows
from llava_jax.eval.rules import RULES, levenshtein, read_letter
from llava_jax.eval.run.command import RunSettings, run_task
from llava_jax.eval.simple import Item, SimpleTask
from llava_jax.eval.task import _OUTSIDE, TASKS, TaskSettings, get_task
from tests.eval.test_judge import Judge, judge  # noqa: F401
from tests.eval.test_run import Echo
from tests.eval.test_vqa_family import dump, lines


@pytest.fixture(autouse=True)
def forget():
    yield
    for name in list(_OUTSIDE):
        del TASKS[name], _OUTSIDE[name]


YAML = """
name: shapes
title: My shapes
files: "*.jsonl"
prompt: "{question}\\n{options}\\nAnswer with the option's letter from the given choices directly."
image: picture
options: [A, B, C, D, E]
answer: truth
group: kind
together: question
rule: letter
"""
ROWS = [
    {"question": "Which?", "A": "red", "B": "blue", "picture": "0.png", "truth": "B", "kind": "x"},
    {
        "question": "Which?",
        **dict(zip("ABCDE", "vwxyz")),
        "picture": "1.png",
        "truth": 4,
        "kind": "y",
    },
]


def test_empty_cells_are_nothing(tmp_path):
    (tmp_path / "shapes.yaml").write_text(YAML.replace('"{question}', '"{hint}{question}'))
    empty = {"question": None, "kind": None, "hint": None}
    rows = [{**ROWS[0], **empty}, {**ROWS[1], **empty}, {**ROWS[1], "hint": "Look. "}]
    lines(tmp_path / "rows.jsonl", rows)
    outside.include(tmp_path)
    first, second, third = get_task("shapes").items(tmp_path)
    assert (first.group, second.group, third.group) == ("", "", "Which?")  # each alone, not as one
    assert (first.groups, third.groups) == ({}, {"kind": "y"})
    assert first.prompt.startswith("\nA. red")
    assert third.prompt.startswith("Look. Which?\nA. v")
    del TASKS["shapes"], _OUTSIDE["shapes"]
    (tmp_path / "shapes.yaml").write_text(YAML + "id: key\n")
    lines(tmp_path / "rows.jsonl", [{**ROWS[0], "key": None}])
    outside.include(tmp_path)
    with pytest.raises(DataError, match="row 1: .*its id, key, is empty"):
        get_task("shapes").items(tmp_path)


def test_a_yaml_task_over_jsonl(tmp_path, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "shapes.yaml").write_text(YAML)
    data = tmp_path / "data" / "shapes"
    lines(data / "rows.jsonl", ROWS)
    for n in range(2):
        (data / f"{n}.png").write_bytes(b"%d" % n)
    outside.include(tmp_path / "tasks")
    seen = []
    run = RunSettings(tmp_path / "data", tmp_path / "out", "m", show_progress=False)
    result = run_task(Echo(lambda r: seen.append(r) or "E."), get_task("shapes"), run)
    asked = {r.images[0].name: r.messages for r in seen}
    assert asked["0.png"].startswith("Which?\nA. red\nB. blue\nAnswer with")
    assert result["title"] == "My shapes"
    assert result["totals"] == {"accuracy": 50.0, "n": 2, "group_accuracy": 0.0, "groups": 1}
    assert result["per_sample"]["2"]["parsed"] == "E"
    words = ["--include", str(tmp_path / "tasks"), "--data", str(data)]
    answers = tmp_path / "out" / "shapes" / "answers.jsonl"
    assert main(["eval", "score", "shapes", "--answers", str(answers), *words]) == 0
    assert "accuracy        50.00 <" in capsys.readouterr().out
    assert main(["eval", "list", "--include", str(tmp_path / "tasks")]) == 0
    assert "My shapes" in capsys.readouterr().out
    result_file = tmp_path / "out" / "shapes" / "result.json"
    assert main(["eval", "report", str(result_file), "--out", str(tmp_path / "report")]) == 0


def test_a_python_task_over_parquet_with_pictures(tmp_path):
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    png = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(png, "PNG")
    image = {"bytes": png.getvalue(), "path": "x.png"}
    table = {"q": ["what colour"] * 2, "image": [image] * 2, "a": [["red"] * 3, ["blue"] * 3]}
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "data" / "test-0.parquet")
    (tmp_path / "mine.py").write_text(
        "from llava_jax.eval.simple import Item, SimpleTask\n\n"
        "class Mine(SimpleTask):\n"
        "    name = 'mine'\n"
        "    files = ('*.parquet',)\n"
        "    data_files = 'test-*.parquet'\n"
        "    rule = 'vqa'\n\n"
        "    def item(self, row, number):\n"
        "        return Item(str(number), row['q'], row['a'], (row['image'],))\n\n"
        "TASK = Mine()\n"
    )
    assert outside.include(tmp_path) == ["mine"]
    seen = []
    run = RunSettings(tmp_path / "data", tmp_path / "out", "m", show_progress=False)
    result = run_task(Echo(lambda r: seen.append(r.images) or "Red."), get_task("mine"), run)
    assert seen == [(png.getvalue(),)] * 2
    # Three annotators who agree: each leaves two of the others, and 2 / 3 is the most.
    assert result["totals"]["accuracy"] == pytest.approx(100 * 2 / 3 / 2)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"bad\.parquet: is not a parquet file"):
        read_rows(tmp_path / "bad.parquet")


def test_a_judged_task(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "{name: free, files: '*.jsonl', prompt: '{q}', answer: a, rule: judge}"
    )
    lines(tmp_path / "d" / "r.jsonl", [{"q": "why", "a": "so"}, {"q": "who", "a": "me"}])
    outside.include(tmp_path)
    task = get_task("free")
    answers = lines(tmp_path / "a.jsonl", [{"question_id": n, "text": "x"} for n in (1, 2)])
    keys, messages = zip(*task.requests(answers, tmp_path / "d"))
    assert keys == ("1", "2")
    assert "why | so | x | " in messages[0]
    grades = {"1": {"model": ["j"], "score": [0.5, 1.0]}, "2": {"model": ["j"], "score": [None]}}
    result = task.score(dump(tmp_path / "g.json", grades), tmp_path / "d")
    assert result.totals == {"accuracy": 75.0, "n": 1, "judge": "j"}
    assert result.notes == ["no grade could be read for 2; no mean has them"]
    lines(tmp_path / "d" / "val.jsonl", [{"q": "when", "a": "now"}])
    half = lines(tmp_path / "half.jsonl", [{"question_id": 1, "text": "x"}])
    ((_, message),) = task.requests(half, tmp_path / "d", TaskSettings(split="val"))
    assert "when | now | x | " in message


def test_each_printed_line_goes_on_as_printed(tmp_path, capsys, judge: Judge):  # noqa: F811
    own = tmp_path / "own tasks"
    own.mkdir()
    (own / "t.yaml").write_text(
        "{name: free, files: '*.jsonl', prompt: '{q}', answer: a, rule: judge}"
    )
    lines(tmp_path / "free" / "r.jsonl", [{"q": "why", "a": "so"}])
    outside.include(own)
    run = RunSettings(tmp_path, tmp_path / "out", "m", show_progress=False)
    assert run_task(Echo(lambda r: "so"), get_task("free"), run) is None
    printed = capsys.readouterr().out.partition("now: llava-jax ")[2]
    ungraded = printed.replace("judge", "score", 1).partition(" --out")[0]
    assert main(shlex.split(ungraded)) == 2  # answers that no judge has read
    assert f"first: llava-jax {printed.strip()}" in capsys.readouterr().err
    judge.replies = ["1.0"]
    assert main([*shlex.split(printed), "--yes", "--endpoint", judge.url]) == 0
    printed = capsys.readouterr().out.partition("score it with: llava-jax ")[2]
    assert main(shlex.split(printed)) == 0
    assert "100.00 <" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[]", "holds no keys"),
        ("name: [", "is not YAML"),
        ("name: x", "prompt, answer, rule is missing"),
        ("{name: x, promt: y}", "promt is not a key"),
        ("{name: x, prompt: q, answer: a, rule: nearly}", "there is no rule 'nearly'"),
        ("{name: pope, prompt: q, answer: a, rule: exact}", "there is a benchmark pope already"),
        ("{name: A b, prompt: q, answer: a, rule: exact}", "not of small letters"),
        ("{name: 5, prompt: q, answer: a, rule: exact}", "name is 5"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, words):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(LlavaError, match=words):
        outside.include(tmp_path)


def test_a_wrong_row_is_named(tmp_path):
    (tmp_path / "t.yaml").write_text(YAML)
    outside.include(tmp_path)
    lines(tmp_path / "d" / "r.jsonl", [ROWS[0], {"question": "q"}])
    with pytest.raises(DataError, match=r"r\.jsonl row 2: not a row of My shapes \(no 'truth'\)"):
        get_task("shapes").questions(tmp_path / "d")
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError, match=r"e: no \*\.jsonl"):
        get_task("shapes").questions(tmp_path / "e")
    (tmp_path / "t.yaml").write_text("x")
    (tmp_path / "t.yaml").unlink()
    (tmp_path / "t.py").write_text("1 / 0")
    with pytest.raises(LlavaError, match=r"t\.py: ZeroDivisionError"):
        outside.include(tmp_path)


def test_an_entry_point(monkeypatch):
    class Installed(SimpleTask):
        name, files, data_files, own_title = "packaged", ("*.jsonl",), "rows", "Packaged"

        def item(self, row, number):
            return Item(str(number), row["q"], row["a"])

    point = SimpleNamespace(name="packaged", value="x:y", load=Installed)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [point])
    assert get_task("packaged").title == "Packaged"


def test_rules():
    cases = [
        ("exact", "Red. ", "red", 1),
        ("exact", "red car", ["red", "blue"], 0),
        ("vqa", "the red", "red", 1),
        ("vqa", "two", ["2"] * 10, 1),
        ("vqa", "red", ["red"] + ["blue"] * 9, 0.3 * 0 + 9 * (1 / 3) / 10),
        ("anls", "Hello  World", ["hello world"], 1 - 0 / 12),
        ("anls", "helo", ["hello", "x"], 0.8),
        ("anls", "xyz", ["hello"], 0),
        ("anls", "", ["hello"], 0),
        ("anls", "", [""], 1),
        ("relaxed", "105", "100", 1),
        ("relaxed", "105.1", "100", 0),
        ("relaxed", "12%", "0.12", 1),
        ("relaxed", "0", "0", 1),
        ("relaxed", "0.0", "0", 0),
        ("relaxed", "1,000", "1000", 0),
        ("relaxed", "nan", "5", 0),
        ("relaxed", "YES", "Yes", 1),
        ("relaxed", "%", "5", 0),
        ("letter", "B", "B", 1),
        ("letter", "(b)", "(B)", 0),
        ("yes_no", "Yes, it is", "yes", 1),
        ("yes_no", "There is no dog", "1", 0),
        ("yes_no", "know", "no", 0),
        ("yes_no", "", "yes", 0),
    ]
    for rule, text, truth, score in cases:
        assert RULES[rule](text, truth, ())[0] == pytest.approx(score), (rule, text, truth)
    for text, read in {
        "E": "E",
        "The answer is blue": "B",  # by its text, not by its first letter
        "answer is (C)": "C",
        "A car or a B here and more words": "Z",
        "": "Z",
    }.items():
        assert read_letter(text, ["red", "blue", "green", "x y", "v w"]) == read, text
    assert read_letter("The answer is blue", ["red", "green"]) == "Z"
    assert levenshtein("kitten", "sitting") == 3


def test_a_result_is_asked_again_from_its_own_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text(
        "{name: mine, files: '*.jsonl', prompt: '{q}', answer: a, rule: exact}"
    )
    lines(tmp_path / "d" / "r.jsonl", [{"q": "why", "a": "so"}, {"q": "who", "a": "me"}])
    model = Echo(lambda r: {"why": "So", "who": "you"}[r.messages])
    monkeypatch.setattr("llava_jax.eval.run.model.load_model", lambda path, **_: model)
    monkeypatch.setattr("llava_jax.eval.run.command.model_identity", lambda m: {"fingerprint": "f"})
    config = tmp_path / "experiment.yaml"
    config.write_text(
        json.dumps({"model": "some/model", "tasks": ["mine"], "limit": 2, "batch_size": 1})
    )
    place = ["--data", str(tmp_path / "d"), "--include", str(tmp_path / "tasks")]
    out = tmp_path / "one"
    assert main(["eval", "--config", str(config), *place, "--out", str(out)]) == 0
    first = json.loads((out / "mine" / "result.json").read_text())
    assert first["experiment"]["batch_size"] == 1
    assert model.batches == [1, 1]
    again = ["eval", "--config", str(out / "mine" / "result.json"), "--out", str(tmp_path / "two")]
    assert main(again) == 0
    second = json.loads((tmp_path / "two" / "mine" / "result.json").read_text())
    assert second == first
    config.write_text("{modle: x}")
    assert main(["eval", "--config", str(config), "--out", str(out)]) == 2
    assert (
        "modle is not an option of an experiment (did you mean model?)" in capsys.readouterr().err
    )
    config.write_text("{task: mine, per_sample: {}}")
    assert main(["eval", "--config", str(config), "--out", str(out)]) == 2
    assert "a result of eval score, which asked nothing" in capsys.readouterr().err
    config.write_text("{limit: yes}")
    assert main(["eval", "--config", str(config), "--out", str(out)]) == 2
    assert "limit is True, not of type int" in capsys.readouterr().err


def test_the_examples_of_the_page(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (yaml,) = re.findall(r"```yaml\n(name: .*?)```", page, re.DOTALL)
    (python,) = re.findall(r"```python\n(from llava_jax\.eval\.simple .*?)```", page, re.DOTALL)
    for name, text in (("shapes.yaml", yaml), ("counts.py", python)):
        (tmp_path / name).write_text(text)
        assert text.count("\n") <= 15
    assert outside.include(tmp_path) == ["counts", "shapes"]
    lines(tmp_path / "d" / "r.jsonl", [ROWS[0] | {"C": "", "D": ""}])
    (q,) = get_task("shapes").questions(tmp_path / "d")
    assert q.images == ("0.png",)
    item = get_task("counts").item({"question": "q", "answer": "5", "image": b"x"}, 1)
    assert get_task("counts").judged("5.", item)[0] == 1.0
