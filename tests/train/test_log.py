"""The log of a run: rates without the compile and without saves, plain lines, the smoothed curve."""

import time

import numpy as np
import pytest

from llava_jax.report.figure import smooth
from llava_jax.report.files import SYSTEM
from llava_jax.train.log import METRICS, RunLog, read_metrics, status
from llava_jax.train.meter import Compiling, Meter


def row(step, loss=2.0):
    return {
        "step": step,
        "loss": loss,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 100,
        "samples": 4,
        "ok": True,
    }


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def tick(self, seconds):
            self.now += seconds

    found = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: found.now)
    monkeypatch.setattr(time, "monotonic", lambda: found.now)
    return found


def test_a_save_is_not_in_the_time_of_a_step(tmp_path, clock):
    log = RunLog(tmp_path, start=0, total=3, name="run", quiet=True)
    clock.tick(50)  # compiles
    log.step(row(1))
    clock.tick(2)
    log.step(row(2))
    with log.aside("save"):
        clock.tick(30)
    clock.tick(2)
    log.step(row(3))
    log.close()
    rows = read_metrics(tmp_path / METRICS)
    assert [r["seconds"] for r in rows] == [50, 2, 2]
    assert [r.get("save_seconds") for r in rows] == [None, None, 30]
    assert log._rate["seconds"] == pytest.approx(2.0)


def test_compiling_is_in_no_rate(tmp_path, clock, monkeypatch):
    """A row is read when the next step was begun: what that compiled is in the time of either."""
    log = RunLog(tmp_path, start=0, total=9, name="run", quiet=True, meter=Meter(1, clock.now))
    for step in range(1, 6):
        clock.tick(10.04 if step < 3 else 0.04)
        if step == 1:
            monkeypatch.setattr(Compiling, "seconds", Compiling.seconds + 20)
        log.step({**row(step), "data_seconds": 0.01})
    log.close()
    *early, last = read_metrics(tmp_path / SYSTEM)
    assert [row["step"] for row in early] == [1, 2]
    assert {r[key] for r in early for key in ("tokens_per_second", "data")} == {None}
    assert last["tokens_per_second"] == pytest.approx(2500)
    assert last["data"] == pytest.approx(0.25)
    assert log._rate["seconds"] == pytest.approx(0.04)


def test_the_rate_is_that_of_many_steps_not_of_a_small_one(tmp_path, clock, capsys):
    log = RunLog(tmp_path, start=0, total=20, name="run")
    for step in range(1, 21):
        clock.tick(1)
        log.step({**row(step), "tokens": 1 if step == 20 else 100})  # 20: a batch of one short text
    log.close()
    assert "90 tokens/s" in capsys.readouterr().err.splitlines()[-1]


def test_plain_lines_where_the_output_is_no_terminal(tmp_path, clock, capsys):
    log = RunLog(tmp_path, start=0, total=100, name="run")
    for step in range(1, 101):
        clock.tick(40 if step in (1, 23) else 1)
        log.step(row(step))
    log.close()
    lines = capsys.readouterr().err.splitlines()
    assert lines.pop(2) == "about 0:01:30 of steps are left, at 1 s a step"
    shown = [int(line.removeprefix("run: ").split()[0]) for line in lines]
    assert shown == [1, 10, 20, 23, 30, 40, 50, 60, 70, 80, 90, 100]
    assert "tokens/s" not in lines[0]  # only the compile is known
    assert "loss 2.0000" in lines[1]
    assert "100 tokens/s" in lines[1]


def test_a_resumed_run_shows_its_first_step_and_a_quiet_one_none(tmp_path, clock, capsys):
    for quiet in (False, True):
        log = RunLog(tmp_path, start=41, total=100, name="run", quiet=quiet)
        log.step(row(42))
        log.close()
        assert ("run: 42 of 100" in capsys.readouterr().err) == (not quiet)


def test_a_progress_line_says_how_long_it_takes():
    rate = {"seconds": 4.5, "tokens": 100.0, "samples": 8.0}
    line = status(row(1200, 1.25), 5198, rate)
    assert line == "loss 1.2500, lr 0.001, 1.8 samples/s, 22 tokens/s, 4:59:51 left"
    assert status(row(9), 10, {**rate, "seconds": 2.0}).endswith("0:00:02 left")


@pytest.mark.parametrize("count", [1, 2, 12, 40, 500])
def test_smoothing_keeps_a_straight_line_and_the_ends(count):
    line = np.linspace(9, 1, count)
    np.testing.assert_allclose(smooth(line.tolist()), line, atol=1e-9)


def test_smoothing_of_a_short_run_does_not_lag():
    """40 steps that fall fast: the smoothed curve is where the losses are."""
    losses = 8 * np.exp(-np.arange(40) / 4)
    smoothed = np.array(smooth(losses.tolist()))
    assert np.abs(smoothed - losses).max() < 0.2
    assert smoothed[-1] == pytest.approx(losses[-1])


def test_smoothing_of_a_long_run_takes_the_noise_out():
    rng = np.random.default_rng(0)
    noisy = 2 + rng.normal(0, 0.5, 5000)
    assert np.std(smooth(noisy.tolist())[200:-200]) < 0.05
