"""Large JSON files read one value at a time."""

import json
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_jax.datasets import stream
from llava_jax.errors import SampleError
from llava_jax.util import Doubled

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("stream") / "data.json"


@settings(max_examples=40)
@given(st.lists(VALUES, max_size=6), st.integers(1, 9), st.booleans(), st.sampled_from([None, 1]))
def test_values_are_those_of_json_whatever_the_window(file, values, chunk, ascii_, indent):
    before, stream.CHUNK = stream.CHUNK, chunk
    try:
        text = json.dumps(values, ensure_ascii=ascii_, indent=indent)
        file.write_bytes(text.encode("utf-8", "backslashreplace"))
        whole = json.loads(file.read_text("utf-8"))
        assert list(stream.rows(file)) == whole
        file.write_text(json.dumps({"info": {}, "data": whole, "n": 1}))
        assert list(stream.rows(file, "data")) == whole
        file.write_text("\n".join(json.dumps({"v": v}) for v in whole))
        assert [row["v"] for row in stream.rows(file)] == whole
    finally:
        stream.CHUNK = before


@pytest.mark.parametrize("number", ["0.0", "1e5", "1E+5", "-2.5e-3", "1e-05", "12.5E2", "-0.0"])
def test_a_number_is_read_whole_wherever_the_window_ends(file, number, monkeypatch):
    file.write_text(f"[{number}, [{number}], {number}]")
    value = float(number)
    for chunk in range(1, 2 * len(number)):
        monkeypatch.setattr(stream, "CHUNK", chunk)
        assert list(stream.rows(file)) == [value, [value], value]


def test_entries_of_an_object(file):
    file.write_text('{"a": {"x": 1}, "b": [1, [2]], "c": []}')
    assert list(stream.entries(file)) == [("a", {"x": 1}), ("b", 1), ("b", [2])]
    file.write_text(json.dumps({"ü": "ß"}), encoding="utf-16")
    assert list(stream.entries(file)) == [("ü", "ß")]


def test_progress_adds_up_to_the_file(file):
    file.write_text(json.dumps(list(range(1000))))
    told = []
    assert sum(stream.rows(file, told=told.append)) == 499_500
    assert sum(told) == file.stat().st_size


def test_doubled_keys_are_seen(file):
    file.write_text('[{"image": "a", "image": "b"}]')
    (row,) = stream.rows(file, doubled=True)
    assert isinstance(row, Doubled)
    assert row.key == "image"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1, 2", "line 1 (the file ends too early"),
        ('{"a": [],\n "177', "line 2 (the file ends too early"),
        ('[{"a": 1},\n{"a": }]', "not JSON at line 2"),
        ("[1] [2]", "not JSON at line 1"),
        ('[1,\n2 "x"]', "not JSON at line 2"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        (b'["\xff"]', "cannot be read as UTF-8"),
    ],
)
def test_what_is_not_json(file, text, said):
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SampleError) as info:
        list(stream.rows(file))
    assert said in str(info.value)
    assert str(file) in str(info.value)


def test_what_is_not_there(file, tmp_path):
    with pytest.raises(SampleError, match="no such data file"):
        list(stream.rows(tmp_path / "x.json"))
    file.write_text('{"a": 1}')
    with pytest.raises(SampleError, match="no list under 'data'"):
        list(stream.rows(file, "data"))
    file.write_text('{"data": [1]}\n{"data": [2]}')  # what was appended would be passed over
    for read in (partial(stream.rows, key="data"), stream.entries):
        with pytest.raises(SampleError, match="not JSON at line 2"):
            list(read(file))
