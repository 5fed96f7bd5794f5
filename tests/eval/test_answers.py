"""Answer files: kinds, broken lines, and ids that are missing, doubled, foreign or misplaced."""

import json

import pytest

from llava_jax.errors import LlavaError
from llava_jax.eval.answers import AnswerFile, as_id, join, read_answers
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.files import find, read_list, read_rows, write_xlsx
from llava_jax.eval.task import get_task
from tests.eval.test_vqa_family import dump, lines


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


ROWS = [{"question_id": 1, "text": "a"}, {"question_id": "2", "text": "b\u2028c"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "lines.json", "a.csv", "a.tsv", "a.xlsx"])
def test_kinds(tmp_path, name):
    path = tmp_path / name
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS) + "\n\n"
    if name == "a.json":
        write(path, json.dumps(ROWS))
    elif name.endswith("xlsx"):
        pytest.importorskip("openpyxl")
        write_xlsx(path, ["question_id", "text"], [list(r.values()) for r in ROWS])
    elif name.endswith("sv"):
        sep = "," if name == "a.csv" else "\t"
        write(
            path,
            "".join(sep.join(map(str, r)) + "\n" for r in (ROWS[0], *(r.values() for r in ROWS))),
        )
    else:
        write(path, lines)
    got = read_answers(path)
    assert [(a.id, a.text) for a in got.rows] == [("1", "a"), ("2", "b\u2028c")]


def test_formula_like_answers_stay_text(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "a.xlsx"
    write_xlsx(path, ["index", "prediction"], [[1, "=1+1"], [2, None], [3, "a\x0bb"]])
    got = read_answers(path, empty_is_none=True)
    assert [a.text for a in got.rows] == ["=1+1", "", "ab"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.xlsx"])
def test_an_empty_cell_is_an_empty_answer(tmp_path, name):
    path = tmp_path / name
    if name == "a.xlsx":
        pytest.importorskip("openpyxl")
        write_xlsx(path, ["question_id", "text"], [[1, None], [2, "b"]])
    else:
        sep = "," if name == "a.csv" else "\t"
        write(path, f"question_id{sep}text\n1{sep}\n2{sep}b\n")
    assert [a.text for a in read_answers(path).rows] == ["", "b"]


def test_answers_from_a_pipe_and_a_folder(tmp_path):
    import os
    import threading

    os.mkfifo(tmp_path / "pipe")
    line = '{"question_id": 1, "text": "a"}\n'
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_text(line))
    writer.start()
    assert [a.text for a in read_answers(tmp_path / "pipe").rows] == ["a"]
    writer.join()
    with pytest.raises(AnswerError, match="a folder, not a file"):
        read_answers(tmp_path)


def test_object_of_texts(tmp_path):
    got = read_answers(write(tmp_path / "a.json", '{"v1_0": "x", "v1_1": "y"}'))
    assert [(a.id, a.text) for a in got.rows] == [("v1_0", "x"), ("v1_1", "y")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te\n', r"a\.jsonl line 2: not JSON"),
        ('{"question_id": 1, "text": "a"}\n[1]\n', r"line 2: not a JSON object"),
        ('{"text": "a"}\n', r"line 1: no id"),
        ('{"question_id": 7, "txt": "a"}\n', r"line 1, question_id 7: no answer"),
        ('{"question_id": 7, "text": null}\n', r"question_id 7: the answer is None"),
        ('{"question_id": 7, "text": ["a"]}\n', r"question_id 7: the answer is \['a'\]"),
        ('{"question_id": 7.5, "text": "a"}\n', r"an id must be text or a whole number"),
        ("", r"a\.jsonl: no answers in it"),
        (
            '{"question_id": 1, "text": "", "metadata": {"error": "no picture"}}\n' * 2,
            r"a\.jsonl: not one of its 2 questions was answered: no picture",
        ),
    ],
)
def test_broken_lines(tmp_path, text, message):
    with pytest.raises(AnswerError, match=message):
        read_answers(write(tmp_path / "a.jsonl", text))


def test_bad_lines_can_be_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"question_id": 1, "text": "a"}\n{bad\n"x"\n')
    got = read_answers(path, skip_bad_lines=True)
    assert (len(got.rows), got.bad_lines) == (1, [2, 3])
    _, coverage = join(["1", "2"], got)
    assert coverage.lines()[-1] == "2 unreadable lines: 2, 3"


def test_other_broken_files(tmp_path):
    with pytest.raises(AnswerError, match="no such file"):
        read_answers(tmp_path / "none.jsonl")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(AnswerError, match=r"b\.jsonl: byte 10 cannot be read as UTF-8"):
        read_answers(tmp_path / "b.jsonl")
    write(tmp_path / "b.json", '[{"a": 1},\n {"a" 2}]')
    with pytest.raises(DataError, match="not JSON at line 2, column 7"):
        read_list(tmp_path / "b.json", "rows", {})
    with pytest.raises(DataError, match="not JSON at line 2, column 7"):
        read_rows(tmp_path / "b.json")
    write(tmp_path / "b.tsv", "a\tb\n1\n")
    with pytest.raises(DataError, match="line 2: not as many cells"):
        read_rows(tmp_path / "b.tsv")


def test_not_an_excel_file(tmp_path):
    pytest.importorskip("openpyxl")
    with pytest.raises(AnswerError, match="not an Excel file"):
        read_answers(write(tmp_path / "b.xlsx", "hello"))


def answers(*rows):
    from pathlib import Path

    from llava_jax.eval.answers import Answer

    return AnswerFile(Path("a.jsonl"), [Answer(i, t, n, r) for n, (i, t, r) in enumerate(rows, 1)])


def test_coverage_counts_everything():
    given = answers(("1", "old", {}), ("9", "x", {}), ("1", "new", {}), ("1", "newest", {}))
    joined, coverage = join(["1", "2", "3"], given)
    assert joined["1"].text == "newest"  # as a dict by id, LLaVA's way
    assert (coverage.expected, coverage.answered) == (3, 1)
    assert coverage.missing == ["2", "3"]
    assert coverage.duplicated == {"1": [1, 3, 4]}
    assert coverage.unknown == {"9": 2}
    assert coverage.lines() == [
        "2 of 3 questions have no answer and count as wrong: 2, 3",
        "1 id answered more than once, the last counts: 1 (lines 1, 3, 4)",
        "1 answer to unknown questions: 9 (line 2)",
    ]
    with pytest.raises(AnswerError, match="2 of 3 questions have no answer"):
        join(["1", "2", "3"], given, strict=True)


def test_foreign_file():
    with pytest.raises(AnswerError, match=r"none of its 1 ids .* \(file: '7', benchmark: '1'\)"):
        join(["1"], answers(("7", "x", {})))


def test_wrong_image():
    given = answers(("1", "x", {"image": "b.jpg"}))
    with pytest.raises(AnswerError, match=r"line 1, id 1: the answer is for image 'b.jpg'"):
        join(["1"], given, images={"1": "a.jpg"})


def test_ids():
    assert as_id(5) == as_id("5") == as_id(5.0) == "5"
    for bad in (True, None, 5.5, [5]):
        with pytest.raises(AnswerError):
            as_id(bad)


def test_find(tmp_path):
    for name in ("x_val.json", "x_train.json"):
        write(tmp_path / name, "{}")
    assert find(tmp_path, ["x_*.json"], "file", "val").name == "x_val.json"
    with pytest.raises(DataError, match="several files"):
        find(tmp_path, ["x_*.json"], "file")
    with pytest.raises(DataError, match="no labels; looked for y"):
        find(tmp_path, ["y"], "labels")
    with pytest.raises(DataError, match="no such file or folder"):
        find(tmp_path / "none", ["y"], "labels")
    assert find(tmp_path / "x_val.json", ["x_*.json"], "file").name == "x_val.json"


def test_what_counts_is_said():
    given = answers(("1", "a", {}), ("1", "b", {}), ("9", "x", {}))
    _, reviews = join(["1", "2"], given, leaves_out=True, all_rows_count=True)
    assert reviews.lines() == [
        "1 of 2 questions have no answer and are left out: 2",
        "1 id answered more than once, all count: 1 (lines 1, 2)",
        "1 answer to unknown questions, which count too: 9 (line 3)",
    ]
    _, partly = join(["1", "2"], given, left_out_of=("img_acc",))
    said = "1 of 2 questions have no answer and count as wrong (left out of img_acc): 2"
    assert partly.lines()[0] == said


QA = {"question": "Which?", "choice_a": "x", "choice_b": "y", "choice_c": "z", "choice_d": "w"}
OLDER = {
    "gqa": ("questions.json", {"1": {"question": "Which?", "answer": "x"}}),
    "refcoco": ("samples.jsonl", [{"id": 1, "expression": "Which?", "bbox_xyxy_norm": [0, 0, 1, 1]}]),
    "vizwiz": ("val.json", [{"image": "1", "question": "Which?", "answers": [{"answer": "x"}]}]),
    "seed": (
        "SEED-Bench.json",
        {"question_type": {"a": 1}, "questions": [
            {**QA, "question_id": 1, "answer": "A", "data_type": "image", "question_type_id": 1}]},
    ),
    "vqav2": (
        "v2_annotations.json",
        {"annotations": [{"question_id": 1, "answers": [{"answer": "x"}]}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OLDER)
def test_answers_to_another_question_are_refused_everywhere(tmp_path, name):
    file, truth = OLDER[name]
    if file.endswith("l"):
        lines(tmp_path / file, truth)
    else:
        dump(tmp_path / file, truth)
    if name == "vqav2":
        dump(
            tmp_path / "v2_questions.json",
            {"questions": [{"question_id": 1, "question": "Which?"}]},
        )
    task, row = get_task(name), {"question_id": 1, "image": "1", "text": "x"}
    said = "Context: it\nwhich?\nIn one word."
    assert (
        task.score(
            lines(tmp_path / "a" / "a.jsonl", [{**row, "prompt": said}]), tmp_path
        ).coverage.answered
        == 1
    )
    with pytest.raises(AnswerError, match="line 1, id 1: the answer is for prompt 'Who"):
        task.score(
            lines(tmp_path / "a" / "a.jsonl", [{**row, "prompt": "Who?\nIn one word."}]), tmp_path
        )


@pytest.mark.parametrize("name", OLDER)
def test_a_truth_that_stands_twice_is_named(tmp_path, name):
    """Of two the last would count, and the set be smaller."""
    file, truth = OLDER[name]
    if name == "gqa":
        (tmp_path / file).write_text('{"1": {"question": "?"}, "1": {"question": "!"}}')
    elif isinstance(truth, list):
        (lines if file.endswith("l") else dump)(tmp_path / file, truth * 2)
    else:
        rows = {k: v * 2 if isinstance(v, list) else v for k, v in truth.items()}
        dump(tmp_path / file, rows)
    with pytest.raises(LlavaError, match="twice|duplicated"):
        get_task(name).score(
            lines(tmp_path / "a" / "a.jsonl", [{"question_id": 1, "text": "x"}]), tmp_path
        )


def test_nothing_to_score_is_no_result(tmp_path):
    dump(tmp_path / "questions.json", {"1": {"question": "?", "answer": "x", "isBalanced": False}})
    given = lines(tmp_path / "a" / "a.jsonl", [{"question_id": 1, "text": "x"}])
    with pytest.raises(DataError, match="no question to score it by"):
        get_task("gqa").score(given, tmp_path)


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [0.5, 0.5, 0.1, 0.9], [10, 10, 200, 300]])
def test_a_box_that_no_answer_can_meet_is_refused(tmp_path, box):
    lines(tmp_path / "samples.jsonl", [{"id": 1, "expression": "it", "bbox_xyxy_norm": box}])
    with pytest.raises(DataError, match="1: the box .* no answer can meet"):
        get_task("refcoco").questions(tmp_path)
