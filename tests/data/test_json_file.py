"""Records are found by their places in the file: equal to reading it whole, with little of it in memory."""

import json

import pytest

from llava_jax.data import json_file
from llava_jax.data.json_file import JsonFile, read_records
from llava_jax.data.scan import scan
from llava_jax.data.settings import DataFile, DataSettings
from llava_jax.errors import SampleError
from llava_jax.util import Doubled


def rows(count: int, text: str) -> list[dict]:
    turns = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": text * 3}]
    return [{"id": str(i), "conversations": turns * (1 + i % 5)} for i in range(count)]


FORMS = {
    "list": lambda r, **k: json.dumps(r, **k),
    "indented": lambda r, **k: "\n " + json.dumps(r, indent=1, **k) + "\n\n",
    "lines": lambda r, **k: "\n".join(json.dumps(x, **k) for x in r) + "\r\n",
    "objects": lambda r, **k: "".join(json.dumps(x, **k) for x in r),
}


@pytest.mark.parametrize("window", [7, 100, 2**20])
@pytest.mark.parametrize(
    "text", ["a plain answer", "größe \u2028 東京 🙂"], ids=["ascii", "not ascii"]
)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "mark"])
def test_records_are_those_of_the_whole_file(tmp_path, monkeypatch, window, text, form, mark):
    monkeypatch.setattr(json_file, "WINDOW", window)
    path, expected = tmp_path / "a.json", rows(23, text)
    path.write_text(mark + FORMS[form](expected, ensure_ascii=False), encoding="utf-8", newline="")
    found = JsonFile(path)
    assert list(found.scan()) == expected
    assert list(found) == found[:] == expected == read_records(path)
    assert found[-1] == expected[-1]
    assert found[3:5] == expected[3:5]


@pytest.mark.parametrize("value", ["1.5", "-2e-3", "1E+5", "NaN", "-Infinity", "null"])
@pytest.mark.parametrize("form", ['[{"a": 1}, %s, {"b": 2}]', '{"a": 1}\n%s\n{"b": 2}'])
def test_a_number_is_no_record_wherever_the_window_ends(tmp_path, monkeypatch, value, form):
    path = tmp_path / "a.json"
    path.write_text(form % value)
    for window in range(1, 24):
        monkeypatch.setattr(json_file, "WINDOW", window)
        found = JsonFile(path)
        assert repr(list(found.scan())) == repr(read_records(path)) == repr(found[:])


def test_a_doubled_key_is_seen_in_its_record_alone(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[{"id": 1, "image": "a"}, {"id": 2, "image": "b", "image": "c"}]')
    first, second = JsonFile(path).scan()
    assert not isinstance(first, Doubled)
    assert isinstance(second, Doubled)
    assert second.key == "image"


@pytest.mark.parametrize(
    "text", ['[{"id": 1}, {"id": 2}', '[{"id": 1},]', '[{"id": 1} {"id": 2}]', '[{"id": 1}] 3']
)
def test_a_mistake_further_on_is_the_error_of_the_whole_file(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(SampleError) as whole:
        read_records(path)
    with pytest.raises(SampleError) as found:
        list(JsonFile(path).scan())
    assert str(found.value) == str(whole.value)


def test_a_file_that_changes_while_it_is_used_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows(5, "x")))
    found = JsonFile(path)
    list(found.scan())
    path.write_text("[]")
    with pytest.raises(SampleError, match=r"a\.json: the file changed since it was read"):
        found[3]


def test_an_address_is_read_once(monkeypatch):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe("/json/a.json", json.dumps(rows(4, "x")).encode())
    found = JsonFile("memory://json/a.json")
    assert list(found.scan()) == rows(4, "x")
    store.rm("/json/a.json")
    assert found[2] == rows(4, "x")[2]


def test_files_are_read_once_until_they_change(tmp_path):
    path = tmp_path / "a.json"
    files = [DataFile(str(path), "", 1.0)]
    path.write_text(json.dumps(rows(4, "x")))
    first = scan(files, DataSettings())
    assert scan(files, DataSettings()) is first
    path.write_text(json.dumps(rows(5, "x")))
    assert scan(files, DataSettings()).total == 5
