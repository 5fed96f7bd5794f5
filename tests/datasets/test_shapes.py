"""Records of other programs: messages, ShareGPT, parquet, with pictures inside or beside."""

import io
import json

import pytest
from PIL import Image

from llava_jax.data.json_file import JsonFile
from llava_jax.data.records import check_record
from llava_jax.datasets.build import build
from llava_jax.datasets.recipe import read_recipe
from llava_jax.datasets.shapes import to_ours
from llava_jax.errors import ConfigError, SampleError

OURS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def test_messages_with_parts():
    content = [{"type": "image", "path": "a.jpg"}, {"type": "text", "text": "What?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}
    row = {"id": 7, "messages": [{"role": "user", "content": content}, answer]}
    assert to_ours(row, 0) == {"id": "7", "image": "a.jpg", "conversations": OURS}


def test_pictures_keep_their_places():
    content = [
        {"type": "text", "text": "Compare "},
        {"type": "image"},
        {"type": "text", "text": "with "},
        {"type": "image_url", "image_url": {"url": "b.jpg"}},
    ]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Same."}]
    with pytest.raises(SampleError, match="2 image parts in its turns, 1 of them with a picture"):
        to_ours({"messages": messages, "images": ["a.jpg", "b.jpg"]}, 0)
    with pytest.raises(SampleError, match="2 image parts"):  # not a record without its picture
        to_ours({"messages": messages}, 0)
    content[1]["image"] = "a.jpg"
    made = to_ours({"messages": messages}, 3)
    assert made["id"] == "3"
    assert made["image"] == ["a.jpg", "b.jpg"]
    assert made["conversations"][0]["value"] == "Compare <image>\nwith <image>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": OURS, "image": "a.jpg"},
        {"conversations": OURS, "images": ["a.jpg"]},
        {"conversations": [{**OURS[0], "from": "user"}, {**OURS[1], "from": "chatgpt"}], "image": "a.jpg"},
        {"messages": [{"role": "user", "content": "What?"}, {"role": "model", "content": "A cat."}], "image": {"path": "a.jpg", "bytes": None}},
        {"messages": json.dumps([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]), "image": "a.jpg"},
    ],
)  # fmt: skip
def test_ours_sharegpt_and_others_are_one(row):
    assert to_ours(row, 1) == {"id": "1", "image": "a.jpg", "conversations": OURS}


def test_a_system_text_goes_before_the_first_question():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hi."},
    ]
    made = to_ours({"messages": messages}, 0)
    assert made["conversations"][0] == {"from": "human", "value": "Be brief.\nHi"}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "x"}, "no conversation under conversations or messages or conversation; its keys: text"),
        ([1], "is not a record"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "from 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "'video', which is neither"),
        ({"messages": [{"role": "user"}]}, "no text but None"),
        ({"messages": [{"role": "user", "content": "x"}], "image": {"bytes": b"1"}}, "no folder for it"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(row, said):
    with pytest.raises(SampleError) as info:
        to_ours(row, 0)
    assert said in str(info.value)


def test_parquet_with_pictures_inside(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(out, "PNG")
    rows = [
        {
            "images": [{"bytes": out.getvalue(), "path": None}],
            "messages": [
                {"role": "user", "content": "<image>What?"},
                {"role": "assistant", "content": f"{n}"},
            ],
        }
        for n in range(3)
    ]
    (tmp_path / "records").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "records" / "a.parquet")
    text = '[[set]]\nsource = "records"\npaths = ["a.parquet"]\npictures = "inside"\n'
    (tmp_path / "mine.toml").write_text(text)
    build(read_recipe(str(tmp_path / "mine.toml"), tmp_path), tmp_path / "x.json", quiet=True)
    made = json.loads((tmp_path / "x.json").read_text())
    assert [r["conversations"][1]["value"] for r in made] == ["0", "1", "2"]
    (path,) = {r["image"] for r in made}  # equal bytes are kept once
    assert (tmp_path / "records" / path).read_bytes() == out.getvalue()


def test_errors_name_file_and_row(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "a.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "mine.toml").write_text('[[set]]\nsource = "records"\npaths = ["a.jsonl"]\n')
    with pytest.raises(SampleError, match=r"a.jsonl\[0\]: no conversation under"):
        build(read_recipe(str(tmp_path / "mine.toml"), tmp_path), tmp_path / "x.json", quiet=True)
    (tmp_path / "mine.toml").write_text('[[set]]\nsource = "records"\n')
    with pytest.raises(ConfigError, match="records: paths is empty"):
        read_recipe(str(tmp_path / "mine.toml"), tmp_path)


ASK, ANSWER = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}
SYSTEM = {"role": "system", "content": "Be brief."}
PART = [{"type": "image", "path": "u.jpg"}, {"type": "text", "text": "q"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [ASK, ANSWER], "img": "a.jpg"}, "under `img`"),
        ({"messages": [ASK, ANSWER], "image_path": "a.jpg"}, "under `image_path`"),
        ({"messages": [ASK, ANSWER], "videos": ["a.mp4"]}, "under `videos`"),
        ({"messages": [{**ASK, "image": "a.jpg"}, ANSWER]}, "turn 0 has `image`"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": [{}]}]}, "turn 1 has `tool_calls`"),
        ({"messages": [ASK, ANSWER], "image": "a.jpg", "images": ["b.jpg"]}, "`image` and `images`"),
        ({"messages": [ASK, ANSWER], "images": ["b.jpg"], "video": "a"}, "`images` and `video`"),
        ({"messages": [{**ASK, "content": PART}, ANSWER], "images": ["b.jpg"]}, "1 images beside"),
        ({"messages": [{**ASK, "content": PART}, {**ANSWER, "content": "<image>"}]}, "2 tags"),
        ({"messages": [ASK, ANSWER, SYSTEM, ASK, ANSWER]}, "turn 2 is from system"),
        ({"messages": [SYSTEM, SYSTEM, ASK, ANSWER]}, "turn 1 is from system"),
        ({"messages": [SYSTEM, ASK, ANSWER], "system": "Be long."}, "two system texts"),
        ({"messages": [ASK, ANSWER], "system": ["x"]}, "system is"),
        ({"messages": [ASK, {**ANSWER, "weight": 0}]}, "turn 1: `weight` is 0"),
        ({"id": 1, "x": 0, "messages": [ASK, ANSWER], "weight": 0.5}, "`weight` is 0.5"),
        ({"messages": [ASK, ANSWER], "conversations": OURS}, "conversations and messages"),
        ({"messages": [{**ASK, "from": "gpt"}, ANSWER]}, "both `from` and `role`"),
        ({"messages": [ANSWER]}, "no turn is from a user"),
        ({"messages": [{**ASK, "content": [{"type": "text", "value": "q"}]}, ANSWER]}, "no text but None"),
        ({"messages": [{**ASK, "content": [{**PART[1], "image": "a.jpg"}]}, ANSWER]}, "under `image`"),
        ({"messages": [{**ASK, "content": [{**PART[0], "text": "q"}]}, ANSWER]}, "has the text 'q'"),
        ({"messages": [{**ASK, "content": [{**PART[0], "image": "b"}]}, ANSWER]}, "path and image"),
        ({"messages": [{**ASK, "content": [{**PART[0], "index": 1}]}, ANSWER]}, "has index 1"),
        ({"messages": [{**ASK, "content": [{"type": "image", "image_path": "b"}]}, ANSWER],
          "images": ["a"]}, "under `image_path`"),
        ({"messages": [{**ANSWER, "content": "<image>"}, ASK, ANSWER], "image": "a"}, "in an answer"),
    ],
)  # fmt: skip
def test_what_is_not_understood_whole_is_refused(row, said):
    with pytest.raises(SampleError) as info:
        to_ours(row, 0)
    assert said in str(info.value)


def test_what_has_no_place_goes_to_the_first_question_and_not_to_an_answer_before_it():
    row = {"messages": [ANSWER, ASK, {**ANSWER, "weight": 1}], "image": "a.jpg", "system": "Brief."}
    made = to_ours(row, 0)["conversations"]
    assert [t["value"] for t in made] == ["A cat.", "<image>\nBrief.\nWhat?", "A cat."]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("form", ["[%s]", "%s\n%s"])
@pytest.mark.parametrize("key", ['"image"  :"b","image"\t:', '"im\\u0061ge":"b","image":'])
def test_a_duplicated_key_is_found_by_every_reader(tmp_path, key, form, encoding):
    text = json.dumps({"image": "a.jpg", "conversations": OURS}).replace('"image":', key)
    path = tmp_path / "records" / "a.json"
    path.parent.mkdir()
    path.write_text(form.replace("%s", text), encoding=encoding)
    (tmp_path / "mine.toml").write_text('[[set]]\nsource = "records"\npaths = ["a.json"]\n')
    with pytest.raises(SampleError, match="the key 'image' is duplicated"):
        build(read_recipe(str(tmp_path / "mine.toml"), tmp_path), tmp_path / "x.json", quiet=True)
    data = JsonFile(path)
    for record in data.scan():
        with pytest.raises(SampleError, match="the key 'image' is duplicated"):
            check_record(record, "a")
    with pytest.raises(SampleError, match="the key 'image' is duplicated"):  # what is shown
        check_record(data[0], "a")
    assert json.loads(data.text(0)) == json.loads(text)
    assert data.text(0).count(b"ge") > 2  # both, for whoever reads it next
