"""Bad samples: counted once, grouped by reason, listed."""

import json
import logging

import pytest

from llava_jax.data.bad import BadSamples, TooManyBad, bad_sample


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_bad_samples_are_counted_once_and_reported(tmp_path):
    path = tmp_path / "bad.jsonl"
    bad = BadSamples(strict=False, limit=2, report=path)
    bad.begin([])
    for index, name in ((3, "c"), (3, "c"), (1, "a")):
        bad.add(bad_sample(index, name, "broken"))
    assert [r["id"] for r in bad.rows()] == ["a", "c"]
    assert [r["id"] for r in rows_of(path)] == ["c", "a"]
    with pytest.raises(TooManyBad, match=r"3 samples are bad, more than .*: broken \(3: c, a, e\)"):
        bad.add(bad_sample(5, "e", "broken"))


def test_an_earlier_report_does_not_count(tmp_path):
    """What it lists may be mended since, or be of other data."""
    path = tmp_path / "bad.jsonl"
    path.write_text('{"index": 7, "id": "x", "reason": "broken"}\n')
    bad = BadSamples(strict=False, limit=1, report=path)
    bad.begin([bad_sample(1, "a", "missing")])
    row = {"index": 1, "id": "a", "reason": "missing", "kind": "missing"}
    assert rows_of(path) == bad.rows() == [row]


def test_one_of_several_processes_lists_what_all_of_them_find(tmp_path, caplog):
    paths = [tmp_path / name for name in ("bad.jsonl", "bad.jsonl.1")]
    for i, path in enumerate(paths):
        bad = BadSamples(strict=False, limit=3, report=path)
        bad.begin([bad_sample(1, "a", "missing")], say=i == 0)
        bad.add(bad_sample(4 + i, f"d{i}", "broken"))
        assert len(bad) == 2
    assert [[r["id"] for r in rows_of(path)] for path in paths] == [["a", "d0"], ["d1"]]
    assert sum("left out: missing" in line for line in caplog.messages) == 1


def test_one_line_for_each_kind_of_reason(tmp_path, caplog):
    bad = BadSamples(strict=False, limit=999, report=tmp_path / "bad.jsonl")
    turn = "turn {} is from {!r}, not human or gpt"
    found = [bad_sample(i, f"s{i}", turn.format(i % 4, f"bot{i}")) for i in range(200)]
    with caplog.at_level(logging.WARNING):
        bad.begin([*found, bad_sample(900, "t", "no list of conversations")])
        for i in range(300, 400):
            bad.add(bad_sample(i, f"s{i}", "x: the data is damaged", kind="the data is damaged"))
    lines = caplog.messages
    kind = "turn _ is from _, not human or gpt"
    assert lines[0].startswith(f"200 samples are left out: {kind} (s0, s1, s2, s3, s4, ...); all")
    assert lines[1].startswith("1 sample is left out: no list of conversations (t); all")
    assert len(lines) == 2 + 6
    assert len(rows_of(tmp_path / "bad.jsonl")) == 301
    assert bad.kinds()["the data is damaged"] == 100


def test_the_fix_of_the_most_frequent_kind_is_told():
    bad = BadSamples(strict=False, limit=1)
    fix = "rename the key `images` to `image`"
    with pytest.raises(TooManyBad) as e:
        bad.begin([bad_sample(i, str(i), "under `images`", fix=fix) for i in range(3)])
    assert e.value.fix == f"{fix}, or raise data.bad_limit"


def test_where_all_are_bad_no_limit_helps():
    bad = BadSamples(strict=False, limit=3, total=3)
    bad.begin([bad_sample(0, "a", "broken"), bad_sample(1, "b", "broken")])
    bad.add(bad_sample(1, "b", "broken"))
    with pytest.raises(TooManyBad, match=r"^every sample is bad: broken \(3: a, b, c\)"):
        bad.add(bad_sample(2, "c", "broken"))


def test_strict_stops_at_the_first():
    with pytest.raises(TooManyBad, match=r"sample c: broken .*goes on without it"):
        BadSamples(strict=True, limit=9).add(bad_sample(3, "c", "broken"))
