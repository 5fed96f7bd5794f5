"""What is compiled: no path but the plain one holds T x T, and memory is linear in T.

For TPU and CUDA ahead of time, without their devices, where libtpu or the CUDA plug-in is installed:
`pip install --no-deps 'libtpu==0.0.42.*'`, `pip install 'jax-cuda12-plugin[with-cuda]==0.10.2'`.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from llava_jax.attention import Need, choose
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute
from llava_jax.llava import abstract_params
from llava_jax.plan.compile import has_compiler
from llava_jax.sharding import MESH_AXES
from llava_jax.train.step import make_loss
from tests.tiny import CONFIG

# 7B width, few layers; every image of a batch is left out of the comparison: there are none.
WIDE = replace(
    LlavaConfig.v15_7b(),
    language=replace(LlavaConfig.v15_7b().language, layers=2),
    vision=replace(LlavaConfig.v15_7b().vision, layers=2),
)


def program(config: LlavaConfig, device, length: int, need: Need, mesh: Mesh | None = None):
    """The compiled loss and gradients of all parameters for one row of `length` tokens."""
    compute = Compute(
        jnp.dtype(need.dtype), "full", attention=choose(device, need), turns=need.turns
    )
    shape = jax.ShapeDtypeStruct
    params = {n: shape(p.shape, need.dtype) for n, p in abstract_params(config).items()}
    names = ("tokens", "slots", "positions", "segments", "turns")
    batch = {name: shape((1, length), jnp.int32) for name in names}
    batch |= {name: shape((1, 128), jnp.int32) for name in ("target_at", "targets")}
    batch["images"] = shape(
        (1, 0, config.vision.image_size, config.vision.image_size, 3), jnp.uint8
    )
    step = jax.jit(jax.grad(make_loss(config, compute)))
    # As users run it: Mosaic has no bfloat16 product at the highest precision of our tests.
    with jax.default_matmul_precision("default"):
        if mesh is None:
            return step.lower(params, {}, batch).compile()
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        arguments = jax.tree.map(
            lambda x: shape(x.shape, x.dtype, sharding=everywhere), (params, {}, batch)
        )
        with jax.set_mesh(mesh):
            return step.lower(*arguments).compile()


def square_buffers(text: str, length: int) -> list[str]:
    """The arrays [..., length, length] of a program's text."""
    return sorted(set(re.findall(rf"\w+\[(?:\d+,)*{length},{length}\]", text)))


@pytest.mark.parametrize("turns", [False, True])
def test_on_cpu_nothing_is_as_large_as_the_square_of_the_length(turns):
    """1,039 is a length that nothing else has."""
    language = replace(CONFIG.language, max_positions=2048)
    config = replace(CONFIG, language=language, max_length=2048)
    cpu = jax.devices()[0]
    text = program(config, cpu, 1039, Need("float32", packed=True, turns=turns)).as_text()
    assert not re.findall(r"\[(?:\d+,)*1039,(?:\d+,)*1039[,\]]", text)


def tpu(monkeypatch):
    """A device of a TPU v5e that is not there."""
    if not has_compiler("tpu"):
        pytest.skip("libtpu is not installed")
    hosts = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    hosts |= {"TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in hosts.items():
        monkeypatch.setenv(name, value)
    return topologies.get_topology_desc("v5e:2x2", platform="tpu").devices[0]


# Of NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.
GPUS = {
    "A100": dict(major=8, cores=108, core=167936, block=166912, bytes=85100068864, l2=41943040),
    "H100": dict(major=9, cores=132, core=233472, block=232448, bytes=84942979072, l2=52428800),
}


def gpu(name: str):
    """A device of an NVIDIA GPU that is not there."""
    if not has_compiler("cuda"):
        pytest.skip("no CUDA plug-in is installed")
    c = GPUS[name]
    target = f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: {c["core"]}
          shared_memory_per_block_optin: {c["block"]} core_count: {c["cores"]} fpus_per_core: 64
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 2000000000000 l2_cache_size: {c["l2"]} clock_rate_ghz: 1.41
          device_memory_size: {c["bytes"]} registers_per_core_limit: 65536
          registers_per_block_limit: 65536 cuda_compute_capability {{ major: {c["major"]} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "NVIDIA {name}"
    """
    found = topologies.get_topology_desc(
        name, platform="cuda", topology="1x1x1", target_config=target
    )
    return found.devices[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TPU", *GPUS])
@pytest.mark.parametrize("mode", ["alone", "packed", "turns"])
def test_memory_is_linear_in_the_length(kind, mode, monkeypatch, capsys):
    device = tpu(monkeypatch) if kind == "TPU" else gpu(kind)
    mesh = Mesh(np.array([device]).reshape(1, 1, 1, 1), MESH_AXES)
    need = Need("bfloat16", packed=mode != "alone", turns=mode == "turns")
    size = {}
    for length in (2048, 4096):
        made = program(WIDE, device, length, need, mesh)
        size[length] = made.memory_analysis().temp_size_in_bytes
        if length != WIDE.language.width:  # weights are [4096, 4096]
            assert not square_buffers(made.as_text(), length)
    with capsys.disabled():
        print(
            f"\n{kind}, {mode}: {choose(device, need)}: temporaries "
            + ", ".join(f"{n / 2**20:.0f} MiB at T={t}" for t, n in size.items())
        )
    assert size[4096] <= 2.2 * size[2048]
