"""The supervisor, over programs that die, hang and finish; no jax is imported."""

import argparse
import json
import os
import queue
import signal
import sys
import threading
from types import SimpleNamespace

import pytest

from llava_jax.errors import ConfigError, LlavaError
from llava_jax.train import supervise as module
from llava_jax.train.supervise import RESTARTS, Heard, Stop, follow, share_gpus, supervise

PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from llava_jax.train.supervise import alive
folder, index = Path(sys.argv[1]), os.environ.get("JAX_PROCESS_ID", "0")
life = len(list(folder.glob(f"life-{index}-*")))
(folder / f"life-{index}-{life}").touch()
what = sys.argv[2:][min(life, len(sys.argv) - 3)]
alive()
if what == "save":
    (folder / "checkpoints" / str(life + 1)).mkdir(parents=True)
    os.kill(os.getpid(), signal.SIGKILL)
if what == "die" and index != "1":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "rest":
    alive(steps=False)
    time.sleep(1.5)
if what in ("hang", "die"):
    time.sleep(60)
if what == "stop":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    (folder / "ready").write_text(str(os.getpgid(0) == os.getpid()))
    time.sleep(60)
sys.exit(int(what) if what.isdigit() else 0)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "COMMAND", (sys.executable, "-c", PROGRAM))

    def start(*lives, processes=1, failures=3, seconds=30.0):
        args = argparse.Namespace(
            processes=processes, hang_minutes=seconds / 60, max_failures=failures
        )
        return supervise(args, [str(tmp_path), *lives], tmp_path)

    return start


def whys(folder):
    return [json.loads(line)["why"] for line in (folder / RESTARTS).read_text().splitlines()]


def test_what_dies_or_hangs_is_started_again(run, tmp_path):
    assert run("die", "hang", "70", "rest", seconds=0.8) == 0
    assert whys(tmp_path) == [
        "the run was ended by SIGKILL",
        "the run said nothing for 0.8 s",
        "the run ended with exit code 70",
    ]


def test_if_one_of_two_dies_both_are_started_again(run, tmp_path):
    assert run("die", "fine", processes=2) == 0
    assert whys(tmp_path) == ["process 0 was ended by SIGKILL"]
    lives = sorted(p.name for p in tmp_path.glob("life-*"))
    assert lives == ["life-0-0", "life-0-1", "life-1-0", "life-1-1"]


@pytest.mark.parametrize("code", [0, 2, 65, 75])
def test_what_no_restart_would_mend_ends_it(run, tmp_path, code):
    assert run(str(code)) == code
    assert whys(tmp_path) == []


def test_restarts_are_bounded_unless_checkpoints_are_made_in_between(run, tmp_path):
    with pytest.raises(LlavaError, match="started again 1 time without a newer checkpoint than 3"):
        run("save", "save", "save", "die", failures=1)
    assert len(whys(tmp_path)) == 4


def test_without_any_checkpoint_that_is_what_is_said(run):
    with pytest.raises(LlavaError, match="0 times without a newer checkpoint than 0 "):
        run("70", failures=0)


def test_processes_share_the_gpus(monkeypatch):
    monkeypatch.setattr(module, "has_cuda", lambda: True)
    four = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert share_gpus(2, four) == ["0,1", "2,3"]
    assert share_gpus(2, {**four, "JAX_LOCAL_DEVICE_IDS": "1,3"}) == ["1", "3"]
    for count in (3, 8):
        with pytest.raises(ConfigError, match=f"--processes {count} cannot share 4 GPUs equally"):
            share_gpus(count, four)
    assert share_gpus(1, four) == share_gpus(3, {**four, "JAX_PLATFORMS": "cpu"}) == []
    assert share_gpus(3, {"CUDA_VISIBLE_DEVICES": ""}) == []
    monkeypatch.setattr(module, "has_cuda", lambda: False)
    assert share_gpus(3, four) == []


def test_asked_to_stop_it_stops_the_run(run, tmp_path):
    def ask():
        while not (tmp_path / "ready").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask).start()
    assert run("stop") == 75
    assert whys(tmp_path) == []
    # Its own group: a terminal's Ctrl-C comes to the supervisor alone, which passes it on once.
    assert (tmp_path / "ready").read_text() == "True"


def test_what_may_pass_is_tried_again_with_a_pause_and_ends_with_its_own_code(
    run, tmp_path, monkeypatch
):
    pauses = []
    monkeypatch.setattr(Stop, "wait", lambda self, seconds: pauses.append(seconds))
    assert run("74", "74", "74", "0") == 0
    assert pauses == [10, 20, 40]
    for life in tmp_path.glob("life-*"):
        life.unlink()
    assert run("71", failures=0) == 71


def test_where_no_steps_are_made_a_hang_takes_longer_and_is_one(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    heard = Heard(10)
    now[0] += 39  # before the first step
    assert not heard.silent
    heard.hear(b"..-")
    now[0] += 39
    assert not heard.silent
    now[0] += 2
    assert heard.silent
    heard.hear(b"-.")
    now[0] += 11
    assert heard.silent


def test_a_process_stops_when_its_supervisor_is_gone(monkeypatch):
    (ours, theirs), killed = os.pipe(), queue.Queue()
    monkeypatch.setenv("LLAVA_JAX_SUPERVISED", str(ours))
    monkeypatch.setattr(module, "ORPHAN_SECONDS", 0)
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.put((pid, number)))
    follow()
    os.close(theirs)
    assert killed.get(timeout=10) == (os.getpid(), signal.SIGTERM)
    assert killed.get(timeout=10) == (os.getpid(), signal.SIGKILL)
    os.close(ours)


def test_numbers_that_make_no_sense_are_refused(run):
    with pytest.raises(ConfigError, match="positive"):
        run("fine", processes=0)
