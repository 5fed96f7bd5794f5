"""The frame of the benchmarks: names, turns, and what is written. Not what they measure."""

import argparse
import importlib
import json
import os

import pytest

from bench import frame
from bench.__main__ import ENTRIES, main


class Counting:
    """A system that says how often it was asked."""

    def __init__(self, args: argparse.Namespace):
        self.step, self.count = args.step, 0

    def run(self, more: int) -> int:
        self.count += self.step * more
        return self.count


def test_list_and_unknown_name(capsys):
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ENTRIES)
    assert main(["decoed"]) == 2
    assert "decoed" in capsys.readouterr().err


def test_each_of_several_results_has_a_file(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("bench.infer.main", lambda name, words: seen.append((name, words)) or 0)
    assert main(["prefill", "decode", "--out=x.json"]) == 2
    assert "--out-dir has a file of each" in capsys.readouterr().err
    assert main(["prefill", "decode", "--repeats", "5", "--out-dir", "d"]) == 0
    assert main(["decode", "--out", "x.json"]) == 0
    several = [(n, ["--repeats", "5", "--out", f"d/{n}.json"]) for n in ("prefill", "decode")]
    assert seen == [*several, ("decode", ["--out", "x.json"])]


@pytest.mark.parametrize("name", ENTRIES)
def test_every_benchmark_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        importlib.import_module(ENTRIES[name][0]).main(name, ["--help"])
    assert end.value.code == 0
    assert "--repeats" in capsys.readouterr().out


def test_systems_take_turns_and_the_result_is_written(tmp_path, capsys):
    args = argparse.Namespace(threads=0, step=3, out=tmp_path / "new" / "result.json")
    kinds = {"a": "tests.test_bench:Counting", "b": "tests.test_bench:Counting"}
    with frame.Systems(kinds, args) as systems:
        found = systems.take_turns(4, "run", 1)
        assert systems.each("run", 0) == {"a": 12, "b": 12}
    rows = frame.compared("a turn", found)
    assert [row[:2] for row in rows] == [["a turn", "a"], ["a turn", "b"]]
    frame.show(frame.COMPARED, rows)
    assert capsys.readouterr().out.count("\n") == 4
    frame.record("turns", args, times=found)
    kept = json.loads(args.out.read_text())
    assert len(kept["times"]["a"]["cpu_seconds"]["all"]) == 4
    assert {"commit", "date", "machine", "load", "versions", "settings"} <= kept.keys()


def test_pinning_is_undone_for_nobody_else():
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    assert frame.pin(0)["PYTHONPATH"].startswith(str(frame.ROOT))
    assert not before or os.sched_getaffinity(0) == before
