"""What a compiled step moves, read from its HLO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.llava import binder
from llava_jax.plan.hlo import parse, runs
from llava_jax.plan.traffic import Flow, flows, hbm_bytes, replica_groups
from llava_jax.sharding import make_mesh
from llava_jax.train.program import planned_params
from tests.tiny import CONFIG


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile().as_text() or ""


def test_collectives_of_a_scan_count_once_for_each_turn():
    mesh = make_mesh(data=2, fsdp=4)

    def layer(x, part):
        return jnp.tanh(x @ jax.lax.all_gather(part, "fsdp", tiled=True)), None

    run = jax.shard_map(
        lambda x, stack: jax.lax.scan(layer, x, stack)[0],
        mesh=mesh,
        in_specs=(P("data"), P(None, "fsdp")),
        out_specs=P("data"),
        check_vma=False,
    )
    module = parse(compiled(run, jnp.ones((8, 64)), jnp.ones((3, 64, 64))))
    assert max(r.times for r in runs(module).values()) == 3
    # A device holds 16 of the 64 rows of a layer's weights and sends them to three others.
    sent = Flow("all-gather", "fsdp", False, 3 * 3 * 16 * 64 * 4)
    assert flows(module, dict(mesh.shape)) == [sent]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("channel_id=3", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_to_write_replica_groups(text, groups):
    np.testing.assert_array_equal(replica_groups(text, 4), groups)


def _module(line):
    return parse(
        f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[256] parameter(0)\n  {line}\n}}\n"
    )


def test_bytes_over_each_link():
    mesh = {"data": 2, "fsdp": 4}
    everywhere = _module("%r = f32[256] all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add")
    assert flows(everywhere, mesh) == [Flow("all-reduce", "data,fsdp", False, 2 * 1024 * 7 / 8)]
    # Over two slices: a quarter each of the sum over a slice crosses, and then is shared.
    assert set(flows(everywhere, mesh, slices=2)) == {
        Flow("all-reduce", "data,fsdp", False, 2 * 1024 * 3 / 4),
        Flow("all-reduce", "data,fsdp", True, 2 * 256 / 2),
    }
    inside = _module("%r = f32[64] reduce-scatter(%p), replica_groups=[2,4]<=[8], to_apply=%add")
    assert flows(inside, mesh, slices=2) == [Flow("reduce-scatter", "fsdp", False, 1024 * 3 / 4)]
    ring = _module("%r = f32[256] collective-permute(%p), source_target_pairs={{0,4},{4,0}}")
    assert flows(ring, mesh) == [Flow("collective-permute", "data", False, 1024)]


def test_a_kernel_that_slices_a_stack_reads_the_slice():
    def run(x, stack):
        return jax.lax.scan(lambda x, w: (x * w + 1, None), x, stack)[0]

    one = 4 * 1024
    text = compiled(run, jnp.ones(1024), jnp.ones((50, 1024)))
    moved = hbm_bytes(parse(text)) / 50
    assert 2 * one <= moved <= 6 * one  # the whole stack at every turn would be 50


def test_the_tower_runs_each_image_on_one_device():
    mesh = make_mesh(fsdp=8)
    images = jax.ShapeDtypeStruct(
        (16, 1, 28, 28, 3), jnp.float32, sharding=NamedSharding(mesh, P("fsdp"))
    )
    rows = jax.ShapeDtypeStruct((16, 8), jnp.int32, sharding=NamedSharding(mesh, P("fsdp")))
    bind, params = binder(CONFIG), planned_params(CONFIG, mesh)
    with jax.set_mesh(mesh):
        text = compiled(lambda p, *batch: bind(p).embed(*batch), params, rows, rows, images)
    sent = {flow.collective for flow in flows(parse(text), dict(mesh.shape))}
    assert "all-reduce" not in sent  # of activations, whose width would be split over the devices


TPU = """HloModule tpu

%ring (p: (bf16[8,64], u32[])) -> (bf16[8,64], u32[]) {
  %p = (bf16[8,64], u32[]) parameter(0)
  %part = bf16[8,64] get-tuple-element(%p), index=0
  %at = u32[] get-tuple-element(%p), index=1
  %two = u32[] constant(2)
  %send = (bf16[8,64], bf16[8,64], u32[]) collective-permute-start(%part), channel_id=1, source_target_pairs={{0,1},{1,0}}
  %sent = bf16[8,64] collective-permute-done(%send)
  %next = u32[] add(%at, %two)
  ROOT %t = (bf16[8,64], u32[]) tuple(%sent, %next)
}

%more (q: (bf16[8,64], u32[])) -> pred[] {
  %q = (bf16[8,64], u32[]) parameter(0)
  %now = u32[] get-tuple-element(%q), index=1
  %end = u32[] constant(8)
  ROOT %less = pred[] compare(%now, %end), direction=LT
}

%scatter (g: bf16[16,64]) -> bf16[8,64] {
  %g = bf16[16,64] parameter(0)
  %sum = bf16[16,64] all-reduce(%g), channel_id=2, replica_groups={{0,1}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %own = bf16[8,64] dynamic-slice(%sum, %zero, %zero), dynamic_slice_sizes={8,64}
}

ENTRY %main (a: bf16[8,64], b: bf16[16,64]) -> bf16[8,64] {
  %a = bf16[8,64] parameter(0)
  %b = bf16[16,64] parameter(1)
  %kernel = bf16[8,64] custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
 "xprof_metadata":"{}"
}}, metadata={op_name="splash"}
  %first = u32[] constant(0)
  %start = (bf16[8,64], u32[]) tuple(%kernel, %first)
  %loop = (bf16[8,64], u32[]) while(%start), condition=%more, body=%ring
  ROOT %r = bf16[8,64] fusion(%b), kind=kCustom, calls=%scatter
}
"""


def test_a_tpu_program_is_read_past_the_line_breaks_of_its_kernels():
    module = parse(TPU)
    assert runs(module)["ring"].times == 4  # its counter goes up by two
    held = 8 * 64 * 2
    assert flows(module, {"fsdp": 2}) == [
        Flow("collective-permute", "fsdp", False, 4 * held),
        Flow("reduce-scatter", "fsdp", False, 2 * held / 2),
    ]
