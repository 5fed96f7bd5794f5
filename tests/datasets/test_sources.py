"""Each set on small files of its owner's form: exact prompts, turns, boxes and numbers of records."""

import json
import pickle
import re
import shutil

import pytest

from llava_jax.datasets.boxes import read_box
from llava_jax.datasets.build import named
from llava_jax.datasets.recipe import find_source
from llava_jax.datasets.source import placed
from llava_jax.datasets.sources.aokvqa import rotated
from llava_jax.datasets.sources.refcoco import read_refs
from llava_jax.errors import SampleError
from tests.datasets import owners

SHORT = "Answer the question using a single word or phrase."


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return owners.small(tmp_path_factory.mktemp("raw"))


def records(raw, name, **fields):
    return list(named(find_source(name)(folder=raw / name, **fields)))


def turns(record):
    return [turn["value"] for turn in record["conversations"]]


def test_vqav2_merges_the_questions_of_a_picture(raw):
    made = records(raw, "vqav2")
    assert [len(turns(r)) for r in made] == [6, 4, 4]
    assert made[1] == {
        "id": "vqav2_1",
        "image": "coco/train2017/000000000001.jpg",
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat is 1?\n{SHORT}"},
            {"from": "gpt", "value": "Yes"},
            {"from": "human", "value": "What is 4?"},
            {"from": "gpt", "value": "Yes"},
        ],
    }


def test_okvqa_takes_the_most_frequent_answer(raw):
    made = records(raw, "okvqa")
    assert len(made) == 3
    assert turns(made[2]) == [f"<image>\nWhat is 2?\n{SHORT}", "Yes"]


def test_gqa(raw):
    made = records(raw, "gqa")
    assert [r["image"] for r in made[:2]] == ["gqa/images/n0.jpg", "gqa/images/1.jpg"]
    assert turns(made[1]) == [f"<image>\nIs 1 here?\n{SHORT}", "No", "Is 7 here?", "No"]
    assert sum(len(turns(r)) // 2 for r in made) == 13


def test_ocrvqa_is_the_train_split(raw):
    made = records(raw, "ocrvqa")
    assert len(made) == 8
    assert made[3]["image"] == "ocr_vqa/images/0000000003.jpg"
    assert turns(made[3]) == [
        f"<image>\nWho wrote this book?\n{SHORT}",
        "Author 3",
        "What is the title of this book?",
        "Title 3",
        "Is it new?",
        "No",
    ]


def test_aokvqa_shows_each_picture_once_per_choice(raw):
    made = records(raw, "aokvqa")
    assert len(made) == 3 * 4
    ask = "Answer with the option's letter from the given choices directly."
    assert turns(made[4]) == [
        f"<image>\nWhat is 1?\nA. man\nB. dog\nC. bus\nD. tree\n{ask}",
        "B",
    ]
    assert turns(made[5])[0] == f"<image>\nWhat is 1?\nA. dog\nB. bus\nC. tree\nD. man\n{ask}"
    assert [turns(r)[1] for r in made[4:8]] == ["B", "A", "D", "C"]
    two = turns(made[0])  # of a picture with two questions: the prompt once, choices twice
    assert two[2] == "What is 3?\nA. man\nB. dog\nC. bus\nD. tree"
    assert two[3] == "D"


def test_a_wrong_index_of_a_choice_is_refused():
    with pytest.raises(ValueError, match="is 2 of 2 choices"):
        rotated({"question": "?", "choices": ["a", "b"], "correct_choice_idx": 2}, 0)


def test_textcaps_has_ocr_tokens_and_one_caption(raw):
    made = records(raw, "textcaps")
    assert len(made) == 3
    assert made[2]["image"] == "textvqa/train_images/0000000000000002.jpg"
    assert turns(made[2]) == [
        "<image>\nProvide a one-sentence caption for the provided image.\n"
        "Reference OCR token: STOP, 2",
        "A sign that says 2.",
    ]


REGION = re.compile(r"Please provide a short description for this region: (\[.+\])\.")
BOX = re.compile(
    r"Please provide the bounding box coordinate of the region this sentence describes: (.+)\."
)


def regions(record):
    """(text, box) of each turn, and how many asked for a description."""
    said, described = [], 0
    texts = turns(record)
    texts[0] = texts[0].removeprefix("<image>\n")
    for question, answer in zip(texts[::2], texts[1::2]):
        if found := REGION.fullmatch(question):
            described += 1
            assert answer[0].isupper()
            assert answer.endswith(".")
            said.append((answer[0].lower() + answer[1:-1], found[1]))
        else:
            found = BOX.fullmatch(question)
            assert found
            said.append((found[1], answer))
    return said, described


def test_refcoco_has_under_ten_turns_and_boxes_on_the_padded_picture(raw):
    made = records(raw, "refcoco")
    # Two pictures of train, 3 sets x 4 regions x 3 sentences: 36 turns, 9 in a conversation.
    assert [len(turns(r)) // 2 for r in made] == [9] * 8
    said = [pair for r in made for pair in regions(r)[0]]
    assert len(said) == 72
    assert 20 < sum(regions(r)[1] for r in made) < 52
    box = dict(said)["thing 5 0"]  # x 15, y 20, 64 x 48.5 of 640 x 480: 80 more from the top
    assert box == "[0.02, 0.16, 0.12, 0.23]"
    assert records(raw, "refcoco") == made
    assert records(raw, "refcoco", seed=1) != made
    assert len(records(raw, "refcoco", refs=("refcoco",))) == 2 * 2


def test_visual_genome_draws_ten(raw):
    made = records(raw, "visual_genome")
    assert [r["image"] for r in made[:2]] == ["vg/VG_100K/1.jpg", "vg/VG_100K_2/2.jpg"]
    for record in made:
        said, described = regions(record)
        assert len(said) == 10
        assert len(set(said)) == 10
        assert 0 < described < 10
    texts = dict(regions(made[0])[0])
    (name, box) = next(iter(texts.items()))
    at = 10 * int(name.split()[1])
    assert read_box(box) == tuple(
        round(v, 2) for v in (at / 800, 105 / 800, (at + 80) / 800, 165 / 800)
    )


def test_scienceqa_is_qcm_lea(raw):
    made = records(raw, "scienceqa")
    assert len(made) == 6
    assert made[0] == {
        "id": "0",
        "conversations": [
            {
                "from": "human",
                "value": "Which is 0?\nContext: Look at it.\nOptions: (A) one (B) two (C) three",
            },
            {"from": "gpt", "value": "It is 0. The answer is A."},
        ],
    }
    assert made[1]["image"] == "1/image.png"
    assert turns(made[1]) == [
        "Which is 1?\nContext: N/A\nOptions: (A) one (B) two (C) three\n<image>",
        "Numbers\ncount. It is 1. The answer is B.",
    ]
    assert [r["id"] for r in records(raw, "scienceqa", split="test")] == ["6"]


def test_llava_instruct_gets_its_folder(raw):
    made = records(raw, "llava_instruct")
    assert made[2]["image"] == "coco/train2017/000000000002.jpg"
    assert turns(made[2]) == ["<image>\nWhat is this?", "Number 2."]


def test_sharegpt_keeps_whole_conversations(raw):
    source = find_source("sharegpt")(folder=raw / "sharegpt")
    made = list(named(source))
    assert [r["id"] for r in made] == ["abc0_0", "abc1_0", "abc2_0"]
    assert turns(made[0]) == ["Hi", "Hello 0"]
    assert source.skipped == {"later part of a conversation": 3}


def test_published_files_are_read_as_they_are(tmp_path):
    owners.llava(tmp_path / "llava_v1_5_mix665k.json", 3)
    owners.llava(tmp_path / "blip_laion_cc_sbu_558k.json", 3)
    for name in ("mix665k", "lcs558k"):
        made = list(named(find_source(name)(folder=tmp_path)))
        assert [r["image"] for r in made] == [f"{n:012d}.jpg" for n in range(3)]


def test_real_questions_of_the_benchmarks(benchmarks, tmp_path):
    for name, target in zip(("questions", "annotations"), owners.VQAV2):
        text = (benchmarks / "vqav2" / f"{name}.json").read_text()
        (tmp_path / target).write_text(text)
    made = list(named(find_source("vqav2")(folder=tmp_path)))
    given = json.loads((tmp_path / owners.VQAV2[1]).read_text())["annotations"]
    assert sum(len(turns(r)) // 2 for r in made) == len(given)
    assert turns(made[0])[:2] == [f"<image>\nWhere is he looking?\n{SHORT}", "Down"]
    questions = (benchmarks / "gqa" / "questions.json").read_text()
    (tmp_path / "train_balanced_questions.json").write_text(questions)
    made = list(named(find_source("gqa")(folder=tmp_path)))
    assert sum(len(turns(r)) // 2 for r in made) == len(json.loads(questions))
    assert turns(made[0])[:2] == [f"<image>\nIs it overcast?\n{SHORT}", "No"]


def test_files_that_are_not_of_the_owner(raw, tmp_path):
    with pytest.raises(SampleError, match="vqav2: no such file .*visualqa.org"):
        records(tmp_path, "vqav2")
    owners.write_list(tmp_path / "aokvqa" / "aokvqa_v1p0_train.json", [{"image_id": 1}])
    with pytest.raises(SampleError) as info:
        records(tmp_path, "aokvqa")
    assert str(info.value).startswith(
        "aokvqa: aokvqa_v1p0_train.json[image_id 1] is not in the owner's form: no 'choices'"
    )


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "refs.p"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(SampleError, match="builtins.print does not belong in a refs file"):
        read_refs(path)


@pytest.mark.parametrize(
    ("name", "file", "old", "new", "said"),
    [
        ("vqav2", 0, '"question": "What is 1?"', '"question": null', "a question is None, not a text"),
        ("vqav2", 1, '"question_id": 6', '"question_id": 0', "question_id 0 has two annotations"),
        ("vqav2", 0, '"question_id": 6', '"question_id": 0', "question_id 0 is there twice"),
        ("vqav2", 0, '"question": "', '"question": "", "question": "', "'question' is duplicated"),
        ("vqav2", 1, '"question_id": 0', '"question_id": 99', "no question with question_id 99"),
        ("vqav2", 1, '"multiple_choice_answer": "', '"multiple_choice_answer": 1, "x": "', "an answer is 1"),
        ("vqav2", 1, '"image_id": ', '"image_id": "a", "x": ',
         r"annotations.json\[image_id 'a'\] is not in the owner's form: image = .* does not take 'a'"),
        ("scienceqa", 0, '"answer": 0', '"answer": -1', "answer is -1 of"),
        ("scienceqa", 0, '"answer": 0', '"answer": 9', "answer is 9 of"),
    ],
)  # fmt: skip
def test_what_an_owners_file_does_wrong_is_named(raw, tmp_path, name, file, old, new, said):
    folder = shutil.copytree(raw / name, tmp_path / name)
    path = folder / list(find_source(name).files.values())[file].path
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(SampleError, match=said):
        records(tmp_path, name)


def test_gqa_with_a_key_twice_and_questions_nobody_answered(tmp_path):
    row = '{"imageId": "1", "question": "q?", "answer": "a"}'
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "train_balanced_questions.json").write_text(f'{{"7": {row}, "7": {row}}}')
    with pytest.raises(SampleError, match="the key '7' is duplicated"):
        records(tmp_path, "gqa")
    owners.vqa(tmp_path / "vqav2", owners.VQAV2, 2, 4)
    path = tmp_path / "vqav2" / owners.VQAV2[1]
    rows = json.loads(path.read_text())["annotations"]
    owners.write_list(path, rows[:-1], "annotations")
    source = find_source("vqav2")(folder=tmp_path / "vqav2")
    assert len(list(named(source))) == 2
    assert source.skipped == {"question without annotation": 1}


def test_the_place_of_a_picture_is_written_before_each_of_its_paths():
    assert placed("mine/{}", ["a.jpg", "b.jpg"]) == ["mine/a.jpg", "mine/b.jpg"]
    for bad in ("https://a.org/b.jpg", "data:image/png;base64,AA", "/a.jpg", "../a.jpg"):
        with pytest.raises(SampleError):
            placed("mine/{}", bad)
