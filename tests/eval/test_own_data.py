"""Data and answers that are not what they seem: each is read rightly or refused by name, never scored."""

import io
import re

import pytest
from PIL import Image

from llava_jax.errors import LlavaError
from llava_jax.eval import outside, truths
from llava_jax.eval.answers import read_answers
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.report.collect import other_question
from llava_jax.eval.report.stats import statistic
from llava_jax.eval.report.text import complete
from llava_jax.eval.task import TaskSettings, get_task
from tests.eval.test_outside import forget  # noqa: F401
from tests.eval.test_vqa_family import dump, lines


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"index": 0, "A": "x", "answer": "B", "prediction": "A"}, "A"),  # VLMEvalKit
        ({"id": "v", "options": "[]", "answer": "B", "response": "A", "parsed_pred": "B"}, "A"),
        ({"question_id": 1, "answer": "B", "predict": "A"}, "A"),  # OCRBench
        ({"question_id": 1, "answer": "A"}, "A"),
        ({"questionId": 1, "text": "A", "answer": "A"}, "A"),
    ],
)
def test_the_truth_is_not_the_models_answer(tmp_path, row, text):
    (answer,) = read_answers(lines(tmp_path / "a.jsonl", [row])).rows
    assert answer.text == text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"id": 1, "text": "A", "answer": "B"}, "line 1, id 1: text and answer differ"),
        ({"id": 1, "prediction": "A", "response": "B"}, "prediction and response differ"),
        ({"id": 1, "choices": ["x"], "answer": "B"}, "its answer stands beside choices and may be"),
    ],
)
def test_a_row_of_two_answers_is_refused(tmp_path, row, words):
    with pytest.raises(AnswerError, match=words):
        read_answers(lines(tmp_path / "a.jsonl", [row]))


def test_a_number_of_thousands_of_digits_is_an_answer(tmp_path):
    (answer,) = read_answers(lines(tmp_path / "a.jsonl", [{"id": 1, "text": 10**4000}])).rows
    assert len(answer.text) == 4001


def test_mmstar_scores_the_prediction(tmp_path):
    row = {"index": 0, "question": "Which?", "answer": "B", "image": "0.jpg",
           "category": "math", "l2_category": "geometry"}  # fmt: skip
    lines(tmp_path / "mmstar.jsonl", [row])
    answers = lines(tmp_path / "out" / "a.jsonl", [{**row, "prediction": "A"}])
    assert get_task("mmstar").score(answers, tmp_path).totals["accuracy"] == 0.0


def png(shade):
    picture = io.BytesIO()
    Image.new("L", (4, 4), shade).save(picture, "PNG")
    return {"bytes": picture.getvalue(), "path": None}


def answers(folder, rows):
    return lines(folder / "answers" / "a.jsonl", rows)


def parquet(path, rows):
    pytest.importorskip("pyarrow.parquet")
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def doc(number, **more):
    return {"questionId": number, "question": "Who?", "image": "a.png", "answers": ["Ann"], **more}


def test_a_picture_inside_a_table_is_one_unit_of_the_interval(tmp_path):
    rows = [doc(n, image=png(n % 3)) for n in range(9)]
    parquet(tmp_path / "validation.parquet", rows)
    given = answers(tmp_path, [{"questionId": n, "answer": "Ann"} for n in range(9)])
    result = complete(get_task("docvqa").score(given, tmp_path))
    assert statistic("docvqa", result["per_sample"])[0] == 3


def test_docvqa_and_infovqa_are_not_mixed(tmp_path):
    parquet(tmp_path / "DocVQA" / "validation-00000-of-00001.parquet", [doc(1, docId=4)])
    info = doc(2, image_url="u", answer_type=["span"])
    parquet(tmp_path / "InfographicVQA" / "validation-00000-of-00001.parquet", [info])
    for task, key in (("docvqa", "1"), ("infovqa", "2")):
        assert [q.key for q in get_task(task).questions(tmp_path)] == [key]
        other = "InfographicVQA" if task == "docvqa" else "DocVQA"
        with pytest.raises(DataError, match="of the other of DocVQA and InfographicVQA"):
            get_task(task).questions(tmp_path / other)
    for part in ("a", "b"):
        lines(tmp_path / "ai2d" / part / "r.jsonl", [{}])
    with pytest.raises(DataError, match="questions are in several folders: a, b"):
        get_task("ai2d").questions(tmp_path / "ai2d")


def test_absent_files_and_parts_are_in_the_headline(tmp_path):
    parquet(tmp_path / "doc" / "validation-00002-of-00006.parquet", [doc(1)])
    dump(tmp_path / "chart" / "test_human.json", [{"imgname": "1.png", "query": "?", "label": "2"}])
    part = {"choices": ["x", "y"], "answer": "(A)", "prompt": "?", "image_1": "1.png"}
    lines(tmp_path / "blink" / "r.jsonl", [{**part, "idx": 1, "sub_task": "p"}])
    (tmp_path / "mmvp").mkdir()
    table = "Index,Question,Options,Correct Answer\n" + "".join(
        f"{n},Open?,(a) Left (of it) (b) Right,{t}\n"
        for n, t in enumerate(["a", "Right", "(b)"], 1)
    )
    (tmp_path / "mmvp" / "Questions.csv").write_text(table)
    cases = {
        "docvqa": ("doc", "1", r"1 of the 6 files .*validation-\*-of-00006"),
        "chartqa": ("chart", "human_1", "1 of the set's 2 values of half are there: human"),
        "blink": ("blink", "1", "1 of the set's 14 values of sub_task"),
        "mmvp": ("mmvp", "1", "1 of the pairs lack a question"),
    }
    for name, (folder, key, words) in cases.items():
        task, data = get_task(name), tmp_path / folder
        given = answers(data, [{"question_id": key, "text": "A"}])
        value = complete(task.score(given, data))
        assert value["headline"] == f"{task.headline}_of_given"
        assert re.search(words, value["coverage"]["details"][0])
        with pytest.raises(AnswerError, match=words):
            task.score(given, data, TaskSettings(strict=True))
    (left, _, _) = get_task("mmvp").items(tmp_path / "mmvp")
    assert left.options == ("Left (of it)", "Right")


def test_the_part_that_was_answered_has_the_weights_of_its_own(tmp_path):
    for half in ("human", "augmented"):
        rows = [{"imgname": "1.png", "query": "How?", "label": "2"}] * 8
        dump(tmp_path / f"test_{half}.json", rows)
    given = [{"question_id": f"human_{n}", "text": "2"} for n in (1, 2)]
    given += [{"question_id": f"augmented_{n}", "text": "9"} for n in range(1, 9)]
    result = get_task("chartqa").score(answers(tmp_path, given), tmp_path)
    limited = complete(result, result.coverage.missing)
    assert limited["totals"][limited["headline"]] == 50.0
    assert complete(result)["totals"]["accuracy"] == 12.5


YAML = (
    "{{name: own, files: '*.jsonl', prompt: '{{q}}{{options}}', answer: t, rule: {}, options: o}}"
)


@pytest.mark.parametrize(
    ("rule", "truth", "read"),
    [
        ("letter", "(b) ", "B"),
        ("letter", "dog", "B"),
        ("letter", 1, "B"),
        ("letter", "1", "B"),
        ("first_letter", "b", "B"),
        ("first_letter", 0, "A"),
        ("yes_no", "Y", "yes"),
        ("yes_no", "Yes.", "yes"),
        ("yes_no", 0.0, "no"),
        ("yes_no", True, "yes"),
        ("exact", 3.0, "3"),
        ("anls", ["a", ""], ["a", ""]),
        # not given
        ("letter", -1, None),
        ("letter", "?", None),
        ("yes_no", None, None),
        ("exact", "", None),
        ("exact", [None], None),
        ("anls", [], None),
        ("anls", float("nan"), None),
        # met by nothing
        ("letter", 5, "is none of the options"),
        ("letter", "E", "is none of the options"),
        ("first_letter", "cow", "is none of the options"),
        ("yes_no", "maybe", "is neither yes nor no"),
        ("yes_no", 1.5, "is neither yes nor no"),
        ("yes_no", float("inf"), "is neither yes nor no"),
        ("exact", ["a", " ", 3.0], ["a", " ", "3"]),
        ("exact", True, "is no text"),
        ("exact", ["a", None], "is missing"),
    ],
)
def test_truths(tmp_path, rule, truth, read):
    (tmp_path / "t.yaml").write_text(YAML.format(rule))
    outside.include(tmp_path)
    lines(tmp_path / "d" / "r.jsonl", [{"q": "Which?", "o": ["cat", "dog"], "t": truth}])
    task = get_task("own")
    if isinstance(read, str) and " " in read:
        with pytest.raises(DataError, match=rf"r\.jsonl row 1: not a row of own \(.*{read}"):
            task.items(tmp_path / "d")
        return
    (item,) = task.items(tmp_path / "d")
    assert item.truth == read
    if read is None:
        with pytest.raises(DataError, match="1 of 1 questions have no answers, first 1"):
            task.score(answers(tmp_path, [{"id": 1, "text": "A"}]), tmp_path / "d")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("['1','2']", ("1", "2")),
        (["x", "", " "], ("x", "", " ")),
        ("['only one']", ("only one",)),
        (["x", None, "y"], "are not several texts"),
        ("['1' '2']", "are not several texts"),
        ("['x'", "are no list"),
        (5, "are no list"),
    ],
)
def test_options(tmp_path, options, words):
    row = {"question": "Which?", "options": options, "answer": 0, "image": "1.png"}
    lines(tmp_path / "r.jsonl", [row])
    if isinstance(words, tuple):
        assert get_task("ai2d").items(tmp_path)[0].options == words
    else:
        with pytest.raises(DataError, match=words):
            get_task("ai2d").items(tmp_path)


def test_an_empty_column_does_not_shift_the_letters():
    row = {"A": "x", "B": "y", "C": None}
    assert outside._options(row, ["A", "B", "C"]) == ("x", "y")
    for gap in ({"A": ""}, {"B": None}, {"B": None, "C": "z"}):
        with pytest.raises(ValueError, match="one of the options A, B, C is empty"):
            outside._options(row | gap, ["A", "B", "C"])


def test_an_ambiguous_truth_is_refused(tmp_path):
    assert truths.option("2", ["0", "1", "2"]) == "C"
    with pytest.raises(ValueError, match="'2' is B and C"):
        truths.option("2", ["1", "2", "3"])


ART = {"id": "validation_Art_1", "question": "See <image 2>", "options": "[]", "answer": "x"}
REAL = {"question": "Which?\nPlease answer directly with the letter.\nA. Left\nB. Right",
        "answer": "(B)", "image": "1.png"}  # fmt: skip
SEEN = {"category": "VD", "subcategory": "chart", "set_id": 0, "figure_id": 1, "question_id": 0,
        "question": "Is it?", "gt_answer": "1", "visual_input": "1", "filename": "1.png"}  # fmt: skip
CROSSED = {"Index": 7, "Question_0": "Red?", "Question_1": "Blue?", "Image_0": "a.jpg",
           "Image_1": "b.jpg", "Question_Type": "yes_no"}  # fmt: skip
OCR = {"dataset_name": "x", "id": 0, "question": "?", "type": "t", "image_path": "0.png"}
MATH = {"pid": "1", "question": "How?", "question_type": "free_form", "answer": 3, "image": "1.png",
        "answer_type": "integer", "precision": None}  # fmt: skip


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("mmmu", ART | {"image_1": "1.png", "image_2": None}, "a picture is neither"),
        ("mmmu", ART | {"question": "See", "image_1": None}, "a picture is neither"),
        ("mmmu", ART | {"options": "['x'"}, "are no list"),
        (
            "blink",
            {"idx": 1, "sub_task": "p", "choices": ["x", "y"], "answer": "(A)"},
            "no picture",
        ),
        ("mathvista", MATH | {"image": {"bytes": None, "path": None}}, "a picture is neither"),
        ("mathvista", MATH | {"precision": float("inf")}, "OverflowError"),
        ("mathvista", MATH | {"question_type": "multi_choice", "choices": 5}, "are no list"),
        ("mathvista", MATH | {"answer": "three"}, "invalid literal"),
        ("hallusion", SEEN | {"filename": None}, "a picture is neither"),
        ("hallusion", SEEN | {"gt_answer": "2"}, "is neither yes nor no"),
        ("naturalbench", CROSSED | {"Image_0_Question_0": "maybe"}, "is neither yes nor no"),
        ("ocrbench", OCR | {"answers": ["x", ""]}, "one of its truths is empty"),
        ("ocrbench", OCR | {"answers": ["x", None]}, "is missing"),
        ("realworldqa", REAL | {"image": 5}, "a picture is neither"),
        ("realworldqa", REAL | {"answer": "(C)"}, "is no letter of AB"),
    ],
)
def test_a_row_that_cannot_be_asked_or_met_is_named(tmp_path, task, row, words):
    lines(tmp_path / "r.jsonl", [row])
    with pytest.raises(DataError, match=rf"r\.jsonl row 1: not a row .*{words}"):
        get_task(task).items(tmp_path)


def test_odd_rows_that_are_read(tmp_path):
    lines(tmp_path / "a" / "r.jsonl", [REAL])
    lines(tmp_path / "a" / "s.jsonl", [REAL])
    one, two = get_task("realworldqa").items(tmp_path / "a")
    assert (one.key, two.key, one.truth, one.options) == ("1", "2", "B", ("Left", "Right"))
    assert one.prompt.startswith("Which?\nA. Left\nB. Right\nAnswer")
    lines(tmp_path / "m" / "r.jsonl", [MATH])
    assert get_task("mathvista").items(tmp_path / "m")[0].truth == "3"
    lines(tmp_path / "u" / "r.jsonl", [ART | {"answer": "[0, 1)", "image_2": "2.png"}])
    assert get_task("mmmu").items(tmp_path / "u")[0].truth == "[0, 1)"
    lines(tmp_path / "t" / "r.jsonl", [ART | {"answer": "?", "image_2": "2.png"}])
    assert get_task("mmmu").items(tmp_path / "t")[0].truth is None
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / "r.jsonl.gz").touch()
    with pytest.raises(DataError, match=r"r\.jsonl\.gz: is compressed"):
        get_task("ai2d").items(tmp_path / "g")


def test_answers_of_other_data_are_refused(tmp_path):
    rows = [
        {"question": f"Which {n}?", "options": ["x", "y"], "answer": 0, "image": f"{n}.png"}
        for n in (1, 2)
    ]
    lines(tmp_path / "r.jsonl", rows)
    task = get_task("ai2d")
    for more, words in (
        ({"image": "zzz.png"}, "is for image 'zzz.png', not for 1"),
        ({"prompt": "What?\nA. x"}, "is for prompt 'What"),
        ({"question": "Who?"}, "is for question 'Who"),
    ):
        with pytest.raises(AnswerError, match=f"line 1, id 1: the answer {words}"):
            task.score(answers(tmp_path, [{"question_id": 1, "text": "A", **more}]), tmp_path)
    own = {
        "image": "images/1.png",
        "prompt": "<image>\nWhich 1?\nIn one word.",
        "question": "which 1?",
    }
    task.score(answers(tmp_path, [{"question_id": 1, "text": "A", **own}]), tmp_path)
    zero = answers(tmp_path, [{"index": n, "text": "A"} for n in (0, 1)])
    with pytest.raises(AnswerError, match="its ids begin at 0; those of the benchmark at 1"):
        task.score(zero, tmp_path)


def test_files_of_two_downloads_are_not_read_as_one(tmp_path):
    row = {"question": "Which?", "options": ["x", "y"], "answer": "0", "image": b"png"}
    for name in ("test-00000-of-00001", "test-00000-of-00002", "test-00001-of-00002"):
        parquet(tmp_path / f"{name}.parquet", [row])
    with pytest.raises(DataError, match="test: files of two downloads, -of-00001 and -of-00002"):
        get_task("ai2d").questions(tmp_path)


def test_results_of_other_data_are_not_compared():
    row = {"truth": "A", "prompt": "Which?\nA. x"}
    assert other_question({"1": row}, {"1": row | {"prompt": "Which?"}}) is None
    for other in ({"truth": "B"}, {"prompt": "Who?"}):
        assert other_question({"1": row}, {"1": row | other}) == "1"


def test_what_stands_twice_is_refused(tmp_path):
    files = {
        "a.json": '{"0": "A", "0": "B"}',
        "b.json": '{"0": {"text": "A", "text": "B"}}',
        "c.json": '[{"id": 0, "text": "A", "text": "B"}]',
        "d.jsonl": '{"id": 0, "text": "A", "text": "B"}\n',
        "e.csv": "id,text,text\n0,A,B\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AnswerError, match=f"{name}.*twice"):
            read_answers(tmp_path / name)
    (tmp_path / "t.yaml").write_text("name: x\nname: y\n")
    with pytest.raises(DataError, match="the key 'name' stands twice"):
        outside.include(tmp_path)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"files": "/etc/*"}, "files is '/etc/\\*'"),
        ({"files": ""}, "files is ''"),
        ({"files": [1]}, "files is 1"),
        ({"options": ["A", "B"]}, "its prompt shows no options"),
    ],
)
def test_a_yaml_file_that_misleads(tmp_path, keys, words):
    task = {"name": "own", "prompt": "{q}", "answer": "t", "rule": "exact", **keys}
    dump(tmp_path / "t.yaml", task)
    with pytest.raises(DataError, match=words):
        outside.include(tmp_path)


def test_a_list_of_files_is_read_whole(tmp_path):
    dump(tmp_path / "t.yaml", {"name": "own", "prompt": "{q}", "answer": "t", "rule": "exact",
                               "files": ["a.jsonl", "b.jsonl"]})  # fmt: skip
    outside.include(tmp_path)
    lines(tmp_path / "d" / "a.jsonl", [{"q": "?", "t": "x"}])
    with pytest.raises(DataError, match=r"no b\.jsonl"):
        get_task("own").items(tmp_path / "d")
    lines(tmp_path / "d" / "b.jsonl", [{"q": "!", "t": "y"}])
    assert [(i.key, i.prompt) for i in get_task("own").items(tmp_path / "d")] == [
        ("1", "?"),
        ("2", "!"),
    ]


def test_a_mistyped_column_is_named(tmp_path):
    task = {"name": "own", "files": "*.jsonl", "prompt": "{q}", "answer": "t", "rule": "exact"}
    lines(tmp_path / "d" / "r.jsonl", [{"q": "?", "t": "x", "image": None}])
    for column, words in (("imge", "no picture in imge"), ("image", "no picture in image")):
        dump(tmp_path / "t.yaml", task | {"image": column})
        outside.include(tmp_path)
        with pytest.raises(DataError, match=words):
            get_task("own").items(tmp_path / "d")


@pytest.mark.parametrize("body", ["1 / 0", "return 5.0, 'x'", "return float('nan'), 'x'"])
def test_a_task_whose_rule_fails_is_named(tmp_path, body):
    code = (
        "from llava_jax.eval.simple import Item, SimpleTask\n"
        "class Own(SimpleTask):\n    name, files, data_files = 'own', ('*.jsonl',), 'x'\n"
        "    def item(self, row, number):\n        return Item(str(number), 'q', 'a')\n"
        f"    def judged(self, text, item):\n        {body}\nTASK = Own()\n"
    )
    (tmp_path / "own.py").write_text(code)
    outside.include(tmp_path)
    lines(tmp_path / "d" / "r.jsonl", [{"q": "?"}])
    with pytest.raises(AnswerError, match="own, question 1: cannot be scored"):
        get_task("own").score(answers(tmp_path, [{"id": 1, "text": "A"}]), tmp_path / "d")
    (tmp_path / "own.py").write_text(code.replace("def judged", "rule = 'exat'\n    def other"))
    with pytest.raises(LlavaError, match="there is no rule 'exat'"):
        outside.include(tmp_path)
