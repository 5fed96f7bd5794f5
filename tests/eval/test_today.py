"""Benchmarks of today: rules against their owners' scorers, and each set in its owner's format.

owner_scores.json holds answers of every odd kind with the score that the owner's own function gives,
run at the commits that the docstrings of eval/benchmarks name: MMMU mmmu/utils/eval_utils.py (a random
guess as its mean), MathVista calculate_score.py, MMStar's mmstar.py, lmms-eval's utils of mmvp,
cv_bench, blink, naturalbench, chartqa, ocrbench, realworldqa (truths that are no letter) and its anls;
HallusionBench@744007c utils.py assign_correctness of what YOrN_Extraction of VLMEvalKit@e8e78f0 reads;
can_infer of that commit for AI2D and RealWorldQA's letters. Odd there: yes and no in one answer, or
"no:", are neither; a letter far from the end, two letters, or "2" for an option name none; a refusal
with a letter in it is Z; "3 ." and "03" are not 3; a truth "No." is met by nothing.
"""

import json
from pathlib import Path

import pytest

from llava_jax.eval.errors import DataError
from llava_jax.eval.questions import LETTER
from llava_jax.eval.report.stats import headline_of
from llava_jax.eval.report.text import complete
from llava_jax.eval.run.command import RunSettings, run_task
from llava_jax.eval.simple import Item
from llava_jax.eval.task import get_task
from tests.eval.test_run import Echo
from tests.eval.test_vqa_family import dump, lines

CASES = json.loads((Path(__file__).parent / "owner_scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*CASES, "infovqa"])
def test_the_owners_score(name):
    task, rows = get_task(name), CASES["docvqa" if name == "infovqa" else name]
    assert len(rows) >= 20
    for text, truth, options, groups, score in rows:
        item = Item("k", "q", truth, (), tuple(options), groups)
        assert task.judged(text, item)[0] == pytest.approx(score, abs=1e-12), (text, truth, options)


def scored(name, data, answers):
    """The result of answers by key, as written to a file, whose interval is of its headline."""
    rows = [{"question_id": k, "text": v} for k, v in answers.items()]
    result = complete(get_task(name).score(lines(data.parent / f"{data.name}-a.jsonl", rows), data))
    official = result["totals"][result["headline"]]
    assert headline_of(name, result["per_sample"]) == pytest.approx(official)
    return result


def test_mmstar(tmp_path):
    rows = [
        {"index": n, "question": " Which? \nOptions: A: x, B: y", "answer": "B", "image": f"{n}.jpg",
         "category": "math", "l2_category": "geometry"}
        for n in range(3)
    ]  # fmt: skip
    lines(tmp_path / "mmstar.jsonl", rows)
    (q, *_) = get_task("mmstar").questions(tmp_path)
    assert q.prompt.startswith("Which? \nOptions: A: x, B: y\nAnswer with the option's letter")
    result = scored("mmstar", tmp_path, {0: "B", 1: "(b) y", 2: "A"})
    assert result["totals"]["accuracy"] == pytest.approx(200 / 3)
    assert result["tables"]["per l2_category"]["geometry"]["n"] == 3


def test_mmmu(tmp_path):
    rows = [
        {"id": "validation_Art_1", "question": "See <image 2> and <image 1>", "options": "['x', 'y']",
         "answer": "B", "image_1": "1.png", "image_2": "2.png", "image_3": None},
        {"id": "validation_Art_Theory_2", "question": "How many?", "options": "[]",
         "answer": "['5', 'five']", "image_1": "3.png"},
    ]  # fmt: skip
    lines(tmp_path / "v.jsonl", rows)
    one, two = get_task("mmmu").questions(tmp_path)
    assert (one.images, two.images) == (("2.png", "1.png"), ("3.png",))
    assert "\nA. x\nB. y\nAnswer with the option's letter" in one.prompt
    assert two.prompt == "How many?\nAnswer the question using a single word or phrase."
    result = scored(
        "mmmu", tmp_path, {"validation_Art_1": "?", "validation_Art_Theory_2": "It is five"}
    )
    assert result["totals"]["accuracy"] == 75.0  # a guess of two, and a right one
    assert list(result["tables"]["per subject"]) == ["Art", "Art_Theory"]
    assert scored("mmmu", tmp_path, {"validation_Art_Theory_2": "5"})["totals"]["accuracy"] == 50.0


def test_mmvp(tmp_path):
    (tmp_path / "Questions.csv").write_text(
        "lndex,Question,Options,Correct Answer\n"
        "1,Open?,(a) Open (b) Closed,(a)\n2,Open?,(a) Open (b) Closed,(b)\n"
        "3,Up?,(a) Up (b) Down,(b)\n4,Up?,(a) Up (b) Down,(a)\n"
    )
    questions = get_task("mmvp").questions(tmp_path)
    assert questions[0].prompt.startswith("Open?\nA. Open\nB. Closed\n")
    assert questions[3].images == ("MMVP Images/4.jpg",)
    task = get_task("mmvp")
    assert [task.group_of(q) for q in questions] == ["0", "0", "1", "1"]
    result = scored("mmvp", tmp_path, {1: "A", 2: "B", 3: "B", 4: "B"})
    assert (result["totals"]["pair_accuracy"], result["totals"]["accuracy"]) == (50.0, 75.0)
    assert list(result["per_sample"]) == ["0", "1"]
    assert scored("mmvp", tmp_path, {1: "A", 2: "B", 3: "B"})["totals"]["pair_accuracy"] == 50.0


def test_cvbench(tmp_path):
    rows = [
        {"idx": n, "type": "2D", "task": "Count", "source": s, "question": "How many?",
         "choices": ["1", "2"], "answer": "(B)", "filename": f"{n}.png"}
        for n, s in enumerate(["ADE20K", "COCO", "COCO", "Omni3D", "Omni3D"])
    ]  # fmt: skip
    lines(tmp_path / "r.jsonl", rows)
    answers = dict(zip(("2D_0", "2D_1", "2D_2", "2D_3", "2D_4"), "BBABA"))
    result = scored("cvbench", tmp_path, answers)
    assert result["totals"]["accuracy"] == pytest.approx(100 * ((1 + 0.5) / 2 + 0.5) / 2)
    assert result["totals"]["mean_over_questions"] == 60.0
    asked = "How many?\nSelect from the following choices.\n(A) 1\n(B) 2"  # the owner's own column
    lines(tmp_path / "r.jsonl", [{**rows[0], "prompt": asked}])
    (q,) = get_task("cvbench").questions(tmp_path)
    assert q.prompt == asked + LETTER
    lines(tmp_path / "r.jsonl", [{**rows[0], "source": "x"}])
    with pytest.raises(DataError, match=r"r\.jsonl row 1: .*the source 'x' is none of ADE20K"):
        get_task("cvbench").questions(tmp_path)


def test_realworldqa(tmp_path):
    own = "\nPlease answer directly with only the letter of the correct option and nothing else."
    rows = [
        {"question": "Which way?\n\nA. Left\nB. Right" + own, "answer": "B", "image_path": "0.jpg"},
        {"question": "How many?\nPlease answer directly with a single word or number.", "answer": "3",
         "image_path": "1.jpg"},
    ]  # fmt: skip
    lines(tmp_path / "r.jsonl", rows)
    one, two = get_task("realworldqa").questions(tmp_path)
    assert one.prompt == (
        "Which way?\n\nA. Left\nB. Right\nAnswer with the option's letter from the given choices directly."
    )
    assert two.prompt == "How many?\nAnswer the question using a single word or phrase."
    cases = {
        "B": 1,
        "B. Right": 1,
        "right": 1,
        "Left": 0,
        "A or B": 0,
        "": 0,
        "The answer is B.": 1,
    }
    for text, score in cases.items():
        total = scored("realworldqa", tmp_path, {1: text, 2: "4"})["totals"]["accuracy"]
        assert total == 50 * score, text
    for text, score in {"3": 1, " 3. ": 1, "three": 0, "3 cars": 0}.items():
        total = scored("realworldqa", tmp_path, {1: "A", 2: text})["totals"]["accuracy"]
        assert total == 50 * score, text


def test_hallusion(tmp_path):
    def row(category, figure, question, truth, seen=1):
        return {"category": category, "subcategory": "chart", "set_id": "0", "figure_id": figure,
                "question_id": question, "question": "Is it?", "gt_answer": truth,
                "visual_input": str(seen), "filename": f"./{category}/chart/0_{figure}.png"}  # fmt: skip

    rows = [
        row("VD", "0", "0", "1"),
        row("VD", "1", "0", "0"),
        row("VD", "0", "1", "1"),
        row("VS", "0", "0", "1", 0),
        row("VS", "1", "0", "1"),
    ]
    dump(tmp_path / "HallusionBench.json", rows)
    questions = get_task("hallusion").questions(tmp_path)
    assert [q.images for q in questions[2:4]] == [("VD/chart/0_0.png",), ()]
    keys = [q.key for q in questions]
    assert keys[0] == "VD_chart_0_0_0"
    totals = scored(
        "hallusion", tmp_path, dict(zip(keys, ["Yes", "No", "No", "I cannot see", "Yes"]))
    )["totals"]
    assert totals["aAcc"] == 80.0  # not knowing is right without a picture
    assert totals["qAcc"] == pytest.approx(200 / 3)  # VD 0 and VS 0 on all their pictures
    assert totals["fAcc"] == pytest.approx(200 / 3)  # VD 1 and VS 1; VS 0 has no picture


def test_hallusions_three_numbers_are_its_owners(tmp_path):
    """get_eval_all, get_eval_fig and get_eval_pair_all of HallusionBench@744007c utils.py on these."""
    sets = [("VD", "chart", 1, 3), ("VD", "illusion", 2, 2), ("VS", "map", 2, 3)]
    rows = [
        {"category": category, "subcategory": part, "set_id": str(s), "figure_id": str(f),
         "question_id": str(q), "question": "Is it?", "gt_answer": str((f + q) % 2),
         "visual_input": "0" if category == "VS" and f == 0 else "1" if f < 2 else "2",
         "filename": f"{f}.png"}
        for category, part, count, figures in sets
        for s in range(count) for f in range(figures) for q in range(2)
    ]  # fmt: skip
    dump(tmp_path / "HallusionBench.json", rows)
    read = {"n": "No", "y": "Yes", "b": "yes and no", "?": "It is not clear"}
    said = [read[c] for c in "nyynnyyyynnyyb?yyn?ynyynny"]
    keys = [q.key for q in get_task("hallusion").questions(tmp_path)]
    totals = scored("hallusion", tmp_path, dict(zip(keys, said)))["totals"]
    numbers = [totals[n] / 100 for n in ("aAcc", "fAcc", "qAcc")]
    assert numbers == pytest.approx([23 / 26, 8 / 11, 7 / 10])


def test_naturalbench(tmp_path):
    row = {"Index": 7, "Question_0": "Red?", "Question_1": "Blue?", "Image_0": "a.jpg",
           "Image_1": "b.jpg", "Question_Type": "yes_no"}  # fmt: skip
    lines(tmp_path / "r.jsonl", [row, {**row, "Index": 8, "Question_Type": "multiple_choice"}])
    questions = get_task("naturalbench").questions(tmp_path)
    assert [q.key for q in questions[:4]] == ["7_q0_i0", "7_q0_i1", "7_q1_i0", "7_q1_i1"]
    assert questions[0].prompt == "Red? Please answer Yes or No."
    right = dict(zip((q.key for q in questions), ["Yes", "No", "no", "yes", "A", "B", "b", "A"]))
    assert scored("naturalbench", tmp_path, right)["totals"]["G_Acc"] == 100.0
    totals = scored("naturalbench", tmp_path, right | {"8_q1_i0": "A"})["totals"]
    assert {k: totals[k] for k in ("G_Acc", "Q_Acc", "I_Acc", "accuracy")} == {
        "G_Acc": 50.0,
        "Q_Acc": 75.0,
        "I_Acc": 75.0,
        "accuracy": 87.5,
    }


def test_ocrbench_chartqa_docvqa_infovqa(tmp_path):
    ocr = [{"dataset_name": "IIIT5K", "id": 0, "question": "what is written?", "answers": ["CENTRE"],
            "type": "Regular Text Recognition", "image_path": "IIIT5K/0.png"}]  # fmt: skip
    dump(tmp_path / "ocr" / "OCRBench.json", ocr)
    assert (
        scored("ocrbench", tmp_path / "ocr", {"IIIT5K/0": "centre."})["totals"]["accuracy"] == 100.0
    )
    for half, truth in (("human", "Yes"), ("augmented", "20")):
        rows = [{"imgname": "1.png", "query": "How?", "label": truth}] * 2
        dump(tmp_path / "chart" / f"test_{half}.json", rows)
    answers = {"human_1": "yes", "human_2": "no", "augmented_1": "21", "augmented_2": "20.5"}
    result = scored("chartqa", tmp_path / "chart", answers)
    assert result["totals"]["accuracy"] == 75.0
    assert result["tables"]["per half"]["human"]["score"] == 50.0
    doc = {"questionId": 5, "question": "Who?", "image": "documents/a.png", "answers": ["Ann", "A. Lee"],
           "question_types": ["handwritten"]}  # fmt: skip
    dump(tmp_path / "doc" / "val_v1.0_withQT.json", {"data": [doc]})
    assert scored("docvqa", tmp_path / "doc", {5: "anna"})["totals"]["anls"] == 75.0
    info = {"questionId": 6, "question": "?", "image_local_name": "6.jpeg", "answers": ["x"]}
    dump(tmp_path / "info" / "infographicsVQA_val_v1.0_withQT.json", {"data": [info]})
    (q,) = get_task("infovqa").questions(tmp_path / "info")
    assert q.images == ("6.jpeg",)
    dump(
        tmp_path / "test" / "test_v1.0.json",
        {"data": [{k: doc[k] for k in ("questionId", "question", "image")}]},
    )
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 5, "text": "Ann"}])
    with pytest.raises(DataError, match="scored by a server"):
        get_task("docvqa").score(answers, tmp_path / "test")
    upload = get_task("docvqa").submission(answers, tmp_path / "test", tmp_path / "u.json")
    assert json.loads(upload.read_text()) == [{"questionId": 5, "answer": "Ann"}]


def test_ai2d_blink_mathvista(tmp_path):
    rows = [
        {"question": "Which?", "options": ["ant", "bee", "cat", "dog"], "answer": "2", "image": "a"}
    ]
    lines(tmp_path / "ai2d" / "r.jsonl", rows)
    for text, score in {"C": 100, "C. cat": 100, "cat": 100, "2": 0, "A": 0}.items():
        assert scored("ai2d", tmp_path / "ai2d", {1: text})["totals"]["accuracy"] == score, text
    part = {
        "choices": ["x", "y"],
        "answer": "(A)",
        "prompt": "Which?\n(A) x\n(B) y",
        "image_2": "2",
    }
    rows = [
        {**part, "idx": f"val_{n}", "sub_task": t, "image_1": f"{n}"} for n, t in enumerate("ppq")
    ]
    lines(tmp_path / "blink" / "r.jsonl", rows)
    assert get_task("blink").questions(tmp_path / "blink")[0].images == ("0", "2")
    totals = scored("blink", tmp_path / "blink", {"val_0": "A", "val_1": "(B)", "val_2": "a"})[
        "totals"
    ]
    assert (totals["accuracy"], totals["n"]) == (75.0, 3)
    assert totals["mean_over_questions"] == pytest.approx(200 / 3)
    common = {"question": "How?", "image": "images/1.jpg", "metadata": {"task": "geometry"}}
    rows = {
        "1": {**common, "pid": "1", "question_type": "multi_choice", "choices": ["red", "blue"],
              "answer": "blue", "answer_type": "text", "precision": None},
        "2": {**common, "pid": "2", "question_type": "free_form", "choices": None, "answer": "1.5",
              "answer_type": "float", "precision": 1.0, "unit": "m"},
    }  # fmt: skip
    dump(tmp_path / "math" / "testmini.json", rows)
    one, two = get_task("mathvista").questions(tmp_path / "math")
    assert one.prompt.startswith("How?\nA. red\nB. blue\n")
    assert two.prompt.startswith("How? (Unit: m)\nAnswer the question using")
    result = scored("mathvista", tmp_path / "math", {1: "(B)", 2: "1.52"})
    assert result["totals"]["accuracy"] == 100.0
    assert set(result["tables"]) == {"per answer_type", "per task"}


def test_a_limit_takes_whole_groups_and_scores_them(tmp_path):
    (tmp_path / "Questions.csv").write_text(
        "lndex,Question,Options,Correct Answer\n"
        + "".join(f"{n},Q{n}?,(a) x (b) y,({'ab'[n % 2]})\n" for n in range(1, 9))
    )
    for n in range(1, 9):
        (tmp_path / "MMVP Images").mkdir(exist_ok=True)
        (tmp_path / "MMVP Images" / f"{n}.jpg").touch()
    run = RunSettings(tmp_path, tmp_path / "out", "m", limit=4, show_progress=False)
    model = Echo(lambda r: "AB"[int(r.messages[1]) % 2])
    result = run_task(model, get_task("mmvp"), run)
    assert result["totals"]["pair_accuracy_of_answered"] == 100.0
    assert sum(model.batches) == 4


# Rows as their owners publish them: types of each field, and truths that look odd but can be met.
PUBLISHED = {
    "mmmu": [
        {"id": "validation_Chemistry_30", "question": "See <image 1>", "options": "[]",
         "answer": "['$MgS$', 'MgS']", "image_1": "1.png", "image_2": None},
        {"id": "validation_Pharmacy_19", "question": "See <image 1>", "options": "[]",
         "answer": "B", "image_1": "1.png"},
        {"id": "validation_Math_7", "question": "See <image 1>", "image_1": "1.png", "answer": "A",
         "options": "['<image 8>, <image 9>', '<image 10>, <image 30>']"},
        {"id": "dev_Math_1", "question": "See <image 1>", "image_1": "1.png", "answer": "I",
         "options": str([f"${n}$" for n in range(9)])},
    ],
    "mathvista": [
        {"pid": "1", "question": "How far?", "question_type": "free_form", "choices": None, "unit": None,
         "precision": 1.0, "answer": "1.2", "answer_type": "float", "image": "images/1.jpg",
         "metadata": {"task": "t", "category": "c", "grade": "college"}},
        {"pid": "2", "question": "How many?", "question_type": "free_form", "choices": None, "unit": "m",
         "precision": None, "answer": "4", "answer_type": "integer", "image": "images/2.jpg"},
        {"pid": "3", "question": "Which?", "question_type": "multi_choice", "unit": None,
         "choices": ["No", "Yes"], "precision": None, "answer": "No", "answer_type": "text",
         "image": "images/3.jpg"},
        {"pid": "4", "question": "Which two?", "question_type": "free_form", "choices": None,
         "precision": None, "answer": "[0, 2]", "answer_type": "list", "image": "images/4.jpg"},
    ],
    "ocrbench": [
        {"dataset_name": "IIIT5K", "id": 9, "image_path": "a.png", "question": "?", "answers": "CENTRE",
         "type": "Regular Text Recognition"},
        {"dataset_name": "HME100k", "id": 9, "image_path": "b.png", "question": "?", "type": "Formula",
         "answers": ["y _ { 2 } = - 1\n", "y_2 = - 1\n"]},
    ],
    "hallusion": [
        {"category": "VS", "subcategory": "chart", "visual_input": "0", "set_id": "0", "figure_id": "0",
         "sample_note": "x", "question_id": "0", "question": "Is it?", "gt_answer_details": "No.",
         "gt_answer": "0", "filename": None},
        {"category": "VD", "subcategory": "ocr", "visual_input": "2", "set_id": "0", "figure_id": "1",
         "sample_note": "x", "question_id": "0", "question": "Is it?", "gt_answer_details": "Yes.",
         "gt_answer": "1", "filename": "./VD/ocr/0_1.png"},
    ],
    "mmvp": [
        {"Index": 1, "Category": "sc", "Question": "Open?", "Options": "(a) Open (b) Closed",
         "Correct Answer": "(a)"},
        {"lndex": "2", "Question": "Open?", "Options": "(a) Open (b) Closed", "Correct Answer": "(b)"},
    ],
    "chartqa": [{"imgname": "1.png", "query": "Who?", "label": "[Yes, No]"},
                {"imgname": "1.png", "query": "How many?", "label": "0"}],
    "blink": [{"idx": "val_IQ_Test_1", "sub_task": "IQ_Test", "prompt": "Which?\n(A) a\n(B) b",
               "choices": ["a", "b"], "answer": "(B)", "image_1": "1.png", "image_2": None}],
    "realworldqa": [{"question": "Which way? A. Left B. Right C. Both\nPlease answer directly with only "
                     "the letter of the correct option and nothing else.", "answer": "B", "image": "1.png"},
                    {"question": "Is it?", "answer": "Yes", "image": "1.png"}],
    "ai2d": [{"question": "Which?", "options": ["A", "B", "", "D"], "answer": "3", "image": "1.png"}],
    "docvqa": [{"questionId": 1, "question": "When?", "question_types": ["table/list"], "docId": 4720,
                "image": "documents/1.png", "ucsf_document_id": "x", "answers": ["1/8/93", "1/8/93"]}],
}  # fmt: skip
MET = {
    "mmmu": ("MgS", "The answer is B", "A", "I"), "mathvista": ("1.2", "4.0", "(A)", "[0, 2]"),
    "ocrbench": ("the Centre", "$y_2=-1$"), "hallusion": ("No", "Yes"), "mmvp": ("A", "B"),
    "chartqa": ("[yes, no]", "0"), "blink": ("B",), "realworldqa": ("B", "yes"), "ai2d": ("D",),
    "docvqa": ("1/8/93",),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_as_their_owners_publish_them(name, tmp_path):
    """No set is refused as it is published, and every truth of it can be met."""
    lines(tmp_path / "r.jsonl", PUBLISHED[name])
    keys = [i.key for i in get_task(name).items(tmp_path)]
    result = scored(name, tmp_path, dict(zip(keys, MET[name], strict=True)))
    scores = [row for s in result["per_sample"].values() for row in s.get("rows", {"": s}).values()]
    assert [s["score"] for s in scores] == [1.0] * len(keys)
