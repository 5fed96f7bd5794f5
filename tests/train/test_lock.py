"""One run at a time in a work directory."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from llava_jax.errors import ConfigError
from llava_jax.train import lock
from llava_jax.train.lock import LOCK, hold

HOLD = """
import sys, time
from pathlib import Path
from llava_jax.train.lock import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the directory."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_another_run_is_refused_and_the_holder_named(other, tmp_path):
    says = f"in use by process {other.pid} on .*, since 20"
    with pytest.raises(ConfigError, match=says) as info, hold(tmp_path):
        pass
    assert "another --workdir" in str(info.value)
    # A killed run blocks nobody.
    other.kill()
    other.wait()
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_a_stage_s_folder_is_held_as_well_and_all_is_free_afterwards(tmp_path):
    locks = [tmp_path / LOCK, tmp_path / "one" / LOCK]
    with hold(tmp_path), hold(tmp_path / "one"):
        assert all(lock.read_text() for lock in locks)
        with pytest.raises(ConfigError, match="in use by process"), hold(tmp_path / "one"):
            pass
    assert [lock.read_text() for lock in locks] == ["", ""]
    with hold(tmp_path):
        pass


def test_a_run_on_another_host_is_known_by_its_signs_of_life(tmp_path, monkeypatch):
    """Where the file system locks within one host only."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    path = tmp_path / LOCK
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "today"}))
    ended = threading.Event()

    def live():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=live)
    thread.start()
    with pytest.raises(ConfigError, match="process 1 on elsewhere, since today"), hold(tmp_path):
        pass
    ended.set()
    thread.join()
    with hold(tmp_path):  # nobody touches it any more
        before = path.stat().st_mtime_ns
        time.sleep(0.5)
        assert path.stat().st_mtime_ns > before


def test_a_lock_that_is_no_json_is_taken(tmp_path):
    (tmp_path / LOCK).write_text("?")
    with hold(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"]
