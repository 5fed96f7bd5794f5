"""Compiling for devices that are not there; skipped where their compilers are not installed."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from llava_jax.chips import CHIPS
from llava_jax.config import LlavaConfig
from llava_jax.plan import compile as compiler
from llava_jax.plan import hlo, plan, traffic
from llava_jax.plan.lengths import Means
from llava_jax.plan.topology import parse_topology
from llava_jax.train.config import load_config


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
    _, fix = compiler.COMPILERS[platform]
    return pytest.mark.skipif(not compiler.has_compiler(platform), reason=f"needs {fix}")


@needs("tpu")
def test_tpus_that_are_not_there(tmp_path):
    (row,), _ = planned(tmp_path, "v5e-8")
    assert row["fits"]
    assert row["devices"] == 8
    assert row["memory"]["peak"] < row["memory"]["device"]
    assert row["roofline"]["bottleneck"] in ("compute", "HBM", "links")
    assert {flow["axes"] for flow in row["traffic"]["links"]} == {"fsdp"}


@needs("tpu")
@pytest.mark.slow
def test_bytes_in_hbm_take_no_longer_than_libtpu_expects_of_its_kernels(monkeypatch, capsys):
    """Its estimate of cycles stands at each kernel; a v5e has 1.5 GHz (197 TFLOP/s of 4 x 128 x 128)."""
    config, topology = LlavaConfig.v15_7b(), parse_topology("v5e-4")
    few = {n: replace(getattr(config, n), layers=2) for n in ("language", "vision")}
    monkeypatch.setattr(plan, "sizes_of", lambda _: replace(config, **few))
    with monkeypatch.context() as patch:
        for name in ("TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE", "JAX_PLATFORMS"):
            patch.setenv(name, os.environ.get(name, ""))  # to be put back
        compiler.prepare([topology])
        devices = compiler.devices_of(topology)
        settings = load_config("finetune_7b", ["--config.batch_size=4"])
        asked = plan.Question("few", settings, topology, means=Means(samples=400))
        with jax.default_matmul_precision("default"):  # as users run it
            setup = plan.set_up(asked, devices)
            made = compiler.compile_step(*compiler.lower(setup.program, setup.batch), 0)
    module, bandwidth = hlo.parse(made.text), CHIPS["v5e"].hbm
    moved = expected = counted = 0.0
    for name, times in hlo.runs(module).items():
        computation = module.computations[name]
        for one in () if times.fused else computation.values():
            cycles = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
            if cycles:
                seconds = traffic.moved_by(module, computation, one) / bandwidth
                moved += times.times * min(seconds, int(cycles[1]) / 1.5e9)
                counted += times.times * seconds
                expected += times.times * int(cycles[1]) / 1.5e9
    with capsys.disabled():
        print(f"\nlibtpu expects {expected:.3f} s, bytes in HBM take {counted:.3f} s")
    assert 0.1 * expected < counted < expected
    assert counted < 1.05 * moved  # nearly nowhere more than the kernel is expected to take


@needs("cuda")
def test_gpus_that_are_not_there(tmp_path):
    (small, large), log = planned(tmp_path, "8xA100-40", "8xA100-80")
    assert log.count("compiling") == 1
    assert small["compiled"] == large["compiled"]
    assert small["memory"]["device"] < large["memory"]["device"]
    rows, log = planned(tmp_path, "8xA100-40", "8xA100-80")
    assert log.count("compiling") == 0
    assert rows == [small, large]
