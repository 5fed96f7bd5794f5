"""VQAv2, VizWiz, TextVQA and GQA on hand-checked cases of what their owners' rules do to odd input."""

import json

import pytest

from llava_jax.eval.benchmarks.textvqa import question_of
from llava_jax.eval.benchmarks.vizwiz import unanswerability
from llava_jax.eval.errors import AnswerError, DataError
from llava_jax.eval.task import TaskSettings, get_task


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def vqa(tmp_path, truth, given):
    """Scores `given` (id -> answer) against `truth` (id -> the annotators' answers)."""
    rows = [
        {
            "question_id": i,
            "image_id": i,
            "question_type": "what is",
            "answer_type": "other",
            "multiple_choice_answer": a[0],
            "answers": [
                {"answer": x, "answer_confidence": "yes", "answer_id": n}
                for n, x in enumerate(a, 1)
            ],
        }
        for i, a in truth.items()
    ]
    dump(tmp_path / "data" / "v2_mscoco_val2014_annotations.json", {"annotations": rows})
    answers = dump(
        tmp_path / "answers.json", [{"question_id": i, "answer": a} for i, a in given.items()]
    )
    return get_task("vqav2").score(answers, tmp_path / "data")


def test_vqav2_normalises_only_where_annotators_differ(tmp_path):
    split = ["two"] * 9 + ["three"]
    result = vqa(tmp_path, {1: ["two"] * 10, 2: split}, {1: "2", 2: "2."})
    assert result.samples["1"].score == 0.0
    assert result.samples["1"].details["always_normalised"] == 1.0
    assert result.samples["2"].score == 1.0
    assert result.totals["overall"] == 50.0
    assert result.totals["always_normalised"] == 100.0


def test_vqav2_all_agree_compares_raw_words(tmp_path):
    # Case too is left alone then.
    result = vqa(tmp_path, {1: ["yes"] * 10}, {1: "Yes"})
    assert result.totals["overall"] == 0.0


def test_vqav2_upload_splits_the_possessive(tmp_path):
    truth = ["king's cross"] * 8 + ["station"] * 2
    result = vqa(tmp_path, {1: truth}, {1: "King's Cross"})
    assert result.totals["overall"] == 100.0
    assert result.totals["after_llava_submission"] == 0.0


def test_vqav2_missing_answer_is_wrong_even_if_the_truth_is_an_article(tmp_path):
    result = vqa(tmp_path, {1: ["the"] * 5 + ["a"] * 5, 2: ["x"] * 10}, {2: "x"})
    assert result.samples["1"].score == 0.0
    assert result.totals["overall"] == 50.0
    assert result.coverage.missing == ["1"]


def test_vqav2_annotators_without_ids_leave_together(tmp_path):
    # vqaEval leaves out all answers equal to the annotator's own, ids and all.
    answers = [{"answer": a, "answer_confidence": "yes"} for a in ["cat"] * 4 + ["dog"] * 6]
    row = {"question_id": 1, "question_type": "", "answer_type": "", "answers": answers}
    dump(tmp_path / "v2_annotations.json", {"annotations": [row]})
    given = dump(tmp_path / "answers" / "a.json", [{"question_id": 1, "answer": "cat"}])
    score = get_task("vqav2").score(given, tmp_path).samples["1"].score
    assert score == pytest.approx((4 * 0 + 6 * 1) / 10)


def test_vqav2_questions_and_upload(tmp_path):
    questions = [{"question_id": i, "image_id": 42, "question": "What is it?"} for i in (5, 3)]
    dump(
        tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json",
        {"data_subtype": "test-dev2015", "questions": questions[:1]},
    )
    dump(
        tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json",
        {"data_subtype": "test2015", "questions": questions},
    )
    task = get_task("vqav2")
    (asked,) = task.questions(tmp_path, TaskSettings(split="test-dev2015"))
    assert asked.images == ("COCO_test2015_000000000042.jpg",)
    assert asked.prompt == "What is it?\nAnswer the question using a single word or phrase."
    given = lines(tmp_path / "a.jsonl", [{"question_id": 5, "text": "The King's."}])
    out = task.submission(given, tmp_path, tmp_path / "up.json", TaskSettings(split="test2015"))
    want = [{"question_id": 5, "answer": "king 's"}, {"question_id": 3, "answer": ""}]
    assert json.loads(out.read_text()) == want


def test_vqav2_says_what_is_wrong(tmp_path):
    dump(tmp_path / "annotations.json", {"annotations": [{"question_id": 1, "answers": [{}]}]})
    given = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "x"}])
    with pytest.raises(DataError, match="question 1: answers: answer is missing, not text"):
        get_task("vqav2").score(given, tmp_path)
    dump(tmp_path / "annotations.json", [])
    with pytest.raises(DataError, match="no list 'annotations'"):
        get_task("vqav2").score(given, tmp_path)


def vizwiz(tmp_path, truth, given):
    rows = [
        {
            "image": f"{i}.jpg",
            "question": "what is this?",
            "answers": [{"answer": x, "answer_confidence": "yes"} for x in a],
            "answer_type": "other",
            "answerable": int(a[0] != "unanswerable"),
        }
        for i, a in enumerate(truth)
    ]
    dump(tmp_path / "val.json", rows)
    given = [{"image": f"{i}.jpg", "answer": a} for i, a in enumerate(given)]
    return get_task("vizwiz").score(dump(tmp_path / "a.json", given), tmp_path)


def test_vizwiz_leaves_the_truth_raw(tmp_path):
    result = vizwiz(tmp_path, [["A Dog"] * 10, ["dog"] * 10], ["a dog", "The dog."])
    assert [s.score for s in result.samples.values()] == [0.0, 1.0]
    assert [s.details["normalised_gt"] for s in result.samples.values()] == [1.0, 1.0]
    assert result.totals["overall"] == 50.0


def test_vizwiz_leaves_out_by_position(tmp_path):
    # Rows are alike here (no answer_id), and still only one of them steps aside.
    result = vizwiz(tmp_path, [["dog"] * 3 + ["cat"] * 7], ["dog"])
    assert result.samples["0.jpg"].score == pytest.approx(0.9)


def test_unanswerable():
    got = unanswerability([True, True, False, False], [True, False, True, False])
    assert got == {"unanswerable_ap": 50.0, "unanswerable_f1": 50.0, "unanswerable_recall": 50.0}
    never = unanswerability([True, False], [False, False])
    assert never == {"unanswerable_ap": 50.0, "unanswerable_f1": 0.0, "unanswerable_recall": 0.0}
    assert unanswerability([False], [False])["unanswerable_ap"] == 0.0


def test_vizwiz_prompt_and_upload(tmp_path):
    dump(tmp_path / "test.json", [{"image": "a.jpg", "question": "What Is  This"}])
    task = get_task("vizwiz")
    (q,) = task.questions(tmp_path)
    assert q.prompt == (
        "What is  this\nWhen the provided information is insufficient, respond with "
        "'Unanswerable'.\nAnswer the question using a single word or phrase."
    )
    given = lines(tmp_path / "a.jsonl", [{"question_id": 0, "text": "Unanswerable."}])
    out = task.submission(given, tmp_path, tmp_path / "up" / "u.json")
    assert json.loads(out.read_text()) == [{"image": "a.jpg", "answer": "unanswerable"}]
    with pytest.raises(DataError, match="scored by the server"):
        task.score(given, tmp_path)
    lines(given, [{"question_id": 1, "text": "x"}])
    with pytest.raises(AnswerError, match="none of its 1 ids"):
        task.submission(given, tmp_path, tmp_path / "u.json")


def textvqa(tmp_path, rows, given, **options):
    data = [
        {"question_id": n, "image_id": image, "question": question, "answers": answers}
        for n, (image, question, answers) in enumerate(rows, 1)
    ]
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    return get_task("textvqa").score(
        lines(tmp_path / "a.jsonl", given), tmp_path, TaskSettings(**options)
    )


def test_textvqa_joins_by_image_and_question(tmp_path):
    rows = [("i", "what brand?", ["acme"] * 10), ("i", "what year?", ["1990"] * 10)]
    short = "\nAnswer the question using a single word or phrase."
    given = [
        {"question_id": "i", "prompt": "What year?\nReference OCR token: " + short, "text": "1990"},
        {"question_id": "i", "prompt": "What brand?" + short, "text": "ACME"},
    ]
    result = textvqa(tmp_path, rows, given)
    assert result.totals["accuracy"] == 100.0
    assert list(result.samples) == ["2", "1"]  # the order of the answers
    half = textvqa(tmp_path, rows, given[:1])
    assert half.totals == {"accuracy": 50.0, "llava_script_over_given_answers": 100.0}
    assert half.coverage.missing == ["1"]
    twice = textvqa(tmp_path, rows, [*given, {**given[0], "text": "no"}])
    assert twice.coverage.duplicated == {"2": [1, 3]}
    assert twice.totals["accuracy"] == 50.0
    assert twice.totals["llava_script_over_given_answers"] == pytest.approx(200 / 3)


def test_textvqa_prompts(tmp_path):
    assert question_of("OCR tokens: a b. Question: What IS it? Short answer:") == "what is it?"
    assert question_of("Reference OCR token: a\nWhat?\nAnswer") == "what?"
    assert question_of("What?\nReference OCR token: a\nAnswer") == "what?"
    for bad in ("What?", "a\nb\nc", "OCR tokens: a"):
        assert question_of(bad) is None
    with pytest.raises(AnswerError, match=r"line 1, question_id i: no question found"):
        textvqa(
            tmp_path, [("i", "q", ["a"] * 10)], [{"question_id": "i", "prompt": "q", "text": ""}]
        )


def test_textvqa_with_and_without_ocr(tmp_path):
    data = [{"question_id": 1, "image_id": "i", "question": "what?", "answers": ["a"] * 10}]
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": data})
    task = get_task("textvqa")
    with pytest.raises(DataError, match="Rosetta"):
        task.questions(tmp_path)
    (plain,) = task.questions(tmp_path, TaskSettings(options={"ocr": "no"}))
    assert plain.prompt == "What?\nAnswer the question using a single word or phrase."
    tokens = {"data": [{"image_id": "i", "ocr_tokens": ["A", "b"]}]}
    dump(tmp_path / "ocr" / "TextVQA_Rosetta_OCR_v0.2_val.json", tokens)
    (q,) = task.questions(tmp_path)
    assert q.prompt == (
        "What?\nReference OCR token: A, b\nAnswer the question using a single word or phrase."
    )
    own = [{"question_id": "i", "image": "i.jpg", "text": q.prompt, "category": "default"}]
    lines(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", own * 2)
    asked = task.questions(tmp_path)
    assert [a.key for a in asked] == ["i", "i#2"]
    assert asked[0].prompt == q.prompt
    assert task.questions(tmp_path, TaskSettings(options={"ocr": "no"}))[0].prompt == plain.prompt


def gqa_question(answer, structural="query", balanced=True, **more):
    return {
        "question": "What is it ?",
        "answer": answer,
        "imageId": "n1",
        "isBalanced": balanced,
        "types": {"structural": structural, "semantic": "obj", "detailed": "x"},
        "groups": {"global": "thing"},
        "semantic": [
            {"operation": "select", "argument": "table (1)"},
            {"operation": "query", "argument": "name"},
        ],
        "entailed": [],
        **more,
    }


def test_gqa_strips_only_a_period(tmp_path):
    truth = {k: gqa_question("yes", "verify") for k in "abcd"} | {"e": gqa_question("man")}
    dump(tmp_path / "testdev_balanced_questions.json", truth)
    texts = {"a": "Yes.", "b": "Yes ", "c": "yes..", "d": "Yes!", "e": "The man"}
    given = lines(tmp_path / "a.jsonl", [{"question_id": k, "text": v} for k, v in texts.items()])
    result = get_task("gqa").score(given, tmp_path)
    assert {k: s.score for k, s in result.samples.items()} == dict(a=1, b=0, c=1, d=0, e=0)
    assert result.totals["binary"] == 50.0
    assert result.totals["open"] == 0.0
    # lmms-eval drops punctuation, but a trailing blank stays.
    assert [s.details["lmms_eval"] for s in result.samples.values()] == [1, 0, 1, 1, 0]
    assert result.tables["per steps"] == {"1": {"score": 40.0, "n": 5}}
    assert result.tables["per length"]["4"]["n"] == 5


def test_gqa_predictions_file_is_taken_as_it_is(tmp_path):
    dump(tmp_path / "q_questions.json", {"a": gqa_question("yes")})
    given = dump(tmp_path / "p.json", [{"questionId": "a", "prediction": "Yes."}])
    assert get_task("gqa").score(given, tmp_path).totals["accuracy"] == 0.0


def test_gqa_unbalanced_and_consistency(tmp_path):
    truth = {
        "a": gqa_question("yes", entailed=["a", "b", "c"]),
        "b": gqa_question("no", balanced=False),
        "c": gqa_question("cat", balanced=False),
    }
    dump(tmp_path / "q_questions.json", truth)
    texts = {"a": "yes", "b": "no", "c": "dog"}
    rows = [{"question_id": k, "text": v} for k, v in texts.items()]
    result = get_task("gqa").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    assert result.totals["accuracy"] == 100.0
    assert result.totals["consistency"] == 50.0
    assert result.coverage.expected == 1
    part = get_task("gqa").score(lines(tmp_path / "a.jsonl", rows[:1]), tmp_path)
    assert "consistency" not in part.totals
    assert part.coverage.lines() == []


def test_gqa_distribution(tmp_path):
    truth = {k: gqa_question(a) for k, a in zip("abcd", ["x", "x", "x", "y"])}
    dump(tmp_path / "q_questions.json", truth)
    rows = [{"question_id": k, "text": "x"} for k in "abcd"]
    result = get_task("gqa").score(lines(tmp_path / "a.jsonl", rows), tmp_path)
    assert result.totals["distribution"] == pytest.approx(((4 - 3) ** 2 / 3 + 1) / 100)
