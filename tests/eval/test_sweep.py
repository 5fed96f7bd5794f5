"""Every benchmark of `eval list`: a tiny set in the form its owner gives it out, read, asked and scored.

Sets of the hub are parquet with pictures inside, in the columns that their pages show.
"""

import io
import json
import pickle
from pathlib import Path

import pytest
from PIL import Image

from llava_jax.cli import main
from llava_jax.errors import LlavaError
from llava_jax.eval.errors import DataError
from llava_jax.eval.report.text import complete
from llava_jax.eval.task import TASKS, get_task
from tests.eval.test_vqa_family import lines


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()
IMAGE = {"bytes": PNG, "path": "x.png"}  # as datasets keeps one
TEN = [{"answer": "cat", "answer_id": n, "answer_confidence": "yes"} for n in range(10)]
ABCD = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), "wxyz"))
MME = (
    "Is there a cat? Please answer yes or no.\tYes\nIs there a dog? Please answer yes or no.\tNo\n"
)
LABELS = [{"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "yes"},
          {"question_id": 2, "image": "a.jpg", "text": "Is there a dog?", "label": "no"}]  # fmt: skip
ASKED = [{"question_id": 0, "image": "001.jpg", "category": "conv", "text": "What?"}]
COCO = {"images": [{"id": 9, "file_name": "a.jpg", "width": 10, "height": 20}],
        "annotations": [{"id": 5, "image_id": 9, "category_id": 1, "bbox": [1, 2, 5, 10]}],
        "categories": [{"id": 1, "name": "dog"}]}  # fmt: skip
REF = {"ref_id": 1, "ann_id": 5, "image_id": 9, "split": "val",
       "sentences": [{"sent_id": 3, "raw": "the dog"}]}  # fmt: skip
HALLUSION = {"category": "VD", "subcategory": "chart", "set_id": "0", "figure_id": "0",
             "question_id": "0", "question": "Is it?", "gt_answer": "1", "visual_input": "1",
             "filename": "./VD/chart/0_0.png"}  # fmt: skip
REVIEW = {"question_id": 0, "category": "conv", "content": "8 8", "tuple": [8, 8]}
GRADE = {"v1_0": {"model": ["j"], "content": ["1.0"], "score": [1.0]}}
TSV = "index\tquestion\tA\tB\tanswer\timage\tcategory\tl2-category\tsplit\n0\tWhich?\tx\ty\tB\tcG5n\tc\tl\tdev\n"

# Task -> its files (a list under .parquet: rows), the right answers, in the order of the questions.
SETS: dict[str, tuple[dict[str, object], list[str]]] = {
    "vqav2": (
        {
            "v2_OpenEnded_mscoco_val2014_questions.json": {
                "data_subtype": "val2014",
                "questions": [{"question_id": 1, "image_id": 9, "question": "What?"}],
            },
            "v2_mscoco_val2014_annotations.json": {
                "data_subtype": "val2014",
                "annotations": [{"question_id": 1, "image_id": 9, "answers": TEN}],
            },
        },
        ["cat"],
    ),
    "gqa": (
        {"testdev_balanced_questions.json": {"1": {"question": "?", "answer": "cat", "imageId": "n1"}}},
        ["Cat."],
    ),
    "vizwiz": (
        {"val.json": [{"image": "v.jpg", "question": "what is it", "answers": TEN,
                       "answerable": 1, "answer_type": "other"}]},
        ["cat"],
    ),
    "scienceqa": (
        {"problems.json": {"1": {"question": "?", "choices": ["x", "y"], "answer": 1, "hint": "",
                                 "image": "image.png"}},
         "pid_splits.json": {"test": ["1"]}},
        ["B"],
    ),
    "textvqa": (
        {"TextVQA_0.5.1_val.json": {"data": [{"question_id": 1, "image_id": "t", "question": "what?",
                                              "answers": ["cat"] * 10}]},
         "TextVQA_Rosetta_OCR_v0.2_val.json": {"data": [{"image_id": "t", "ocr_tokens": ["CAT"]}]}},
        ["cat"],
    ),
    "pope": ({f"coco_pope_{s}.json": LABELS for s in ("random", "popular", "adversarial")},
             ["Yes", "No"] * 3),
    "mme": ({"MME_Benchmark_release_version/existence/1.txt": MME,
             "MME_Benchmark_release_version/existence/1.jpg": ""}, ["Yes", "No"]),
    "mmbench": ({"mmbench_dev_20230712.tsv": TSV}, ["B"]),
    "mmbench_cn": ({"mmbench_dev_cn_20231003.tsv": TSV}, ["B"]),
    "seed": (
        {"SEED-Bench.json": {"questions": [{"question_id": "1", "answer": "B", "data_type": "image",
                                            "question_type_id": 1, "data_id": "p", "question": "?", **ABCD}],
                             "question_type": {"Scene Understanding": 1}}},
        ["B"],
    ),
    "llava_wild": ({"questions.jsonl": ASKED}, [json.dumps([REVIEW])]),
    "coco30": ({"qa90_questions.jsonl": ASKED}, [json.dumps([REVIEW])]),
    "mmvet": (
        {"mm-vet.json": {"v1_0": {"imagename": "v1_0.png", "question": "x?", "answer": "1",
                                  "capability": ["math"]}}},
        [json.dumps(GRADE)],
    ),
    "refcoco": ({"refs(unc).p": pickle.dumps([REF]), "instances.json": COCO}, ["[0.1, 0.1, 0.6, 0.6]"]),
    "chair": (
        {"synonyms.txt": "dog, puppy\n", "instances_val2014.json": COCO,
         "captions_val2014.json": {"annotations": [{"image_id": 9, "caption": "A dog."}]}},
        ["A puppy."],
    ),
    "mmstar": (
        {"mmstar.parquet": [{"index": 0, "question": "Which?\nOptions: A: x, B: y", "image": PNG,
                             "answer": "B", "category": "math", "l2_category": "geometry"}]},
        ["B"],
    ),
    "mmmu": (
        {"Art/validation-00000-of-00001.parquet": [
            {"id": "validation_Art_1", "question": "<image 1>?", "options": "['x', 'y']", "answer": "B",
             "image_1": IMAGE, "image_2": None}]},
        ["B"],
    ),
    "mmvp": (
        {"Questions.csv": "lndex,Question,Options,Correct Answer\n1,Open?,(a) Open (b) Closed,(a)\n"
                          "2,Open?,(a) Open (b) Closed,(b)\n"},
        ["A", "B"],
    ),
    "cvbench": (
        {f"test_{k.lower()}.parquet": [
            {"idx": 0, "type": k, "task": "Count", "image": IMAGE, "question": "How many?",
             "choices": ["1", "2"], "answer": "(B)", "source": s, "filename": "img/0.png"}]
         for k, s in (("2D", "COCO"), ("3D", "Omni3D"))},
        ["B", "B"],
    ),
    "realworldqa": (
        {"data/test-00000-of-00001.parquet": [
            {"image": IMAGE, "question": "Which?\nA. Left\nB. Right\nPlease answer directly with only "
             "the letter of the correct option and nothing else.", "answer": "B"}]},
        ["B"],
    ),
    "hallusion": ({"HallusionBench.json": [HALLUSION]}, ["Yes"]),
    "naturalbench": (
        {"data/train-00000-of-00001.parquet": [
            {"Index": 0, "Question_Type": "yes_no", "Question_0": "Red?", "Question_1": "Blue?",
             "Image_0": IMAGE, "Image_1": IMAGE, "Image_0_Question_0": "Yes",
             "Image_1_Question_0": "No", "Image_0_Question_1": "No", "Image_1_Question_1": "Yes"}]},
        ["Yes", "No", "No", "Yes"],
    ),
    "ocrbench": (
        {"data/test-00000-of-00001.parquet": [
            {"dataset": "IIIT5K", "question": "what?", "question_type": "Regular Text Recognition",
             "answer": ["CENTRE"], "image": IMAGE}]},
        ["Centre"],
    ),
    "chartqa": (
        {"data/test-00000-of-00001.parquet": [
            {"type": "human_test", "question": "How?", "answer": "14", "image": IMAGE}]},
        ["14.2"],
    ),
    "docvqa": (
        {"DocVQA/validation-00000-of-00001.parquet": [
            {"questionId": "5", "question": "Who?", "question_types": ["form"], "image": IMAGE,
             "docId": 1, "answers": ["Ann"], "data_split": "val"}]},
        ["ann"],
    ),
    "infovqa": (
        {"InfographicVQA/validation-00000-of-00001.parquet": [
            {"questionId": "6", "question": "Who?", "answers": ["Ann"], "image": IMAGE,
             "answer_type": ["single span"], "image_url": "u", "ocr": "", "data_split": "val"}]},
        ["ann"],
    ),
    "ai2d": (
        {"data/test-00000-of-00001.parquet": [
            {"question": "Which?", "options": ["ant", "bee", "cat", "dog"], "answer": "2",
             "image": IMAGE}]},
        ["C"],
    ),
    "blink": (
        {"Counting/val-00000-of-00001.parquet": [
            {"idx": "val_Counting_1", "question": "How many?", "sub_task": "Counting",
             "prompt": "How many?\n(A) 1\n(B) 2", "answer": "(B)", "choices": ["1", "2"],
             "image_1": IMAGE, "image_2": None, "image_3": None, "image_4": None}]},
        ["(B)"],
    ),
    "mathvista": (
        {"data/testmini-00000-of-00001.parquet": [
            {"pid": "1", "question": "How?", "image": "images/1.jpg", "decoded_image": IMAGE,
             "choices": None, "unit": None, "precision": 1.0, "answer": "1.2", "query": "q",
             "question_type": "free_form", "answer_type": "float",
             "metadata": {"category": "math-targeted-vqa", "task": "geometry", "grade": "college"}}]},
        ["1.2"],
    ),
}  # fmt: skip


def write_set(name: str, data: Path) -> Path:
    """The tiny set of a benchmark, as its owner's files."""
    for file, value in SETS[name][0].items():
        path = data / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
            table = pyarrow.Table.from_pylist(value)
            pytest.importorskip("pyarrow.parquet").write_table(table, path)
        elif path.suffix == ".jsonl" or file.startswith("coco_pope"):
            lines(path, value)
        else:
            text = value if isinstance(value, str | bytes) else json.dumps(value)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return data


def test_every_benchmark_has_a_set():
    assert set(SETS) == set(TASKS) - {n for n, t in TASKS.items() if get_task(n).own_title}


@pytest.mark.parametrize("name", SETS)
def test_it_is_read_asked_and_scored(name, tmp_path):
    if name == "chair":
        pytest.importorskip("textblob", reason="textblob is not installed")
    task, data = get_task(name), write_set(name, tmp_path / name)
    questions, right = task.questions(data), SETS[name][1]
    assert all(q.prompt and (q.images or name == "hallusion") for q in questions)
    assert len({q.key for q in questions}) == len(questions)
    if task.judge:
        (value,) = map(json.loads, right)
        answers = tmp_path / ("r.jsonl" if isinstance(value, list) else "g.json")
        lines(answers, value) if isinstance(value, list) else answers.write_text(json.dumps(value))
    else:
        assert len(right) == len(questions)
        rows = [{**q.record, "text": text} for q, text in zip(questions, right)]
        answers = lines(tmp_path / "a.jsonl", rows)
    result = complete(task.score(answers, data))
    assert (result["coverage"]["answered"], result["coverage"]["expected"]) == (len(questions),) * 2
    best = {"mme": 200.0, "chair": 0.0}.get(name, 100.0)
    assert result["totals"][result["headline"]] == pytest.approx(best)


@pytest.mark.parametrize("name", SETS)
def test_it_says_what_it_lacks(name, tmp_path, capsys):
    with pytest.raises(DataError) as error:
        get_task(name).questions(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    (tmp_path / name).mkdir()
    words = [
        "--model",
        "tiny",
        "--tasks",
        name,
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["eval", *words]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with pytest.raises(LlavaError):
        get_task(name).questions(tmp_path / "absent")


@pytest.mark.parametrize("name", [n for n in SETS if get_task(n).llava_files])
def test_llavas_own_question_file_is_read(name, tmp_path):
    row = {"question_id": 1, "image": "a.jpg", "text": "What?", "category": "default"}
    lines(tmp_path / get_task(name).llava_files[0].replace("*", "x"), [row])
    (q,) = get_task(name).questions(tmp_path)
    assert (q.prompt, q.images) == ("What?", ("a.jpg",))
