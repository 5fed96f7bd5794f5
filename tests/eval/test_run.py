"""Running a benchmark on a stand-in model: batches, kills, parts, limits, and what is refused."""

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.eval.answers import read_answers
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.questions import Question
from llava_jax.eval.run.command import RunSettings, parse_chunk, run_task
from llava_jax.eval.run.predict import (
    answered_lines,
    choose,
    length_buckets,
    merge,
    predict,
    write_questions,
)
from llava_jax.eval.task import DEFAULT, get_task
from llava_jax.util import read_object
from tests.eval.test_choice_family import ROWS, mmbench_table
from tests.eval.test_vqa_family import dump, lines


class Echo:
    """Answers with a rule on the prompt; dies after so many batches."""

    config = SimpleNamespace(template="vicuna_v1")

    def __init__(self, rule=lambda r: f"to {r.messages}", dies_after=None):
        self.rule, self.left, self.batches = rule, dies_after, []

    def generate_batch(self, requests, batch_size, on_error="raise"):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left = None if self.left is None else self.left - 1
        self.batches.append(len(requests))
        return [SimpleNamespace(text=self.rule(r)) for r in requests]


def questions(count, images=()):
    return [Question(f"k{i}", "q" * (i % 7 + 1), images, {"question_id": i}) for i in range(count)]


def ask(model, qs, out, batch=4, **more):
    settings = {"model_id": "m", "max_new_tokens": 8, "batch": batch, "folders": []}
    return predict(model, qs, out, **settings | more)


def test_batches_are_of_like_length(tmp_path):
    qs = [*questions(10), Question("i", "q", (b"x",), {})]
    batches = list(length_buckets(qs, 4))
    assert [len(b) for b in batches] == [1, 4, 4, 2]
    assert batches[0][0].key == "i"  # images apart
    lengths = [len(q.prompt) for b in batches[1:] for q in b]
    assert lengths == sorted(lengths, reverse=True)


def test_answer_rows(tmp_path):
    out = tmp_path / "deep" / "a.jsonl"
    assert ask(Echo(lambda r: "Ünï\u2028\n"), questions(3), out) == 3
    got = read_answers(out)
    assert sorted(a.id for a in got.rows) == ["0", "1", "2"]
    row = got.rows[0].row
    assert row["text"] == "Ünï\u2028\n"
    assert row["model_id"] == "m"
    assert set(row) == {"question_id", "text", "answer_id", "model_id", "metadata"}
    assert out.read_bytes().isascii()


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_killed_and_resumed(tmp_path, batch):
    qs, out = questions(20), tmp_path / "a.jsonl"
    whole = tmp_path / "whole.jsonl"
    ask(Echo(), qs, whole, batch=batch)
    with pytest.raises(KeyboardInterrupt):
        ask(Echo(dies_after=2 if batch < 32 else 0), qs, out, batch=batch)
    with open(out, "ab") as f:
        f.write(b'{"question_id": 5, "text": "half a l')
    model = Echo()
    ask(model, qs, out, batch=batch)
    texts = {a.id: a.text for a in read_answers(out).rows}
    assert len(read_answers(out).rows) == 20
    assert texts == {a.id: a.text for a in read_answers(whole).rows}
    assert sum(model.batches) == 20 - min(20, 2 * batch if batch < 32 else 0)
    assert ask(Echo(dies_after=0), qs, out, batch=batch) == 0


def test_foreign_and_doubled_answers_are_refused(tmp_path):
    out = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}])
    with pytest.raises(AnswerError, match="line 1: not an answer of this command"):
        answered_lines(out)
    lines(out, [{"metadata": {"key": "k"}}] * 2)
    with pytest.raises(AnswerError, match="line 2: 'k' is answered a second time"):
        answered_lines(out)
    lines(out, [{"metadata": {"key": ["k"]}}])
    with pytest.raises(AnswerError, match="line 1: not an answer of this command"):
        answered_lines(out)


def test_reading_host_leaves_the_file_alone(tmp_path, monkeypatch):
    out = tmp_path / "a.jsonl"
    ask(Echo(), questions(2), out)
    with open(out, "ab") as f:
        f.write(b'{"half')
    before = out.read_bytes()
    assert ask(Echo(), questions(4), out, writes=False) == 2
    assert out.read_bytes() == before
    # The writing host is further on.
    monkeypatch.setattr("llava_jax.eval.run.predict.agree", lambda done: [True] * 3 + [False])
    assert ask(Echo(), questions(4), out, writes=False) == 1


def test_missing_image_is_found_before_asking(tmp_path):
    model = Echo()
    with pytest.raises(DataError, match="question k0: no image 'a.jpg' in"):
        ask(model, questions(2, ("a.jpg",)), tmp_path / "a.jsonl", folders=[tmp_path])
    assert model.batches == []
    (tmp_path / "b.png").write_bytes(b"")
    seen = []
    rule = lambda r: seen.extend(r.images) or "x"  # noqa: E731
    ask(Echo(rule), questions(1, ("b", b"raw")), tmp_path / "a.jsonl", folders=[tmp_path])
    assert seen == [tmp_path / "b.png", b"raw"]


def test_a_picture_outside_of_its_folder_is_not_sent(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"")
    (folder := tmp_path / "images").mkdir()
    (folder / "in.png").write_bytes(b"")
    for name in ("../secret.png", str(tmp_path / "secret.png"), "x/../../secret"):
        (folder / "x").mkdir(exist_ok=True)
        with pytest.raises(DataError, match="question k0: the image .* is outside of its folder"):
            ask(Echo(), questions(1, (name,)), tmp_path / "a.jsonl", folders=[folder])
    for name in ("in", "x/../in.png", str(folder / "in.png")):
        assert ask(Echo(), questions(1, (name,)), tmp_path / f"{len(name)}", folders=[folder]) == 1


def test_requests_are_greedy_and_in_the_models_template(tmp_path):
    seen = []
    ask(
        Echo(lambda r: seen.append(r) or "x"),
        [Question("k", "q", (b"i",), {})],
        tmp_path / "a.jsonl",
        max_new_tokens=7,
    )
    (request,) = seen
    assert (request.messages, request.images, request.max_new_tokens) == ("q", (b"i",), 7)
    assert (request.temperature, request.template) == (0.0, None)


def test_wrong_number_of_answers(tmp_path):
    class Short(Echo):
        def generate_batch(self, requests, batch_size, on_error="raise"):
            return [SimpleNamespace(text="x")]

    with pytest.raises(ValueError, match="shorter"):
        ask(Short(), questions(3), tmp_path / "a.jsonl")


def test_choose():
    qs = questions(10)
    assert choose(qs, limit=3) == qs[:3]
    mixed = choose(qs, shuffle_seed=1)
    assert mixed == choose(qs, shuffle_seed=1) != qs
    assert choose(qs, shuffle_seed=1, limit=2) == mixed[:2]
    parts = [choose(qs, chunk=(i, 3)) for i in range(3)]
    assert [len(p) for p in parts] == [4, 4, 2]
    assert [q for p in parts for q in p] == qs
    with pytest.raises(DataError, match="two questions have the key 'k0'"):
        choose([*qs, qs[0]])
    assert parse_chunk("2/4") == (2, 4)
    for bad in ("4/4", "x", "1", "-1/2"):
        with pytest.raises(LlavaError, match="expected K/N"):
            parse_chunk(bad)


def test_merge(tmp_path):
    qs = questions(5)
    parts = [tmp_path / "0.jsonl", tmp_path / "1.jsonl"]
    ask(Echo(), qs[3:], parts[0])
    ask(Echo(), qs[:3], parts[1])
    merge(parts, qs, tmp_path / "all.jsonl")
    rows = read_answers(tmp_path / "all.jsonl").rows
    assert [a.id for a in rows] == ["0", "1", "2", "3", "4"]
    with pytest.raises(AnswerError, match="'k4' is answered in another part"):
        merge([parts[0], parts[0]], qs, tmp_path / "all.jsonl")


@pytest.fixture
def vqa(tmp_path):
    """A VQAv2 folder of six questions whose answer is their number."""
    rows, asked = [], []
    for i in range(6):
        answers = [{"answer": f"x{i}", "answer_id": n} for n in range(10)]
        rows.append(
            {"question_id": i, "question_type": "is", "answer_type": "other", "answers": answers}
        )
        asked.append({"question_id": i, "image_id": i, "question": f"number x{i}"})
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"COCO_val2014_{i:012d}.jpg").write_bytes(b"")
    dump(tmp_path / "data" / "vqav2" / "v2_annotations.json", {"annotations": rows})
    dump(tmp_path / "data" / "vqav2" / "v2_questions.json", {"questions": asked})
    return tmp_path


def settings(folder, **more):
    return RunSettings(
        data=folder / "data",
        out=folder / "out",
        model_id="m",
        images=folder / "images",
        **{"batch": 4, "show_progress": False} | more,
    )


def right(request):
    return request.messages.split()[1]


def test_run_scores(vqa):
    task = get_task("vqav2")
    result = run_task(Echo(right), task, settings(vqa))
    assert result["totals"]["overall"] == 100.0
    folder = vqa / "out" / "vqav2"
    assert json.loads((folder / "result.json").read_text())["per_sample"]["3"]["answer"] == "x3"
    assert json.loads((folder / "run.json").read_text())["task"] == "vqav2"
    assert run_task(Echo(dies_after=0), task, settings(vqa))["totals"] == result["totals"]
    with pytest.raises(AnswerError, match="model was 'm'"):
        run_task(Echo(), task, RunSettings(**settings(vqa).__dict__ | {"model_id": "other"}))


def test_run_limited(vqa):
    task = get_task("vqav2")
    result = run_task(Echo(right), task, settings(vqa, limit=2, shuffle_seed=0))
    assert result["headline"] == "overall_of_answered"
    assert result["totals"]["overall_of_answered"] == 100.0
    assert len(result["per_sample"]) == 2
    assert result["coverage"]["expected"] == 2
    assert "4 of 6 questions were not asked" in result["notes"][-1]


def test_run_in_parts(vqa):
    task = get_task("vqav2")
    assert run_task(Echo(right), task, settings(vqa, chunk=(1, 2))) is None
    result = run_task(Echo(right), task, settings(vqa, chunk=(0, 2)))
    assert result["totals"]["overall"] == 100.0
    rows = read_answers(vqa / "out" / "vqav2" / "answers.jsonl").rows
    assert [a.id for a in rows] == list("012345")


def test_parts_that_end_together_are_joined_by_one_after_the_other(vqa, monkeypatch):
    task, seen = get_task("vqav2"), []

    def slow(*what):
        seen.append("begun")
        time.sleep(0.05)
        seen.append("ended")
        return merge(*what)

    monkeypatch.setattr("llava_jax.eval.run.command.merge", slow)
    run = lambda n: run_task(Echo(right), task, settings(vqa, chunk=(n, 2)))  # noqa: E731
    assert run(1) is None
    run(0)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, (0, 1))
    assert first == second
    assert seen == ["begun", "ended"] * 3


def test_a_model_is_named_by_the_folder_that_it_is(vqa, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    model = (Echo(right), {}, True)
    monkeypatch.setattr("llava_jax.eval.run.command._model", lambda args: model)
    words = ["--tasks", "vqav2", "--data", str(vqa / "data"), "--images", str(vqa / "images")]
    assert main(["eval", "--model", ".", *words, "--out", str(vqa / "out")]) == 0
    assert read_object(vqa / "out" / "vqav2" / "result.json")["run"] == "mine"


def test_what_the_end_of_a_run_needs_is_asked_for_before_it_begins(vqa, monkeypatch, capsys):
    words = ["--tasks", "vqav2", "--data", str(vqa / "data"), "--out", str(vqa / "out")]
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main(["eval", "--model", "m", *words]) == 2
    assert "jinja2 is needed to write reports" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    table = mmbench_table(vqa / "mmbench_dev_20230712.tsv", ROWS)
    get_task("mmbench").check_packages(table.parent, DEFAULT)
    mmbench_table(table, [{k: v for k, v in row.items() if k != "answer"} for row in ROWS])
    with pytest.raises(LlavaError, match="openpyxl is needed"):
        get_task("mmbench").check_packages(table.parent, DEFAULT)
    monkeypatch.setitem(sys.modules, "textblob", None)
    with pytest.raises(LlavaError, match="is needed to score CHAIR"):
        get_task("chair").check_packages(vqa, DEFAULT)


def test_a_second_picture_has_no_place_in_a_question_file(tmp_path):
    out = tmp_path / "q.jsonl"
    with pytest.raises(DataError, match="question k0: has 2 pictures"):
        write_questions(questions(1, ("a.png", "b.png")), out)
    assert not out.exists()


def test_batch_size_changes_nothing(vqa):
    totals = []
    for batch in (1, 5, 32):
        out = vqa / f"out{batch}"
        run = RunSettings(**settings(vqa).__dict__ | {"batch": batch, "out": out})
        result = run_task(
            Echo(lambda r: right(r) if "3" not in r.messages else "no"), get_task("vqav2"), run
        )
        totals.append(result["per_sample"])
    assert totals[0] == totals[1] == totals[2]


def test_run_without_truth_writes_the_upload(vqa, capsys, caplog):
    (vqa / "data" / "vqav2" / "v2_annotations.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert run_task(Echo(right), get_task("vqav2"), settings(vqa)) is None
    upload = json.loads((vqa / "out" / "vqav2" / "upload.json").read_text())
    assert upload[0] == {"question_id": 0, "answer": "x0"}
    assert "not scored here" in caplog.text


def test_a_truth_that_cannot_be_read_is_no_success(vqa):
    path = vqa / "data" / "vqav2" / "v2_annotations.json"
    path.write_text(path.read_text()[:-30])
    with pytest.raises(DataError, match="v2_annotations.json: not JSON"):
        run_task(Echo(right), get_task("vqav2"), settings(vqa))
    assert (vqa / "out" / "vqav2" / "upload.json").exists()  # as where only a server has it


def test_run_without_truth_or_upload_is_no_success(vqa, monkeypatch):
    (vqa / "data" / "vqav2" / "v2_annotations.json").unlink()
    task = get_task("vqav2")

    def none(*_):
        raise DataError("no upload")

    monkeypatch.setattr(type(task), "submission", none)
    with pytest.raises(DataError, match="annotations"):
        run_task(Echo(right), task, settings(vqa))
    assert len(read_answers(vqa / "out" / "vqav2" / "answers.jsonl").rows) == 6


def test_run_of_images_inside_a_table(tmp_path):
    mmbench_table(tmp_path / "mmbench_dev_20230712.tsv", ROWS)
    seen = []

    def rule(request):
        seen.append(request.images)
        return "A"

    run = RunSettings(tmp_path, tmp_path / "out", "m", show_progress=False)
    result = run_task(Echo(rule), get_task("mmbench"), run)
    assert seen[0] == (b"png",)
    assert result["totals"]["vanilla_acc"] == 100.0
    assert result["totals"]["circular_acc"] == 50.0


def test_a_table_without_answers_is_asked_and_uploaded(tmp_path, caplog):
    pytest.importorskip("openpyxl")
    hidden = [{k: v for k, v in row.items() if k != "answer"} for row in ROWS]
    mmbench_table(tmp_path / "mmbench_test_20230712.tsv", hidden)
    run = RunSettings(tmp_path, tmp_path / "out", "m", show_progress=False)
    assert run_task(Echo(lambda r: "B"), get_task("mmbench"), run) is None
    assert "has no answers (this split is scored by a server)" in caplog.text
    upload = read_answers(tmp_path / "out" / "mmbench" / "upload.xlsx").rows
    assert [a.row["prediction"] for a in upload] == ["B"] * len(ROWS)


def test_no_data(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        run_task(Echo(), get_task("pope"), settings(tmp_path))


def test_answers_end_in_the_order_of_the_questions_for_scripts_that_go_by_position(tmp_path):
    data = tmp_path / "pope"
    (data / "images").mkdir(parents=True)
    rows = [
        {
            "question_id": i,
            "image": f"{i}.png",
            "text": f"Is it {'very ' * (i % 5)}red?",
            "label": label,
        }
        for i, label in enumerate(["yes", "no", "no", "yes", "yes", "no", "yes"])
    ]
    for row in rows:
        (data / "images" / row["image"]).touch()
    for split in ("random", "popular", "adversarial"):
        lines(data / f"coco_pope_{split}.json", rows)
    truth = {row["image"]: row["label"] for row in rows}
    settings = RunSettings(tmp_path, tmp_path / "out", "m", batch=2, show_progress=False)
    model = Echo(lambda r: truth[r.images[0].name])
    result = run_task(model, get_task("pope"), settings)
    assert result["totals"]["f1"] == result["totals"]["f1_llava_script"] == 100
    got = [a.id for a in read_answers(tmp_path / "out" / "pope" / "answers.jsonl").rows]
    assert got[:7] == [f"random/{i}" for i in range(7)]


def test_a_task_without_a_folder_beside_others_is_named(tmp_path):
    (tmp_path / "pope").mkdir()
    settings = RunSettings(tmp_path, tmp_path / "out", "m")
    with pytest.raises(DataError, match="mme: no such folder; .* holds pope"):
        run_task(Echo(), get_task("mme"), settings)


@pytest.mark.parametrize(
    "text",
    [
        '[{"question_id": 1, "text": "mine"}]',
        '{"question_id": 1, "text": "mine"}',
        "mine",
        '[\n{"question_id": 1,\n"text": "mine"}]',
    ],
)
def test_a_foreign_file_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "answers.jsonl"
    path.write_text(text)
    with pytest.raises(AnswerError, match="not an answer of this command"):
        answered_lines(path)
    assert path.read_text() == text
