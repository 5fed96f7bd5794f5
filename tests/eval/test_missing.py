"""Half of an answer file: every number says what it does with the answers that are not there.

Each benchmark is scored with right answers to a part of its questions. A total must be that of a file
whose missing answers are wrong ones, unless the coverage line says that it leaves them out.
"""

import json

import pytest

from llava_jax.cli import main
from llava_jax.eval.benchmarks.pope import pope_scores
from llava_jax.eval.benchmarks.vizwiz import unanswerability
from llava_jax.eval.errors import AnswerError
from llava_jax.eval.report.stats import headline_of, statistic
from llava_jax.eval.report.text import answered_of, complete
from llava_jax.eval.task import TASKS, TaskSettings, get_task
from tests.eval.test_vqa_family import dump, lines
from tests.eval.test_yes_no_family import mme_release, pope_data


def scored(task, rows, data, keep):
    return get_task(task).score(lines(data / "given.jsonl", rows[:keep]), data)


def headline_from_samples(result):
    return headline_of(result.task.name, result.to_json()["per_sample"])


def test_pope(tmp_path):
    rows = pope_data(tmp_path)
    assert scored("pope", rows, tmp_path, 9).totals["f1"] == 100.0
    # Left are "yes" and "no" of adversarial; of the other splits nothing but the "yes" of popular.
    result = scored("pope", [*rows[:2], rows[3]], tmp_path, 3)
    split = result.tables["per split"]
    counts = {k: [row[n] for n in ("TP", "FP", "TN", "FN")] for k, row in split.items()}
    assert counts == {
        "random": [0, 2, 0, 1],
        "popular": [1, 2, 0, 0],
        "adversarial": [1, 1, 1, 0],
    }
    assert result.totals["f1"] == pytest.approx(100 * (0 + 2 / 4 + 2 / 3) / 3)
    assert result.totals["accuracy"] == pytest.approx(100 * 3 / 9)
    assert split["popular"]["Yes ratio"] == 100.0  # of the answers that there are
    assert headline_from_samples(result) == pytest.approx(result.totals["f1"])
    (line,) = result.coverage.lines()
    assert line.startswith("6 of 9 questions have no answer and count as wrong (left out of f1_")


def test_pope_right_answers_alone_are_not_a_full_score(tmp_path):
    rows = pope_data(tmp_path)
    half = scored("pope", [r for r in rows if r["text"] == "Yes"], tmp_path, 9)
    assert half.totals["f1"] == pytest.approx(50.0)  # all of recall, a third of precision
    assert pope_scores([("missing", "yes"), ("missing", "no")])["Yes ratio"] == 0.0


def mme_answers(tmp_path):
    asked = get_task("mme").questions(tmp_path)
    return [{**q.record, "text": t} for q, t in zip(asked, ("Yes", "No", "Yes", "No"))]


def test_mme_pairs(tmp_path):
    mme_release(tmp_path)
    result = scored("mme", mme_answers(tmp_path), tmp_path, 3)
    assert result.totals["perception"] == 250.0  # existence 200; OCR: acc 50, no pair
    assert result.tables["per task"]["OCR"]["other"] == 0
    assert headline_from_samples(result) == 250.0


def test_mme_tool_files_lack_a_task(tmp_path):
    data = tmp_path / "data"
    mme_release(data)
    answers = lines(tmp_path / "a.jsonl", mme_answers(data))
    out = get_task("mme").submission(answers, data, tmp_path / "results")
    assert get_task("mme").score(out, data).coverage.lines() == []
    (out / "OCR.txt").unlink()
    result = get_task("mme").score(out, data)
    assert result.totals["perception"] == 200.0
    assert (result.coverage.answered, result.coverage.expected) == (2, 4)
    assert result.tables["per task"]["OCR"] == {"score": 0, "acc": 0, "acc+": 0, "other": 0, "n": 2}
    unknown = get_task("mme").score(out, tmp_path / "results")
    assert complete(unknown)["headline"] == "perception_of_given"
    assert answered_of(complete(unknown)["coverage"]) == "answered 2 of an unknown number !"
    with pytest.raises(AnswerError, match="how many questions there are is not known: no release"):
        get_task("mme").score(out, tmp_path / "results", TaskSettings(strict=True))
    full = get_task("mme").submission(answers, data, tmp_path / "full")
    text = (full / "existence.txt").read_text().splitlines(keepends=True)
    (full / "existence.txt").write_text("".join(text[:-2]))  # both lines of an image
    with pytest.raises(AnswerError, match="2 of 4 questions have no answer"):
        get_task("mme").score(full, data, TaskSettings(strict=True))


def test_vizwiz(tmp_path):
    rows = [
        {
            "image": f"{n}.jpg",
            "question": "q",
            "answers": [{"answer": "unanswerable" if n % 2 else "cat"}] * 10,
            "answerable": 1 - n % 2,
        }
        for n in range(8)
    ]
    dump(tmp_path / "val.json", rows)
    given = [{"image": r["image"], "answer": r["answers"][0]["answer"]} for r in rows]
    full = scored("vizwiz", given, tmp_path, 8).totals
    assert (full["overall"], full["unanswerable_f1"], full["unanswerable_ap"]) == (100, 100, 100)
    half = scored("vizwiz", given, tmp_path, 4)
    assert half.totals["overall"] == 50.0
    wrong = unanswerability([bool(n % 2) for n in range(8)], [n in (1, 3, 4, 6) for n in range(8)])
    assert {k: v for k, v in half.totals.items() if k in wrong} == wrong
    assert half.totals["unanswerable_f1"] == 50.0
    assert half.totals["unanswerable_share"] == 50.0
    assert "left out of unanswerable_share" in half.coverage.lines()[0]


def gqa_questions(tmp_path):
    questions = {
        str(n): {"question": "is it", "answer": "yes", "isBalanced": n < 4, "entailed": ["1"]}
        for n in range(6)
    }
    dump(tmp_path / "testdev_balanced_questions.json", questions)
    return [{"questionId": str(n), "prediction": "yes"} for n in range(6)]


def test_gqa(tmp_path):
    given = gqa_questions(tmp_path)
    full = scored("gqa", given, tmp_path, 4).totals
    # What is not asked (not balanced) is nobody's mistake.
    assert (full["accuracy"], full["lmms_eval_exact_match"]) == (100.0, 100.0)
    assert full["consistency"] == 100.0
    half = scored("gqa", [given[0], given[2]], tmp_path, 2).totals
    assert (half["accuracy"], half["lmms_eval_exact_match"]) == (50.0, 50.0)
    assert half["consistency"] == 0.0  # "1" is entailed, was asked and has no answer


def test_scienceqa(tmp_path):
    problems = {
        str(n): {
            "question": "q",
            "choices": ["a", "b"],
            "answer": 0,
            "image": "i.png" if n % 2 else None,
        }
        for n in range(4)
    }
    dump(tmp_path / "problems.json", problems)
    dump(tmp_path / "pid_splits.json", {"test": list(problems)})
    given = [
        {"question_id": str(n), "prompt": "<image>\nq" if n % 2 else "q", "text": "A"}
        for n in range(4)
    ]
    half = scored("scienceqa", given, tmp_path, 2)
    assert half.totals["acc"] == half.totals["img_acc_missing_wrong"] == 50.0
    assert (half.totals["img_acc"], half.totals["img_count"]) == (100.0, 1)  # LLaVA's script
    assert half.totals["unreadable_answers"] == 0
    # The headline is over the questions, and its interval is of the same number.
    assert complete(half)["headline"] == "img_acc_missing_wrong"
    assert headline_from_samples(half) == 50.0
    assert "count as wrong (left out of img_acc)" in half.coverage.lines()[0]
    assert complete(scored("scienceqa", given, tmp_path, 4))["headline"] == "img_acc"


def test_textvqa(tmp_path):
    rows = [
        {"question_id": n, "image_id": f"i{n}", "question": "what", "answers": ["cat"] * 10}
        for n in range(2)
    ]
    dump(tmp_path / "TextVQA_0.5.1_val.json", {"data": rows})
    half = scored("textvqa", [{"question_id": 0, "text": "cat"}], tmp_path, 1)
    assert half.totals["accuracy"] == 50.0
    assert half.totals["llava_script_over_given_answers"] == 100.0
    assert "left out of llava_script_over_given_answers" in half.coverage.lines()[0]


def test_seed_mmbench_refcoco_vqav2(tmp_path):
    (tmp_path / "seed").mkdir()
    questions = [
        {"question_id": str(n), "answer": "A", "data_type": "image", "question_type_id": 1}
        for n in range(2)
    ]
    dump(tmp_path / "seed" / "SEED-Bench.json", {"questions": questions, "question_type": {"x": 1}})
    seed = scored("seed", [{"question_id": "0", "text": "A"}], tmp_path / "seed", 1).totals
    assert seed == {"all": 50.0, "image": 50.0, "lmms_eval_first_char_all": 50.0}

    (tmp_path / "mmb").mkdir()
    table = "index\tquestion\tA\tB\tanswer\n" + "".join(
        f"{index}\tq\tx\ty\tA\n" for index in (1, 2, 1_000_001, 1_000_002)
    )
    (tmp_path / "mmb" / "mmbench_dev_20230712.tsv").write_text(table)
    given = [{"index": i, "prediction": "A"} for i in (1, 2, 1_000_001)]
    mmb = scored("mmbench", given, tmp_path / "mmb", 3)
    assert mmb.totals["circular_acc"] == 50.0
    assert (mmb.totals["vanilla_acc"], mmb.totals["not_inferred"]) == (100.0, 0)
    assert mmb.notes == []

    (tmp_path / "ref").mkdir()
    box = [0.0, 0.0, 0.5, 0.5]
    rows = [{"id": n, "expression": "it", "bbox_xyxy_norm": box} for n in range(2)]
    lines(tmp_path / "ref" / "samples.jsonl", rows)
    ref = scored("refcoco", [{"id": 0, "text": str(box)}], tmp_path / "ref", 1).totals
    assert ref == {**{f"acc@{t}": 50.0 for t in (0.1, 0.3, 0.5, 0.7, 0.9)}, "mean_iou": 50.0,
                   "center_acc": 50.0}  # fmt: skip

    (tmp_path / "vqa").mkdir()
    people = [{"answer": "the", "answer_id": n} for n in range(10)]  # "" once normalised
    rows = [{"question_id": n, "answers": people} for n in range(2)]
    dump(tmp_path / "vqa" / "v2_annotations.json", {"annotations": rows})
    vqa = scored("vqav2", [{"question_id": 0, "text": "the"}], tmp_path / "vqa", 1).totals
    assert (vqa["overall"], vqa["always_normalised"]) == (50.0, 50.0)
    assert vqa["after_llava_submission"] <= 50.0


def test_mmvet_reviews_and_captions(tmp_path):
    dump(tmp_path / "mm-vet.json", {f"v1_{n}": {"capability": ["ocr"]} for n in range(2)})
    grades = dump(tmp_path / "g.json", {"v1_0": {"model": ["j"], "content": ["1"], "score": [1.0]}})
    result = get_task("mmvet").score(grades, tmp_path)
    assert result.totals["total"] == 50.0
    assert "count as wrong" in result.coverage.lines()[0]

    lines(tmp_path / "questions.jsonl", [{"question_id": n} for n in range(2)])
    reviews = lines(
        tmp_path / "r.jsonl",
        [{"question_id": 0, "tuple": [8, 8]}, {"question_id": 0, "tuple": [8, 4]}],
    )
    result = get_task("llava_wild").score(reviews, tmp_path)
    assert result.totals["all"] == 75.0
    assert result.coverage.lines() == [
        "1 of 2 questions have no answer and are left out: 1",
        "1 id answered more than once, all count: 0 (lines 1, 2)",
    ]
    alone = get_task("llava_wild").score(reviews, tmp_path / "none")
    assert alone.coverage.open_end == "no questions file"
    assert complete(alone)["headline"] == "all_of_given"
    with pytest.raises(AnswerError, match="not known: no questions file"):
        get_task("llava_wild").score(reviews, tmp_path / "none", TaskSettings(strict=True))


def test_chair(tmp_path):
    pytest.importorskip("textblob")
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat\n")
    samples = [{"image_id": n, "gt_objects": ["dog"]} for n in range(2)]
    dump(tmp_path / "samples.json", samples)
    result = scored("chair", [{"image_id": 0, "caption": "a cat"}], tmp_path, 1)
    assert result.totals["CHAIRs"] == 100.0
    assert result.coverage.lines() == ["1 of 2 questions have no answer and are left out: 1"]


def test_report_and_terminal_show_it(tmp_path, capsys):
    rows = pope_data(tmp_path)
    answers = lines(tmp_path / "a.jsonl", rows[:3])
    words = ["eval", "score", "pope", "--answers", str(answers), "--data", str(tmp_path)]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    shown = capsys.readouterr().out
    for line in (
        "  f1               33.33 <",
        "  accuracy         33.33",
        "  < headline, which stands beside published numbers; rates are in percent",
        "answered 3 of 9 !",
    ):
        assert line in shown.splitlines()
    assert "adversarial   1   0   2   0    100.00     100.00  100.00    100.00      33.33" in shown
    totals = json.loads((tmp_path / "r.json").read_text())["totals"]
    assert totals["accuracy"] == pytest.approx(100 / 3)  # one unit everywhere
    out = tmp_path / "report"
    assert main(["eval", "report", str(tmp_path / "r.json"), "--out", str(out)]) == 0
    summary = next(
        x for x in (out / "report.md").read_text().splitlines() if x.startswith("| POPE")
    )
    assert summary.endswith("9 of the paper's 8,910 questions; answered 3 of 9 ! |")
    page = (out / "index.html").read_text()
    assert '<p class="flag">answered 3 of 9 !</p>' in page
    assert '<td class="flag">9 of the paper&#39;s 8,910 questions; answered 3 of 9 !</td>' in page


@pytest.mark.parametrize("task", ["pope", "mme"])
def test_intervals_are_of_the_same_number(tmp_path, task):
    """What the bootstrap draws from counts a missing answer as the scorer does."""
    import numpy as np

    rows = pope_data(tmp_path) if task == "pope" else None
    if rows is None:
        mme_release(tmp_path)
        rows = mme_answers(tmp_path)
    result = complete(scored(task, rows, tmp_path, len(rows) // 2 + 1))
    units, headline = statistic(task, result["per_sample"])
    assert headline(np.ones(units)) == pytest.approx(result["totals"][result["headline"]])


def test_uploads_warn_of_what_is_empty(tmp_path, caplog):
    mme_release(tmp_path)
    answers = lines(tmp_path / "a.jsonl", mme_answers(tmp_path)[:3])
    get_task("mme").submission(answers, tmp_path, tmp_path / "out")
    assert caplog.messages == ["MME: 1 of 4 answers in the upload are empty"]


UPLOADED = {
    "vqav2": {"questions": [{"question_id": i, "question": "?"} for i in (1, 2)]},
    "gqa": {str(i): {"question": "?", "answer": "a", "imageId": "n"} for i in (1, 2)},
    "mmvet": {f"v1_{i}": {"capability": ["ocr"]} for i in (1, 2)},
    "docvqa": {"data": [{"questionId": i, "question": "?", "image": "a.png"} for i in (1, 2)]},
}


@pytest.mark.parametrize(
    ("task", "file", "want"),
    [
        ("vqav2", "questions.json", [{"question_id": i, "answer": t} for i, t in ((1, "x"), (2, "c"))]),
        ("gqa", "questions.json", [{"questionId": i, "prediction": t} for i, t in ((2, "c"), (1, "x"))]),
        ("mmvet", "mm-vet.json", {"v1_2": "c", "v1_1": "x"}),
        ("docvqa", "val.json", [{"questionId": i, "answer": t} for i, t in ((1, "x"), (2, "c"))]),
    ],
)  # fmt: skip
def test_uploads_of_doubled_and_foreign_answers(tmp_path, caplog, task, file, want):
    dump(tmp_path / "data" / file, UPLOADED[task])
    given = [{"question_id": i, "text": t} for i, t in ((2, "b"), (1, "x"), (2, "c"), (9, "d"))]
    answers, out = lines(tmp_path / "a.jsonl", given), tmp_path / "up.json"
    get_task(task).submission(answers, tmp_path / "data", out)
    assert out.read_text() == json.dumps(want)
    title, own = TASKS[task], "v1_" if task == "mmvet" else ""
    assert caplog.messages == [
        f"{title}: 1 id answered more than once, the last counts: {own}2 (lines 1, 3)",
        f"{title}: 1 answer to unknown questions: {own}9 (line 4)",
    ]
    with pytest.raises(AnswerError, match="answered more than once"):
        get_task(task).submission(answers, tmp_path / "data", out, TaskSettings(strict=True))


def test_answers_that_are_not_there_are_said_of_an_upload(tmp_path, caplog):
    for task, file, words in (
        ("vqav2", "questions.json", "VQAv2: 1 of 2 answers in the upload are empty"),
        ("gqa", "questions.json", "GQA: 1 of 2 answers in the upload are missing"),
        ("mmvet", "mm-vet.json", "MM-Vet: 1 of 2 answers in the upload are missing"),
    ):
        dump(tmp_path / task / file, UPLOADED[task])
        answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "a"}])
        get_task(task).submission(answers, tmp_path / task, tmp_path / "up.json")
        assert caplog.messages.pop() == words
        caplog.clear()
