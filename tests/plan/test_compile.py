"""Compiling for devices that are not there; skipped where their compilers are not installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from llava_jax.plan import compile as compiler


def planned(tmp_path, *topologies):
    """(rows, log) of the command, in a process that has not imported jax yet."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_"))}
    words = ["--config", "finetune_7b", "--model", "tiny", "--topology", *topologies]
    words += ["--config.batch_size=16", "--config.data.max_length=512", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "llava_jax", "plan", *words, "--out", tmp_path / "rows.jsonl"],
        env=clean,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def needs(platform):
    module = compiler.WHEELS[platform][0]
    found = importlib.util.find_spec(module)
    return pytest.mark.skipif(not found, reason=f"{module} is not installed")


@needs("tpu")
def test_tpus_that_are_not_there(tmp_path):
    (row,), _ = planned(tmp_path, "v5e-8")
    assert row["fits"]
    assert row["devices"] == 8
    assert row["memory"]["peak"] < row["memory"]["device"]
    assert row["roofline"]["bottleneck"] in ("compute", "HBM", "links")
    assert {flow["axes"] for flow in row["traffic"]["links"]} == {"fsdp"}


@needs("cuda")
def test_gpus_that_are_not_there(tmp_path):
    (small, large), log = planned(tmp_path, "8xA100-40", "8xA100-80")
    assert log.count("compiling") == 1
    assert small["compiled"] == large["compiled"]
    assert small["memory"]["device"] < large["memory"]["device"]
    rows, log = planned(tmp_path, "8xA100-40", "8xA100-80")
    assert log.count("compiling") == 0
    assert rows == [small, large]
