"""The steps of several processes: what one of them fails to make counts for none."""

import json
import time
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from llava_jax.data.account import COUNTS
from llava_jax.errors import SampleError
from llava_jax.train import steps
from llava_jax.train.log import NoLog
from llava_jax.train.steps import Feed, Saver, kept_rows


class Fake:
    """A loader of 4 samples a step; raises at step `fails`."""

    def __init__(self, fails=None):
        self.step, self.given, self.fails = 0, 0, fails

    def __next__(self):
        if self.step + 1 == self.fails:
            raise SampleError("too many")
        self.step, self.given = self.step + 1, self.given + 4
        return {}, {"samples": 4, "tokens": 9}

    def blank(self):
        self.step += 1
        return {}

    def counted(self):
        return self.step, {"counts": dict.fromkeys(COUNTS, self.given), "notes": {}, "noted": {}}

    def get_state(self):
        return {"step": self.step, "bad": [], **self.counted()[1]}

    def take_bad(self, rows):
        pass


@pytest.mark.parametrize("fails", [None, 3])
def test_a_step_that_did_not_count_is_not_given(monkeypatch, fails):
    """The process that fails at step 3, and the others, which learn of it two steps later."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(steps, "gather", lambda own: [own])
    feed = Feed(Fake(fails))
    for _ in range(4):
        feed.next()
    assert (feed.error is not None) == (fails is not None)
    state = feed.state(2)
    assert state["step"] == 2
    assert state["counts"]["given"] == 8
    if not fails:
        assert feed.state(4)["counts"]["given"] == 16


def test_a_save_is_due_by_the_clock_and_each_step_saved_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saved: list[int] = []
    checkpoints: Any = SimpleNamespace(
        begin=lambda step, *_: saved.append(step),
        settle=lambda: True,
        **{"failed": False, "writing": False, "lost": False},
    )
    feed: Any = SimpleNamespace(state=lambda step: {})
    saver, never = (Saver(checkpoints, NoLog(), minutes, saved=2) for minutes in (1.0, 0.0))

    def late(one: Saver) -> bool:
        return one.flags(stop=False, failed=False).save

    assert not late(saver)
    now[0] = 61.0
    assert late(saver)
    assert not late(never)
    for step in (2, 3, 3):
        saver.save(step, feed, feed, {"loss": 0.5})
    assert saved == [3]
    assert not late(saver)


def test_a_packed_run_goes_on_in_its_own_rows_where_no_number_is_set(tmp_path):
    """Of the newest checkpoint that can be read; the number is else chosen for the devices of today."""

    def rows(pack="fill", pack_rows=0):
        data = SimpleNamespace(pack=pack, pack_rows=pack_rows)
        return kept_rows(SimpleNamespace(data=data), tmp_path)

    assert rows() == {}
    for step, text in {
        "9": json.dumps({"data": {"data": {"pack_rows": 24}}}),
        "10": json.dumps({"data": {"data": {"pack_rows": 32}}}),
        "11": "{torn",
        "12.damaged": json.dumps({"data": {"data": {"pack_rows": 1}}}),
    }.items():
        (tmp_path / step).mkdir()
        (tmp_path / step / "run.json").write_text(text)
    assert rows() == {"pack_rows": 32}
    assert rows(pack_rows=8) == rows(pack="exact") == rows(pack="") == {}
    (tmp_path / "11" / "run.json").write_text('{"data": []}')
    assert rows() == {}
