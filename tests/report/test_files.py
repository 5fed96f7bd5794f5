"""JSON lines that a kill, a full disk or somebody else left in a state that a run did not write."""

import json

from llava_jax.report.files import keep_until, read_rows


def line(step):
    return json.dumps({"step": step}) + "\n"


def test_a_bad_line_costs_itself_alone_and_is_set_aside(tmp_path, caplog):
    path = tmp_path / "eval.jsonl"
    foreign = ['{"step": 2, "lo\n', '{"hello": 1}\n', "\0\0\n"]
    path.write_text(line(1) + foreign[0] + line(3) + foreign[1] + foreign[2] + line(4) + line(9))
    assert [r.get("step") for r in read_rows(path)] == [1, 3, None, 4, 9]
    assert "line 2 (and 1 more) cannot be read" in caplog.text
    assert [r["step"] for r in keep_until(path, 4)] == [1, 3, 4]
    assert path.read_text() == line(1) + line(3) + line(4)
    assert (tmp_path / "eval.jsonl.damaged").read_text() == "".join(foreign)
    assert "eval.jsonl: line 2 (and 2 more) is no row of a run" in caplog.text


def test_only_a_torn_last_line_is_dropped_without_a_word(tmp_path, caplog):
    path = tmp_path / "eval.jsonl"
    path.write_text(line(1) + line(2) + '{"step": 3, "l')
    assert [r["step"] for r in read_rows(path)] == [1, 2]
    assert [r["step"] for r in keep_until(path, 9, known={2})] == [2]
    assert path.read_text() == line(2)
    assert not caplog.records
    assert [p.name for p in tmp_path.iterdir()] == ["eval.jsonl"]
