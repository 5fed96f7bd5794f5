"""Values of JSON files by content: separators, encodings, lists, lines, doubled keys."""

import json
import os

import pytest

from llava_jax.errors import LlavaError, SampleError
from llava_jax.util import (
    Doubled,
    json_lines,
    need,
    parse_values,
    printable,
    read_json,
    read_object,
    read_text,
    refuse_input,
    write_json,
    write_text,
)

ROW = {"id": 1, "text": "one\u2028two\u2029three\u0085four\x0b\x0c\x1c five"}


def test_only_line_feeds_end_a_line():
    line = json.dumps(ROW, ensure_ascii=False)
    assert [json.loads(x) for _, x in json_lines(f"{line}\n\n{line}\r\n \t\n")] == [ROW, ROW]
    assert [n for n, _ in json_lines("1\n\n2\n")] == [1, 3]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n \t\n", ""])
def test_lists_lines_and_objects_after_each_other(indent, end):
    one = json.dumps(ROW, ensure_ascii=False, indent=indent)
    assert parse_values(f"{one}{end}", "f") == [ROW]
    assert parse_values(f"{one}{end}{one}{end}", "f") == [ROW, ROW]
    assert parse_values(f"[{one},{end}{one}]{end}", "f") == [[ROW, ROW]]
    assert parse_values("", "f") == parse_values(" \n\r\n", "f") == []


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_unicode_encodings(tmp_path, encoding):
    path = tmp_path / "x.json"
    path.write_bytes(json.dumps(ROW, ensure_ascii=False).encode(encoding))
    assert parse_values(read_text(path), path) == [ROW]


def test_what_is_no_text_is_named(tmp_path):
    for data, what in (
        (b"\x1f\x8b\x08\x00abc\xff", "x is a gzip file, not UTF-8 or UTF-16 text"),
        (b"PAR1\xff\xfe", "x is a parquet file"),
        (b'{"a": "caf\xe9"}', "byte 10 cannot be read as UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "x is a Git LFS pointer"),
    ):
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(SampleError) as e:
            read_text(tmp_path / "x")
        assert what.replace("x is", "is") in str(e.value)
        assert str(tmp_path / "x") in str(e.value)
    with pytest.raises(SampleError, match="this is a folder"):
        read_text(tmp_path)
    with pytest.raises(SampleError, match=r"cannot be read \(No such file"):
        read_text(tmp_path / "none")


def test_errors_say_where(tmp_path):
    for text, where in (
        ("[1,\n 2,, 3]", "f: not JSON at line 2, column 4"),
        ('{"a": 1}\n{"b": }\n', "f: line 2: not JSON at line 2, column 7"),
        ('[{"a": 1},\n {"b"', r"the file ends too early"),
        ("[" * 99999, "nested too deeply"),
        ("1\n" + "9" * 5000, "f: line 2: a number cannot be read"),
    ):
        with pytest.raises(SampleError) as e:
            parse_values(text, "f")
        assert where in str(e.value)


def test_doubled_keys_are_found():
    (plain,) = parse_values('{"a": {"b": 1, "c": 2, "b": 3}}', "f")
    (value,) = parse_values('{"a": {"b": 1, "c": 2, "b": 3}}', "f", doubled=True)
    assert plain == value == {"a": {"b": 3, "c": 2}}
    assert isinstance(value["a"], Doubled)
    assert value["a"].key == "b"
    assert not isinstance(value, Doubled)


def test_control_characters_are_shown():
    assert printable("a\x1b[31mb\x07\n\tц 猫\u3000") == "a\\x1b[31mb\\x07\n\tц 猫\u3000"
    assert printable("a\nb\u2028\u202e", keep="") == "a\\nb\\u2028\\u202e"


def test_one_value_a_file(tmp_path):
    path = tmp_path / "f.json"
    path.write_text("\ufeff[1, 2]", encoding="utf-8")
    assert read_json(path) == [1, 2]
    with pytest.raises(SampleError, match=r"f\.json: expected a JSON object, found list"):
        read_object(path, SampleError)
    for content, message in (("{} {}", "several values"), ("", "no JSON value"), ("{", "not JSON")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(SampleError, match=rf"f\.json.*{message}"):
            read_json(path, SampleError)


def test_missing_library(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(LlavaError, match=r"pip install 'llava_jax\[eval\]'"):
        need("openpyxl", "to read .xlsx files", "llava_jax[eval]")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as error:
        write_text(tmp_path / "folder", "x")
    assert error.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as error:
        write_text(tmp_path / "none/x", "x")
    assert error.value.filename == str(tmp_path / "none/x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_link_and_a_pipe_are_written_through(tmp_path):
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    read, write = os.pipe()
    write_text(f"/dev/fd/{write}", "piped")
    assert os.read(read, 9) == b"piped"


def test_half_a_pair_of_surrogates_survives(tmp_path):
    value = {"\ud800": "é \udfff", "pair": "🙂"}
    write_json(tmp_path / "x", value, ensure_ascii=False)
    assert read_json(tmp_path / "x") == value
    write_text(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == r"\ud800"


def test_an_output_is_no_input(tmp_path):
    (tmp_path / "in").mkdir()
    file = tmp_path / "in/file"
    file.write_text("")
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "hard").hardlink_to(file)
    for out, given in [
        (file, file), ("link", file), (file, "link"), ("hard", file),
        (file, "in"), ("link", "in"), ("in", file), ("in", "in"),
    ]:  # fmt: skip
        with pytest.raises(SampleError, match="input"):
            refuse_input(tmp_path / out, [None, tmp_path / "none", tmp_path / given], SampleError)
    refuse_input(tmp_path / "in/new", [tmp_path / "in", file])
    refuse_input(tmp_path / "new", [tmp_path / "in", file, None, "~nobody-of-that-name"])
