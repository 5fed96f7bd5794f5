"""Answers read by a model beside the exact rule, against a server in this process."""

import json
import shlex

import pytest

from llava_jax.cli import main
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.judge.extract import extract_answers, read_reply, requests, score_extracted
from llava_jax.eval.task import DEFAULT, TaskSettings, get_task
from tests.eval.test_choice_family import mmbench_table, seed_data
from tests.eval.test_judge import Judge, endpoint, judge  # noqa: F401
from tests.eval.test_vqa_family import lines


def asked(task, answers, data, where, out):
    extract_answers(requests(get_task(task), answers, data, DEFAULT), out, where, threads=1)
    return score_extracted(get_task(task), answers, data, DEFAULT, out)


def test_seed_by_rule_and_by_a_model(judge: Judge, tmp_path, capsys):  # noqa: F811
    seed_data(tmp_path)
    given = {1: "B", 2: "the second one", "v3": "I would say the third", 4: "none of them"}
    answers = lines(tmp_path / "a.jsonl", [{"question_id": k, "text": v} for k, v in given.items()])
    judge.replies = ["B.", "no idea", "hm", "A or B", "?", "Z"]
    out = tmp_path / "x.jsonl"
    result = asked("seed", answers, tmp_path, endpoint(judge, tmp_path), out)
    assert result.totals["all"] == 25.0
    assert result.totals["all_model_extracted"] == pytest.approx(200 / 3)  # of those that were read
    assert (result.totals["extracted_by_model"], result.totals["unread_extractions"]) == (2, 1)
    assert result.totals["extraction_model"] == "gpt-x"
    assert result.samples["2"].details["extracted"] == {"2": "B"}
    assert result.samples["v3"].details["extracted"] == {"v3": None}
    assert "1; all_model_extracted has them not" in result.notes[-1]
    assert len(judge.requests) == 6
    assert (
        "A. aa\nB. bb\nC. cc\nD. dd\nAnswer: the second one"
        in (judge.requests[0]["messages"][0]["content"])
    )
    # Stopped after two: nothing is asked again but what is missing.
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(
        AnswerError,
        match=r"1 answer not in it: 4 \(have them read: llava-jax eval extract seed --ans",
    ):
        score_extracted(get_task("seed"), answers, tmp_path, DEFAULT, out)
    again = asked("seed", answers, tmp_path, endpoint(judge, tmp_path), out)
    assert (again.totals, len(judge.requests)) == (result.totals, 6)
    files = ["--answers", str(answers), "--data", str(tmp_path), "--judge-model", "gpt-x"]
    words = ["eval", "extract", "seed", *files, "--out", str(out), "--endpoint", judge.url]
    assert main([*words, "--yes"]) == 0
    assert main(shlex.split(capsys.readouterr().out.partition("with: llava-jax ")[2])) == 0
    shown = capsys.readouterr().out
    assert "all_model_extracted" in shown
    assert "66.67" in shown
    alone = TaskSettings(options={"videos": "no"})
    assert [r["question_id"] for r, _ in requests(get_task("seed"), answers, tmp_path, alone)] == [
        "2",
        "4",
    ]
    pictures = score_extracted(get_task("seed"), answers, tmp_path, alone, out).totals
    assert pictures["image"] == 33.33
    assert pictures["image_model_extracted"] == pytest.approx(200 / 3)
    whole = TaskSettings(strict=True, options={"videos": "no"})
    assert len(requests(get_task("seed"), answers, tmp_path, whole)) == 2
    lines(answers, [{"question_id": k, "text": f"{v}!"} for k, v in given.items()])
    with pytest.raises(AnswerError, match="question 2 was reviewed with another answer"):
        score_extracted(get_task("seed"), answers, tmp_path, DEFAULT, out)
    lines(answers, [{"question_id": 1, "text": "B"}])
    with pytest.raises(AnswerError, match="3 of 4 questions have no answer"):
        requests(get_task("seed"), answers, tmp_path, TaskSettings(strict=True))
    assert main(["eval", "extract", "pope", *words[3:]]) == 2
    assert "pope has no answers that a model could extract" in capsys.readouterr().err


def test_rotations_of_mmbench(judge: Judge, tmp_path):  # noqa: F811
    row = {"question": "Which?", "A": "cat", "B": "dog", "C": None, "D": None, "answer": "A",
           "image": "cG5n", "category": "x", "l2-category": "y", "split": "dev"}  # fmt: skip
    turned = {"A": "dog", "B": "cat", "answer": "B"}
    rows = [{**row, "index": n} for n in (1, 2)] + [
        {**row, **turned, "index": n + 1_000_000} for n in (1, 2)
    ]
    mmbench_table(tmp_path / "mmbench_dev_20230712.tsv", rows)
    texts = {1: "A", 2: "A", 1000001: "the furry one", 1000002: "it barks"}
    answers = lines(tmp_path / "a.jsonl", [{"question_id": k, "text": v} for k, v in texts.items()])
    judge.replies = ["B", "A"]
    result = asked("mmbench", answers, tmp_path, endpoint(judge, tmp_path), tmp_path / "x.jsonl")
    assert result.totals["circular_acc"] == 0.0
    assert result.totals["circular_acc_model_extracted"] == 50.0
    judge.replies = ["?"] * 4 + ["A"]
    (tmp_path / "t.jsonl").unlink()
    result = asked("mmbench", answers, tmp_path, endpoint(judge, tmp_path), tmp_path / "y.jsonl")
    assert result.totals["circular_acc_model_extracted"] == 0.0  # the first question is not in it
    assert result.totals["unread_extractions"] == 1
    lines(answers, [{"question_id": k, "text": "the furry one"} for k in texts])
    judge.replies = ["?"] * 16
    (tmp_path / "t.jsonl").unlink()
    result = asked("mmbench", answers, tmp_path, endpoint(judge, tmp_path), tmp_path / "z.jsonl")
    assert [result.totals[f"{n}"] for n in ("extracted_by_model", "unread_extractions")] == [0, 4]
    assert "circular_acc_model_extracted" not in result.totals
    assert "4; there is no circular_acc_model_extracted" in result.notes[-1]


def test_mathvista_and_mmmu(judge: Judge, tmp_path):  # noqa: F811
    rows = [
        {"pid": "1", "question": "How many?", "question_type": "free_form", "image": "1.jpg",
         "answer_type": "integer", "answer": "12", "precision": 0},
        {"pid": "2", "question": "Which?", "question_type": "multi_choice", "image": "2.jpg",
         "choices": ["left", "right"], "answer_type": "text", "answer": "right"},
    ]  # fmt: skip
    (tmp_path / "math").mkdir()
    lines(tmp_path / "math" / "m.jsonl", rows)
    answers = lines(
        tmp_path / "a.jsonl",
        [
            {"question_id": "1", "text": "3 x 4 = 12 wheels"},
            {"question_id": "2", "text": "the one"},
        ],
    )
    judge.replies = ["12", "(B)"]
    where, out = endpoint(judge, tmp_path), tmp_path / "x.jsonl"
    result = asked("mathvista", answers, tmp_path / "math", where, out)
    assert result.totals["accuracy"] == 0.0
    assert result.totals["accuracy_model_extracted"] == 100.0
    (tmp_path / "mmmu").mkdir()
    row = {"id": "validation_Art_1", "question": "Q", "options": "['x', 'y']", "answer": "B",
           "image_1": "1.png"}  # fmt: skip
    lines(tmp_path / "mmmu" / "v.jsonl", [row])
    answers = lines(
        tmp_path / "b.jsonl", [{"question_id": "validation_Art_1", "text": "cannot say"}]
    )
    judge.replies = ["Z"]
    result = asked("mmmu", answers, tmp_path / "mmmu", where, tmp_path / "y.jsonl")
    assert result.totals["accuracy"] == 50.0  # the owner guesses
    assert result.totals["accuracy_model_extracted"] == 0.0


def test_replies():
    known = {"B": "B", " (b) B. cat": "B", "Z": "Z", "A or B": None, "": None, "cat": None}
    assert {k: read_reply(k, "AB") for k in known} == known
    assert read_reply("Final answer: 3.5\nbecause", "") == "3.5"
    assert read_reply(" ", "") is None
    assert json.dumps(read_reply("C", "AB")) == "null"
