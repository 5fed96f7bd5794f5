"""RefCOCO, CHAIR, the judged sets and MM-Vet on hand-checked cases."""

import json
import pickle

import pytest

from llava_jax.errors import LlavaError
from llava_jax.eval.benchmarks.mmvet import read_grade
from llava_jax.eval.benchmarks.refcoco import center_inside, iou, read_box
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.judge.reviews import parse_score, summary
from llava_jax.eval.task import TASKS, Task, TaskSettings, get_task
from tests.eval.test_vqa_family import dump, lines


def test_every_task_loads_and_says_what_it_needs():
    for name in TASKS:
        task = get_task(name)
        assert task.name == name
        assert task.data_files
        assert task.title == TASKS[name]
    tokens = {n: get_task(n).max_new_tokens for n in TASKS}
    assert tokens["vqav2"] == tokens["pope"] == tokens["seed"] == tokens["mme"] == 128
    assert tokens["scienceqa"] == tokens["mmbench"] == tokens["mmvet"] == 1024
    with pytest.raises(LlavaError, match="unknown benchmark 'vqa9'"):
        get_task("vqa9")
    with pytest.raises(LlavaError, match="no server takes a submission"):
        get_task("pope").submission(None, None, None)
    assert isinstance(get_task("MMBench-CN"), Task)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2,0.3, 1]", [0.1, 0.2, 0.3, 1]),
        ("no [1, 2] but [ 0, -1, 2.5, 3 ] and [9,9,9,9]", [0, -1, 2.5, 3]),
        ("(0.1, 0.2, 0.3, 0.4)", [0, 0, 0, 0]),
        ("[.1, .2, .3, .4]", [0, 0, 0, 0]),
        ("[0.1, 0.2, 0.3]", [0, 0, 0, 0]),
    ],
)
def test_refcoco_box(text, box):
    assert read_box(text) == box


def test_refcoco_geometry():
    assert iou([0, 0, 1, 1], [0, 0, 1, 0.5]) == 0.5
    assert iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0.0
    assert iou([0, 0, 1, 1], [2, 2, 3, 3]) == 0.0
    assert center_inside([0, 0, 1, 1], [0, 0, 2, 2])
    assert not center_inside([0, 0, 1, 1], [0.5, 0.5, 2, 2])


def refs(tmp_path, extra=None):
    rows = [
        {
            "ref_id": 1,
            "ann_id": 5,
            "image_id": 9,
            "split": "val",
            "sentences": [{"sent_id": 3, "raw": "the dog"}],
        },
        *(extra or []),
    ]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(rows))
    instances = {
        "images": [{"id": 9, "file_name": "a.jpg", "width": 10, "height": 20}],
        "annotations": [{"id": 5, "bbox": [1, 2, 5, 10]}],
    }
    dump(tmp_path / "instances.json", instances)


def test_refcoco_official_files(tmp_path):
    refs(tmp_path)
    task = get_task("refcoco")
    (q,) = task.questions(tmp_path)
    assert q.prompt.endswith("this sentence describes: the dog.")
    given = lines(tmp_path / "a.jsonl", [{"question_id": 3, "text": "[0.1, 0.1, 0.6, 0.6]"}])
    result = task.score(given, tmp_path)
    assert result.samples["3"].truth == [0.1, 0.1, 0.6, 0.6]
    assert result.totals["acc@0.9"] == 100.0
    with pytest.raises(DataError, match="no refs of split 'testA'"):
        task.questions(tmp_path, TaskSettings(split="testA"))


def test_refcoco_refuses_code_in_a_pickle(tmp_path):
    refs(tmp_path, extra=[print])
    with pytest.raises(DataError, match="does not belong in a refs file"):
        get_task("refcoco").questions(tmp_path)


def chair_data(tmp_path):
    synonyms = [
        "person, man, boy",
        "dog, puppy",
        "toilet",
        "chair, seat",
        "tie",
        "wine glass",
        "bear",
    ]
    (tmp_path / "synonyms.txt").write_text("\n".join(synonyms) + "\n")


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two men with puppies.", ["person", "dog"]),
        ("A baby bear", ["bear"]),
        ("a toilet seat by a seat", ["toilet"]),
        ("a bow tie and wine glasses", ["tie", "wine glass"]),
        ("nothing here", []),
        ("boys, boys", ["person", "person"]),
    ],
)
def test_chair_words(tmp_path, caption, objects):
    pytest.importorskip("textblob")
    from llava_jax.eval.benchmarks.chair import ObjectWords

    chair_data(tmp_path)
    assert ObjectWords(tmp_path / "synonyms.txt").objects(caption) == objects


def test_chair_official_files(tmp_path):
    pytest.importorskip("textblob")
    chair_data(tmp_path)
    dump(
        tmp_path / "instances_val2014.json",
        {
            "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
            "categories": [{"id": 18, "name": "dog"}],
            "annotations": [{"image_id": 1, "category_id": 18}],
        },
    )
    captions = [{"image_id": 1, "caption": "a dog in a chair"}]
    dump(tmp_path / "captions_val2014.json", {"annotations": captions})
    assert len(get_task("chair").questions(tmp_path)) == 2
    given = dump(tmp_path / "a.json", [{"image_id": 1, "caption": "A puppy, a seat and a man"}])
    result = get_task("chair").score(given, tmp_path)
    assert result.samples["1"].details == {
        "generated": ["dog", "chair", "person"],
        "hallucinated": ["person"],
    }
    assert result.totals["CHAIRi"] == pytest.approx(100 / 3)
    row = {"image_id": 1, "caption": "A puppy, a seat and a man", "CIDEr": 0}
    own = dump(tmp_path / "own.json", {"overall": {}, "imgToEval": {"1": row}})
    assert get_task("chair").score(own, tmp_path).totals == result.totals
    assert result.totals["CHAIRs"] == 100.0


@pytest.mark.parametrize(
    ("review", "scores"),
    [
        ("8 9\nwhy", [8, 9]),
        ("8,9", [8, 9]),
        ("8, 9", [-1, -1]),
        ("8 9 ", [-1, -1]),
        ("8\n9", [-1, -1]),
        ("eight nine", [-1, -1]),
        ("", [-1, -1]),
    ],
)
def test_review_scores(review, scores):
    assert parse_score(review) == scores


def test_unread_reviews_stay_in_the_mean(tmp_path):
    means = {"relative": 71.4, "reference": 35.0, "model": 25.0, "n": 2}
    assert summary([[8, 6], [-1, -1]]) == means
    rows = [
        {"question_id": 0, "category": "llava_bench_conv", "content": "8 6\n"},
        {"question_id": 1, "category": "llava_bench_conv", "content": "none", "judge": "gpt-x"},
    ]
    lines(tmp_path / "questions.jsonl", [{"question_id": i} for i in range(3)])
    result = get_task("llava_wild").score(lines(tmp_path / "r.jsonl", rows), tmp_path)
    assert result.totals["all"] == 71.4
    assert result.totals["unread_reviews"] == 1
    assert result.totals["judge"] == "gpt-x"
    assert result.coverage.missing == ["2"]


def test_answers_are_no_reviews(tmp_path):
    given = lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "It is a cat."}])
    with pytest.raises(AnswerError, match="these are answers, not reviews"):
        get_task("coco30").score(given, tmp_path)


def test_wild_request(tmp_path):
    lines(
        tmp_path / "questions.jsonl",
        [{"question_id": 0, "image": "001.jpg", "text": "What?", "category": "conv"}],
    )
    lines(tmp_path / "context.jsonl", [{"image": "001.jpg", "caption": "A cat."}])
    lines(tmp_path / "answers_gpt4.jsonl", [{"question_id": 0, "text": "cat", "answer_id": "g"}])
    rule = {"llava_bench_conv": {"role": "Assistant", "prompt": "Rate."}}
    dump(tmp_path / "rule.json", rule)
    given = lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "dog", "answer_id": "m"}])
    task = get_task("llava_wild")
    ((row, message),) = task.requests(given, tmp_path)
    assert row == {
        "id": 1,
        "question_id": 0,
        "answer1_id": "g",
        "answer2_id": "m",
        "category": "llava_bench_conv",
    }
    assert message == (
        "[Context]\nA cat.\n\n[Question]\nWhat?\n\n[Assistant 1]\ncat\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\ndog\n\n[End of Assistant 2]\n\n[System]\nRate.\n\n"
    )
    (q,) = task.questions(tmp_path)
    assert (q.prompt, q.images) == ("What?", ("001.jpg",))
    dump(tmp_path / "rule.json", {})
    with pytest.raises(DataError, match="'llava_bench_conv' is not in rule.json"):
        list(task.requests(given, tmp_path))


@pytest.mark.parametrize(
    ("reply", "grade"), [("0.5", 0.5), ("1.0 |", 1.0), ("1.5", None), ("-1", None), ("good", None)]
)
def test_mmvet_grade(reply, grade):
    assert read_grade(reply) == grade


def test_mmvet_sums(tmp_path):
    truth = {
        "v1_0": {"imagename": "a", "question": "q", "answer": "x<AND>y", "capability": ["ocr"]},
        "v1_1": {"imagename": "b", "question": "q", "answer": "z", "capability": ["rec", "ocr"]},
    }
    dump(tmp_path / "mm-vet.json", truth)
    task = get_task("mmvet")
    grades = {"v1_0": {"model": ["gpt-4"], "content": ["1.0"], "score": [1.0, 0.5]}}
    result = task.score(dump(tmp_path / "grades.json", grades), tmp_path)
    assert result.totals["runs"] == [50.0, 25.0]
    assert (result.totals["total"], result.totals["std"]) == (37.5, 12.5)
    assert result.tables["per capability"]["rec"] == {"score": 0.0, "n": 1}
    assert result.tables["per integration"]["ocr"] == {"score": 75.0, "n": 1}
    assert result.coverage.missing == ["v1_1"]
    grades["v1_1"] = {"model": ["gpt-4"], "score": [0.5]}  # the judge's second run stopped here
    result = task.score(dump(tmp_path / "grades.json", grades), tmp_path)
    assert (result.totals["total"], result.totals["runs"]) == (75.0, [75.0])
    assert result.notes == ["1 run of 2 counted: further ones grade a part alone"]
    rows = [{"question_id": 0, "text": "x"}, {"question_id": 1, "text": "z"}]
    answers = lines(tmp_path / "a.jsonl", rows)
    first = task.requests(answers, tmp_path)[0]
    assert first[0] == "v1_0"
    assert first[1].endswith("\nq | x <AND> y | x | ")
    for bad in (answers, dump(tmp_path / "up.json", {"v1_0": "text"})):
        with pytest.raises(AnswerError, match="grade"):
            task.score(bad, tmp_path)
    assert [q.record["question_id"] for q in task.questions(tmp_path)] == [0, 1]


def test_result_is_json(tmp_path):
    lines(tmp_path / "r.jsonl", [{"question_id": 0, "tuple": [8, 9], "category": "c"}])
    result = get_task("coco30").score(tmp_path / "r.jsonl", tmp_path).to_json()
    assert json.loads(json.dumps(result))["per_sample"]["0"]["model"] == 9.0
