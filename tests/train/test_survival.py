"""The long measurements of docs/reliability.md; their short forms are in the other files of this folder."""

import subprocess
import sys

import pytest

from bench.survival_runs import ROOT


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "kills --count 100",
        "peer_kills --count 20",
        "damages --count 500",
        "full_disk --count 20",
        "stops --count 20",
        "peer_stops --count 20",
        "bad_images --count 10",
        "topology",
        "soak --minutes 30",
    ],
)
def test_a_run_survives(words, tmp_path):
    command = [sys.executable, "-m", "bench.survival", *words.split(), "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "mount:" in done.stderr:
        pytest.skip("a small disk can be mounted by root alone")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
