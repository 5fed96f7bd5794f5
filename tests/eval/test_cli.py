"""The eval command: scores files without jax, and words what is wrong with them."""

import json
import subprocess
import sys
import time

import pytest

from llava_jax.cli import main
from tests.eval.test_vqa_family import dump, lines


@pytest.fixture
def vqa(tmp_path):
    """A data folder and an answer file of two VQAv2 questions."""
    answers = [{"answer": "cat", "answer_id": n} for n in range(10)]
    rows = [
        {"question_id": i, "question_type": "is", "answer_type": "other", "answers": answers}
        for i in (1, 2)
    ]
    dump(tmp_path / "data" / "v2_annotations.json", {"annotations": rows})
    given = [{"question_id": 1, "text": "cat"}, {"question_id": 2, "text": "dog"}]
    return tmp_path / "data", lines(tmp_path / "answers.jsonl", given)


def test_score(vqa, tmp_path, capsys):
    data, answers = vqa
    out = tmp_path / "out" / "result.json"
    code = main(
        [
            "eval",
            "score",
            "vqav2",
            "--answers",
            str(answers),
            "--data",
            str(data),
            "--json",
            str(out),
        ]
    )
    assert code == 0
    text = capsys.readouterr().out
    assert "overall                 50.00 <" in text
    assert "answered 2 of 2" in text
    result = json.loads(out.read_text())
    assert result["totals"]["overall"] == 50.0
    assert result["per_sample"]["2"]["score"] == 0.0
    assert result["coverage"]["missing"] == 0


def test_inputs_are_not_replaced(vqa, tmp_path, capsys):
    data, answers = vqa
    files = {path: path.read_bytes() for path in (answers, data / "v2_annotations.json")}
    given = ["vqav2", "--answers", str(answers), "--data", str(data)]
    result, made = str(tmp_path / "index.html"), data / "made.json"
    questions = ["eval", "questions", "vqav2", "--data", str(data), "--out", str([*files][1])]
    for out in map(str, files):
        assert main(["eval", "score", *given, "--json", out]) == 2
        assert main(["eval", "submit", *given, "--out", out]) == 2
    assert main(questions) == 2
    assert capsys.readouterr().err.count("is not replaced") == 5
    assert main(["eval", "score", *given, "--json", result]) == 0
    assert main(["eval", "report", result, "--out", str(tmp_path)]) == 2
    assert main(["eval", "score", *given, "--json", str(made)]) == 0
    assert {path: path.read_bytes() for path in files} == files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"question_id": 1, "text": "a"\n', ["answers.jsonl line 1", "not JSON"]),
        ('{"question_id": 3, "text": "a"}\n', ["none of its 1 ids", "'3'"]),
        ('{"question_id": 1, "text": 5}\n{"text": "a"}\n', ["line 2: no id"]),
    ],
)
def test_garbled(vqa, capsys, text, words):
    data, answers = vqa
    answers.write_text(text)
    code = main(["eval", "score", "vqav2", "--answers", str(answers), "--data", str(data)])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    for word in words:
        assert word in error


@pytest.mark.parametrize("early", [["--set", "ocr=no"], ["--include", "."], ["--limit=3"]])
def test_an_option_before_the_action_is_refused(vqa, capsys, early):
    data, answers = vqa
    words = ["score", "vqav2", "--answers", str(answers), "--data", str(data)]
    assert main(["eval", *early, *words]) == 2
    option = early[0].partition("=")[0]
    fix = "(options follow the action: eval score ... OPTIONS)"
    assert capsys.readouterr().err == f"llava-jax eval: {option} before score is not read {fix}\n"


def test_missing_and_doubled_are_said(vqa, capsys):
    data, answers = vqa
    answers.write_text('{"question_id": 1, "text": "cat"}\n' * 2)
    words = ["eval", "score", "vqav2", "--answers", str(answers), "--data", str(data)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "warning: 1 of 2 questions have no answer and count as wrong: 2" in text
    assert "warning: 1 id answered more than once, the last counts: 1 (lines 1, 2)" in text
    assert main([*words, "--strict"]) == 2


def test_submit_and_questions(vqa, tmp_path, capsys):
    data, answers = vqa
    dump(
        data / "questions.json", {"questions": [{"question_id": 1, "image_id": 2, "question": "Q"}]}
    )
    common = ["--data", str(data), "--out", str(tmp_path / "up.json")]
    assert main(["eval", "submit", "vqav2", "--answers", str(answers), *common]) == 0
    assert json.loads((tmp_path / "up.json").read_text()) == [{"question_id": 1, "answer": "cat"}]
    common[-1] = str(tmp_path / "q.jsonl")
    assert main(["eval", "questions", "vqav2", *common]) == 0
    (row,) = [json.loads(x) for x in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert row == {
        "question_id": 1,
        "image": "COCO_val2014_000000000002.jpg",
        "text": "Q\nAnswer the question using a single word or phrase.",
        "category": "default",
    }


def test_options_without_effect_are_refused(vqa, tmp_path, capsys):
    data, answers = vqa
    given = ["--answers", str(answers), "--data", str(data)]
    ask = ["eval", "--model", "tiny", "--data", str(data), "--out", str(tmp_path / "o")]
    for words, says in (
        (["eval", "score", "textvqa", *given, "--set", "orc=no"], "did you mean --set ocr=VALUE"),
        (["eval", "score", "textvqa", *given, "--set", "ocr=off"], "ocr=off: not yes or no"),
        (["eval", "score", "vqav2", *given, "--set", "ocr=no"], "vqav2 takes none"),
        (["eval", "score", "scienceqa", *given, "--set", "requery=x"], "without --set gpt4=FILE"),
        (["eval", "score", "pope", *given, "--split", "zz"], "pope has no splits"),
        ([*ask, "--tasks", ""], "--tasks names no benchmark"),
        ([*ask, "--tasks", " ,"], "--tasks names no benchmark"),
        ([*ask, "--tasks", "vqav2", "--images", "/nope"], "--images /nope: there is no such"),
    ):
        assert main(words) == 2
        assert says in capsys.readouterr().err


def test_half_a_surrogate_pair_is_no_error(vqa, tmp_path, capsys):
    data, answers = vqa
    answers.write_text('{"question_id": 1, "text": "\\ud800"}\n{"question_id": 2, "text": "dog"}\n')
    words = ["eval", "score", "vqav2", "--answers", str(answers), "--data", str(data)]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["per_sample"]["1"]["answer"] == "\ud800"


def test_usage(capsys):
    assert main(["eval", "list"]) == 0
    assert "mmbench_cn" in capsys.readouterr().out
    assert main(["eval", "score", "pop", "--answers", "x", "--data", "y"]) == 2
    assert "unknown benchmark 'pop'" in capsys.readouterr().err
    assert main(["eval"]) == 2
    assert "--model is missing" in capsys.readouterr().err
    assert main(["eval", "score", "vqav2", "--answers", "x", "--data", "y", "--set", "a"]) == 2
    assert "expected NAME=VALUE" in capsys.readouterr().err


def test_scoring_imports_no_jax(vqa):
    data, answers = vqa
    code = (
        "import sys; from llava_jax.eval import score; "
        f"score('vqav2', {str(answers)!r}, {str(data)!r}); "
        "import llava_jax.eval.cli, llava_jax.eval.report.text; "
        "from llava_jax.eval.task import TASKS, get_task; [get_task(t) for t in TASKS]; "
        "print([m for m in ('jax', 'numpy', 'torch', 'transformers', 'openpyxl', 'nltk') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_answers(count, tmp_path):
    """The whole of VQAv2's test-dev, 107,394, in some 20 seconds of one core."""
    words = [f"word {i % 997}" for i in range(count)]
    rows = [
        {
            "question_id": i,
            "question_type": "what",
            "answer_type": "other",
            "answers": [{"answer": w if n < 7 else f"{w}s.", "answer_id": n} for n in range(10)],
        }
        for i, w in enumerate(words)
    ]
    dump(tmp_path / "v2_annotations.json", {"annotations": rows})
    given = [{"question_id": i, "text": f"The {w}."} for i, w in enumerate(words)]
    answers = lines(tmp_path / "a.jsonl", given)
    from llava_jax.eval import score

    start = time.process_time()
    result = score("vqav2", answers, tmp_path)
    assert time.process_time() - start < count / 5000
    assert result.totals["overall"] == 100.0
