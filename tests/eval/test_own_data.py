"""Data and answers that are not what they seem: each is read rightly or refused by name, never scored."""

import pytest

from llava_jax.eval.answers import read_answers
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.task import get_task
from tests.eval.test_vqa_family import lines


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
