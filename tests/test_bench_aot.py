"""What is counted of programs for absent hardware; compiling them is slow, and needs their compilers."""

import json
import os
import subprocess
import sys

import pytest

from bench import aot, gpu
from llava_jax.plan import hlo
from llava_jax.plan.compile import COMPILERS, has_compiler

PROGRAM = """HloModule step
%cheap (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  ROOT %n = f32[256]{0} negate(%p)
}

%dear (p: f32[256]) -> f32[256] {
  %p = f32[256]{0} parameter(0)
  %s = f32[256]{0} sort(%p), dimensions={0}, to_apply=%less
  ROOT %n = f32[256]{0} negate(%s)
}

%key_block (t: (f32[256])) -> (f32[256]) {
  %t = (f32[256]{0}) parameter(0)
  %x = f32[256]{0} get-tuple-element(%t), index=0
  %m = f32[256]{0} multiply(%x, %x)
  ROOT %r = (f32[256]{0}) tuple(%m)
}

%put (c: f32[4096], i: s32[8], u: f32[8]) -> f32[4096] {
  %c = f32[4096]{0} parameter(0)
  %i = s32[8]{0} parameter(1)
  %u = f32[8]{0} parameter(2)
  ROOT %w = f32[4096]{0} scatter(%c, %i, %u), to_apply=%second
}

%token (t: (f32[256], f32[4096], s32[8], f32[8], s32[])) -> (f32[256]) {
  %t = (f32[256]{0}, f32[4096]{0}, s32[8]{0}, f32[8]{0}, s32[]) parameter(0)
  %x = f32[256]{0} get-tuple-element(%t), index=0
  %cache = f32[4096]{0} get-tuple-element(%t), index=1
  %at = s32[8]{0} get-tuple-element(%t), index=2
  %new = f32[8]{0} get-tuple-element(%t), index=3
  %i = s32[] get-tuple-element(%t), index=4
  %held = f32[4096]{0} fusion(%cache, %at, %new), kind=kInput, calls=%put
  %k = f32[256]{0} custom-call(%x, %held), custom_call_target="x", metadata={op_name="mha_forward"}
  %a = (f32[256]{0}) tuple(%k)
  %w = (f32[256]{0}) while(%a), condition=%more, body=%key_block
  %b = f32[256]{0} get-tuple-element(%w), index=0
  %c = f32[256]{0} conditional(%i, %b, %b), branch_computations={%dear, %cheap}
  ROOT %r = (f32[256]{0}) tuple(%c)
}

ENTRY %main (p: (f32[256])) -> (f32[256]) {
  %p = (f32[256]{0}) parameter(0)
  ROOT %w = (f32[256]{0}) while(%p), condition=%more, body=%token
}
"""


def test_a_tokens_step_is_counted_without_attention_and_by_its_cheapest_branches():
    module = hlo.parse(PROGRAM)
    assert aot._loops(module, module.entry) == ["token"]
    written = 8 * 4 + 2 * 8 * 4  # the new entries, of the cache no more; their places and values
    assert aot._moved(module, "token") == (written + 2 * 256 * 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize("hardware", ["1xH100", "v5e-4"])
def test_a_token_of_the_7b_reads_its_weights_once_in_each_form(hardware, tmp_path):
    """One layer; nothing as large as a kernel is written."""
    platform = "cuda" if "H100" in hardware else "tpu"
    if not has_compiler(platform):
        pytest.skip(f"needs {COMPILERS[platform][1]}")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "XLA_"))}
    words = ["aot", "--layers", "1", "--batch", "1", "--hardware", hardware, "--out"]
    command = [sys.executable, "-m", "bench", *words, str(tmp_path / "found.json")]
    subprocess.run(command, env=clean, check=True, timeout=900)
    found = json.loads((tmp_path / "found.json").read_text())["decode"]
    assert [one["held"] for one in found] == list(aot.HELD)
    for one in found:
        assert one["share"] > 0.93, one
        assert one["temporary, MB"] < 4096 * 4096 * 2 / 1e6, one


def test_the_table_of_a_gpu(tmp_path):
    """Floors, from below or (milliseconds) from above; parts that did not run are said."""
    times = {
        name: {"seconds": {"median": n, "min": n}}
        for name, n in (("llava_jax", 0.02), ("torch", 0.05))
    }
    (tmp_path / "prefill.json").write_text(json.dumps({"times": {"1": times}}))
    (tmp_path / "decode_int8.json").write_text(
        json.dumps({"times": {}, "limits": [[1, 2.0, "64.0%"]]})
    )
    result = {"mfu_of_measured_matmul": 0.7, "seconds": {"median": 2.0}}
    (tmp_path / "stage1.json").write_text(
        json.dumps({"results": [result, {"seconds": {"median": 3.0}}]})
    )
    rows = {row[0]: row[1:] for row in gpu.table(tmp_path)}
    assert rows["prefill of 636 tokens with the tower, ms"] == ["20", "22", "16", "yes", "2.50"]
    assert rows["decode int8, share of its floor"] == ["0.64", "0.65", "", "no", ""]
    assert rows["stage 1, MFU of the measured matmul"] == ["0.7", "0.62", "0.75", "yes", "1.50"]
    assert rows["requests/s, 636 in and 100 out"][0] == "not measured"
