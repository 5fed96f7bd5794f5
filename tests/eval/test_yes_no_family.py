"""POPE and MME on hand-checked cases of odd answers."""

import json

import pytest

from llava_jax.eval.benchmarks.mme import mme_answer
from llava_jax.eval.benchmarks.pope import pope_answer, pope_scores
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.task import get_task
from tests.eval.test_vqa_family import lines

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("No", "no"),
        ("no way", "no"),
        ("No, there is", "no"),
        ("There is not one. Yes", "no"),
        ("Yes. No", "yes"),
        ("Nope", "yes"),
        ("NO", "yes"),
        ("\nNo", "yes"),  # split at blanks only
        ("", "yes"),
        ("是的", "yes"),
        ("Not", "yes"),
        (".No", "yes"),
    ],
)
def test_pope_answer(text, want):
    assert pope_answer(text) == want


def test_pope_scores_of_nothing():
    assert pope_scores([("no", "no")])["F1 score"] == 0.0
    assert pope_scores([])["Accuracy"] == 0.0


def pope_data(tmp_path, extra=0):
    objects = ["dog", "cat", "imange frame"]
    for split in ("random", "popular", "adversarial"):
        rows = [
            {
                "question_id": n,
                "image": f"{split}.jpg",
                "text": f"Is there a {name} in the image?",
                "label": "yes" if n == 1 else "no",
            }
            for n, name in enumerate([*objects, "x", "y"][: 3 + extra * (split == "random")], 1)
        ]
        # The additional rows stand first, so that places shift.
        lines(tmp_path / f"coco_pope_{split}.json", [*rows[3:], *rows[:3]])
    questions = []
    for split in ("adversarial", "popular", "random"):
        for name in objects:
            questions.append(
                {
                    "question_id": len(questions) + 1,
                    "image": f"{split}.jpg",
                    "text": f"Is there a {name} in the imange?{SHORT}",
                    "category": split,
                }
            )
    lines(tmp_path / "llava_pope_test.jsonl", questions)
    texts = ["Yes", "No", "No"] * 3
    return [
        {"question_id": q["question_id"], "prompt": q["text"], "text": t}
        for q, t in zip(questions, texts)
    ]


def test_pope_labels_found_by_question_not_place(tmp_path):
    rows = pope_data(tmp_path, extra=2)
    result = get_task("pope").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    assert result.totals["f1"] == 100.0
    assert result.totals["f1_llava_script"] < 100
    assert result.notes == ["the label files hold 2 questions that were not asked"]


def test_pope_labels_that_differ_are_named(tmp_path):
    rows = pope_data(tmp_path)
    path = tmp_path / "coco_pope_random.json"
    first = json.loads(path.read_text().split("\n")[0])
    other = {**first, "label": "no" if first["label"] == "yes" else "yes"}
    path.write_text(path.read_text() + json.dumps(other) + "\n")
    result = get_task("pope").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    _, said = result.notes
    assert said.startswith(
        "1 question labelled yes and no: the last label counts (random, random.jpg"
    )


def test_pope_missing_and_foreign(tmp_path):
    rows = pope_data(tmp_path)
    result = get_task("pope").score(lines(tmp_path / "a.jsonl", rows[1:]), tmp_path)
    assert result.samples["1"].parsed == "missing"
    assert result.tables["per split"]["adversarial"]["Accuracy"] == pytest.approx(200 / 3)
    assert result.coverage.missing == ["1"]
    lines(
        tmp_path / "coco_pope_random.json",
        [{"question_id": 1, "image": "z", "text": "", "label": "no"}],
    )
    with pytest.raises(DataError, match="question 7 .* has no label"):
        get_task("pope").score(tmp_path / "a.jsonl", tmp_path)


def test_pope_wrong_image(tmp_path):
    rows = pope_data(tmp_path)
    rows[4]["image"] = "random.jpg"
    with pytest.raises(AnswerError, match=r"line 5, id 5: the answer is for image 'random.jpg'"):
        get_task("pope").score(lines(tmp_path / "a.jsonl", rows), tmp_path)


def test_pope_own_questions_carry_their_place(tmp_path):
    pope_data(tmp_path)
    (tmp_path / "llava_pope_test.jsonl").unlink()
    asked = get_task("pope").questions(tmp_path)
    assert len(asked) == 9
    assert asked[0].record["category"] == "random"
    assert asked[0].prompt == "Is there a dog in the image?" + SHORT
    rows = [{**q.record, "text": "Yes" if "dog" in q.prompt else "No"} for q in asked]
    assert get_task("pope").score(lines(tmp_path / "a.jsonl", rows), tmp_path).totals["f1"] == 100.0


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("Yes", "yes"),
        ("YES!", "yes"),
        ("no.", "no"),
        ("know", "no"),
        ("Snow", "no"),
        ("The answer is yes", "other"),
        (" yes", "yes"),
        ("  yes", "other"),
        ("", "other"),
    ],
)
def test_mme_answer(text, want):
    assert mme_answer(text) == want


def mme_release(tmp_path):
    plain = tmp_path / "existence"
    plain.mkdir(parents=True)
    (plain / "1.txt").write_text(
        "Is there a dog? Please answer yes or no.\tYes\nIs there a cat?  Please answer yes or no.\tNo\n"
    )
    (plain / "1.jpg").write_bytes(b"")
    apart = tmp_path / "OCR" / "questions_answers_YN"
    apart.mkdir(parents=True)
    (apart / "2.txt").write_text("Is it A? Please answer yes or no.\tYes\nIs it B?\tNo\n")
    (tmp_path / "OCR" / "images").mkdir()
    (tmp_path / "OCR" / "images" / "2.png").write_bytes(b"")


def test_mme_repeated_ids_are_told_apart(tmp_path):
    mme_release(tmp_path)
    asked = get_task("mme").questions(tmp_path)
    assert [q.record["question_id"] for q in asked] == [
        "existence/1.jpg",
        "existence/1.jpg",
        "OCR/images/2.png",
        "OCR/images/2.png",
    ]
    assert asked[1].prompt == "Is there a cat?" + SHORT
    texts = ["Yes", "Yes", "yes", "no"]
    rows = [{**q.record, "text": t} for q, t in zip(asked, texts)]
    result = get_task("mme").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    table = result.tables["per task"]
    assert table["existence"]["score"] == 50.0  # acc 50, no image wholly right
    assert table["OCR"]["score"] == 200.0
    assert result.totals == {"perception": 250.0, "cognition": 0}
    assert "no answers to" in result.notes[0]
    part = get_task("mme").score(lines(tmp_path / "a.jsonl", rows[:1]), tmp_path)
    assert part.coverage.answered == 1
    assert part.tables["per task"]["OCR"]["acc"] == 0


def test_mme_tool_files(tmp_path):
    mme_release(tmp_path / "data")
    asked = get_task("mme").questions(tmp_path / "data")
    rows = [{**q.record, "text": "Yes,\tsure\nit is"} for q in asked]
    answers = lines(tmp_path / "a.jsonl", rows)
    out = get_task("mme").submission(answers, tmp_path / "data", tmp_path / "results")
    assert (out / "OCR.txt").read_text().split("\n")[0] == (
        "images/2.png\tIs it A? Please answer yes or no.\tYes\tYes, sure it is"
    )
    ours = get_task("mme").score(answers, tmp_path / "data")
    assert get_task("mme").score(out, tmp_path).totals == ours.totals


def test_mme_broken_tool_files(tmp_path):
    path = tmp_path / "count.txt"
    path.write_text("1.jpg\tq\tYes\tyes\n")
    with pytest.raises(AnswerError, match="1 lines, but every image has two"):
        get_task("mme").score(tmp_path, tmp_path)
    path.write_text("1.jpg\tq\tYes\tyes\n1.jpg\tq\tNo\n")
    with pytest.raises(AnswerError, match=r"count\.txt line 2: 3 cells"):
        get_task("mme").score(tmp_path, tmp_path)
    path.write_text("1.jpg\tq\tYes\tyes\n1.jpg\tq\tmaybe\tno\n")
    with pytest.raises(AnswerError, match="line 2: the truth is 'maybe'"):
        get_task("mme").score(tmp_path, tmp_path)
    with pytest.raises(AnswerError, match="no such file"):
        get_task("mme").score(tmp_path / "none", tmp_path)
