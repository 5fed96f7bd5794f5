"""What each accelerator is: memory, peak rates, links. Figures of the makers, one source a row.

Rates are per chip and second, in one direction. They are limits, not measurements.
"""

from __future__ import annotations

import glob
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    memory: bytes that a program may use. flops: bf16 matmul FLOP/s, dense. hbm: bytes/s. link: bytes/s
    that a chip sends over ICI or NVLink, all ports together. dcn: its share of the host's network.
    target: what programs are compiled for; chips of one target run the same program.
    """

    name: str
    platform: str
    target: str
    memory: float
    flops: float
    hbm: float
    link: float
    dcn: float
    per_host: int
    source: str


_TPU = "cloud.google.com/tpu/docs/"
_IB = "; network: one HCA a GPU (DGX)"
CHIPS = {
    chip.name: chip
    for chip in (
        # Memory of a TPU: what its compiler says it has, when a program does not fit.
        Chip("v5e", "tpu", "v5e", 15.75 * GIB, 197e12, 819e9, 200e9, 3.125e9, 8, _TPU + "v5e"),
        Chip("v6e", "tpu", "v6e", 31.25 * GIB, 918e12, 1638e9, 400e9, 12.5e9, 8, _TPU + "v6e"),
        Chip("v5p", "tpu", "v5p", 95.74 * GIB, 459e12, 2765e9, 600e9, 6.25e9, 4, _TPU + "v5p"),
        # Memory of a GPU: as the driver reports it, less 5 % for the CUDA context and NCCL.
        Chip("A100-40", "cuda", "a100", 0.95 * 42.33e9, 312e12, 1555e9, 300e9, 25e9, 8,
             "NVIDIA A100 data sheet (2021)" + _IB),
        Chip("A100-80", "cuda", "a100", 0.95 * 85.10e9, 312e12, 2039e9, 300e9, 25e9, 8,
             "NVIDIA A100 data sheet (2021)" + _IB),
        Chip("H100", "cuda", "h100", 0.95 * 84.94e9, 989.5e12, 3352e9, 450e9, 50e9, 8,
             "NVIDIA H100 SXM data sheet (2023)" + _IB),
        Chip("H200", "cuda", "h200", 0.95 * 151.40e9, 989.5e12, 4800e9, 450e9, 50e9, 8,
             "NVIDIA H200 SXM data sheet (2024)" + _IB),
    )
}  # fmt: skip

_KINDS = {
    "A100": "A100-80", "H100": "H100", "H200": "H200",
    "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip
"""{part of a device's kind, as jax calls it: a chip of that peak rate}; the first that fits."""


def peak_of(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its maker's data sheet; None for one that is not in CHIPS."""
    chip = _chip_of(device_kind)
    return chip and chip.flops


def memory_of(device_kind: str) -> float | None:
    """Bytes of a device, of the smallest chip that may have its kind; None for one that is not in CHIPS."""
    chip = _chip_of(device_kind)
    return chip and min(c.memory for c in CHIPS.values() if c.target == chip.target)


def _chip_of(device_kind: str) -> Chip | None:
    return next((CHIPS[chip] for part, chip in _KINDS.items() if part in device_kind), None)


def has_cuda() -> bool:
    """Whether jax would use NVIDIA GPUs; imports no jax."""
    return any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin")))


def visible_gpus(env: Mapping[str, str] = os.environ) -> int:
    """How many NVIDIA GPUs of this machine a program may use; touches none."""
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return len(glob.glob("/dev/nvidia[0-9]*"))
    return 0 if visible in ("", "-1") else len(visible.split(","))


# What XLA wants to know of a GPU that is not there: limits of its compute capability (CUDA C++
# Programming Guide, "Technical specifications per compute capability") and figures of the chip.
_SM = {
    "a100": ("NVIDIA A100-SXM4-40GB", 8, 0, 108, 64, 164, 1.41, 40, 42.33e9, 1555.2e9),
    "h100": ("NVIDIA H100 80GB HBM3", 9, 0, 132, 128, 228, 1.98, 50, 84.94e9, 3352.3e9),
    "h200": ("NVIDIA H200 141GB HBM3e", 9, 0, 132, 128, 228, 1.98, 50, 151.40e9, 4800e9),
}
"""{target: name, capability (2), SMs, FP32 units an SM, shared KiB an SM, GHz, L2 MiB, memory, bytes/s}"""


def target_config(target: str) -> str:
    """stream_executor.GpuTargetConfigProto of a GPU as text, for jax.experimental.topologies.

    Its memory is that of the smallest chip of the target: what fits there runs on the others.
    """
    name, major, minor, cores, units, shared, clock, l2, memory, hbm = _SM[target]
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_block_optin": (shared - 1) * 1024,
        "shared_memory_per_core": shared * 1024,
        "core_count": cores,
        "fpus_per_core": units,
        "clock_rate_ghz": clock,
        "l2_cache_size": l2 * 2**20,
        "device_memory_size": int(memory),
        "memory_bandwidth": int(hbm),
    }
    facts = " ".join(f"{key}: {value}" for key, value in device.items())
    # Hopper's own instructions (wgmma) are the accelerated features of 9.0a.
    feature = " feature_extension: ACCELERATED_FEATURES" if major == 9 else ""
    capability = f"cuda_compute_capability {{ major: {major} minor: {minor}{feature} }}"
    versions = "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 12 minor: 8 }"
    return (
        f'gpu_device_info {{ {facts} {capability} name: "{name}" }} platform_name: "CUDA" '
        f'{versions} device_description_str: "{name}"'
    )
