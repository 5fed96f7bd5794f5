"""Reading LLaVA files: what is wrong is named by file, index and id."""

import json

import numpy as np
import pytest

from llava_jax.data.json_file import read_records
from llava_jax.data.records import check_record
from llava_jax.data.scan import scan
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.errors import SampleError
from llava_jax.text.records import image_paths, record_id

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a cat"}]


def test_json_and_json_lines(tmp_path):
    rows = [{"id": "a", "conversations": TURNS}, {"id": "b", "conversations": TURNS}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "b.jsonl") == rows
    names = ("a.json", "b.jsonl", "none.json")
    files = [DataFile(str(tmp_path / n), "", float(n != "none.json")) for n in names]
    found = scan(files, DataSettings())
    assert list(found.records(np.arange(4))) == rows * 2
    assert found.file.tolist() == [0, 0, 1, 1]


RECORD = {"id": "\u2028", "image": "a.png", "conversations": TURNS}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.txt"])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_are_read_by_content(tmp_path, name, indent, encoding):
    one = json.dumps(RECORD, ensure_ascii=False, indent=indent)
    for text, count in ((f"[{one}, {one}]", 2), (f"{one}\r\n\r\n{one}\n", 2), (one, 1)):
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert read_records(tmp_path / name) == [RECORD] * count


def test_a_key_that_is_twice_in_a_record_is_named(tmp_path):
    text = json.dumps([RECORD])
    for old, new, key in (
        ('"image"', '"image": "b.png", "image"', "image"),
        ('"value": "a cat"', '"value": "a dog", "value": "a cat"', "value"),
    ):
        (tmp_path / "a.json").write_text(text.replace(old, new))
        (record,) = read_records(tmp_path / "a.json")
        assert record == RECORD
        with pytest.raises(SampleError, match=f"the key '{key}' is duplicated"):
            check_record(record, "a.json[0]")
    quoting = {**RECORD, "conversations": [TURNS[0], {"from": "gpt", "value": 'the "image" key'}]}
    (tmp_path / "a.json").write_text(json.dumps([quoting]))
    check_record(read_records(tmp_path / "a.json")[0], "a.json[0]")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": ["a.jpg"]}, "the picture is under `images`, not `image`"),
        ({"Image": "a.jpg"}, "under `Image`"),
        ({"image": None, "image_path": "x/7"}, "under `image_path`"),
        ({"img": "a.jpg"}, "under `img`"),
        ({"images": [{"bytes": "...", "path": "a.jpg"}]}, "under `images`"),
        ({"video": "a.mp4"}, "under `video`"),
        ({"file": "coco/a.jpg"}, "under `file`"),
        ({"image": "https://a.org/b.jpg?c=1"}, "https://a.org/b.jpg.*: addresses are not fetched"),
        ({"image": ["a.jpg", "s3://bucket/b.jpg"]}, "s3://bucket/b.jpg: addresses are not fetched"),
        (
            {"image": "data:image/png;base64,AAAA" + "A" * 999},
            r"data:image/png.{,30} is not a path",
        ),
    ],
)
def test_pictures_that_would_be_passed_over(more, message):
    with pytest.raises(SampleError, match=f"sample f\\[3\\] .*{message}"):
        check_record({"id": "r", "conversations": TURNS, **more}, "f[3]")


def test_other_keys_are_left_alone():
    text = [{"from": "human", "value": "what?"}, TURNS[1]]
    for more in ({"images": []}, {"images": None}, {"source": "a.jpg"}, {"n_images": 3}):
        check_record({"id": "r", "conversations": text, **more}, "f[3]")
    check_record({"image": "a.jpg", "images": ["a.jpg"], "conversations": TURNS}, "f[3]")
    check_record({"source": "a.html", "conversations": TURNS}, "f[3]")  # a page with <image> in it


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "no list of conversations, but `messages` .*llava-jax data build"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "`content` .*llava-jax data build"),
        ({"conversations": [{"from": "gpt", "value": "a\ud800"}]}, "half of a surrogate pair"),
    ],
)
def test_other_spellings_are_named(record, message):
    with pytest.raises(SampleError, match=message):
        check_record(record, "f[0]")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "[{", r"a\.json: not JSON at line 1, column 3"),
        ("a.json", '{"id": 1}', "expected a list of samples, found one object"),
        ("a.json", '{"data": []}', "found an object with a list under 'data'"),
        ("a.json", "3", "expected a list of samples, found 3"),
        ("a.json", '[{"id": 1}', r"column 11 .*the file ends too early"),
        ("a.jsonl", "[{}]\n[{}]", "there are several lists"),
        ("a.json", "[" + "9" * 5000 + "]", r"a\.json: line 1: a number cannot be read"),
        ("a.json", "[]", "no samples"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.jsonl", "{}\n{", r"a\.jsonl: line 2: not JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(SampleError, match=message):
        scan([DataFile(str(tmp_path / name), "", 1.0)], DataSettings())


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(SampleError, match="no such data file"):
        read_records(tmp_path / "none.json")
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SampleError, match="UTF-8"):
        read_records(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], r"sample f\[3\]: no list of conversations"),
        ({"id": "9"}, r"sample f\[3\] \(id '9'\): no list of conversations"),
        ({"conversations": []}, "conversation is empty"),
        ({"conversations": ["hello"]}, "turn 0 has no text"),
        ({"conversations": [{"from": "human"}]}, "turn 0 has no text"),
        ({"conversations": [*TURNS, {"from": "bing", "value": ""}]}, "turn 2 is from 'bing'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 0 has no text"),
        ({"image": 5, "conversations": TURNS}, "is neither a path"),
        ({"image": ["a.png", 5], "conversations": TURNS}, "is neither a path"),
        ({"image": "/etc/a.png", "conversations": TURNS}, "leaves the image folder"),
        ({"image": "a/../../b.png", "conversations": TURNS}, "leaves the image folder"),
    ],
)
def test_malformed_records(record, message):
    with pytest.raises(SampleError, match=message):
        check_record(record, "f[3]")


def test_good_records():
    for image in (None, "", "a/b.png", ["a.png", "b.png"]):
        check_record({"image": image, "conversations": TURNS}, "f[0]")
    assert image_paths({"image": "a"}) == ("a",)
    assert image_paths({"image": ["a", "b"]}) == ("a", "b")
    assert image_paths({}) == ()
    assert [record_id(r, 4) for r in ({"id": 0}, {"id": ""}, {})] == ["0", "4", "4"]
