"""Compiles the step of a run for devices that are here or not, and keeps what the compiler says."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import time
from dataclasses import asdict, dataclass
from typing import Any

from llava_jax.chips import target_config
from llava_jax.errors import ConfigError
from llava_jax.plan.topology import HERE, Topology
from llava_jax.util import installed_versions

COMPILERS = {
    "tpu": (["libtpu"], "pip install 'llava_jax[tpu]'"),
    "cuda": (
        ["jax-cuda13-plugin", "jax-cuda12-plugin"],
        "pip install 'llava_jax[cuda12]' or 'llava_jax[cuda13]'",
    ),
}
"""{platform: packages of which one compiles for it, what brings one}; no device is needed."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler said of a program. Bytes are of one device.

    peak: arguments, results and temporaries that live at once. temporary: gradients, activations and
    gathered parameters. fits: False where the compiler itself refused (TPU), or was not asked (no
    digest) because that much stays over the step; then only `peak` is known.
    """

    digest: str
    fits: bool
    peak: int
    arguments: int = 0
    temporary: int = 0
    host: int = 0
    seconds: float = 0.0
    text: str = ""

    def facts(self) -> dict[str, Any]:
        """Everything but the program's text."""
        return {name: value for name, value in asdict(self).items() if name != "text"}


def has_compiler(platform: str) -> bool:
    """Whether a compiler for "tpu" or "cuda" is installed."""
    packages, _ = COMPILERS[platform]
    return any(importlib.util.find_spec(name.replace("-", "_")) for name in packages)


def prepare(topologies: list[Topology]) -> None:
    """Sets what compiling for absent devices needs in the environment; before jax is imported.

    Raises ConfigError for a compiler that is not installed.
    """
    names = [topology.name for topology in topologies]
    if HERE in names:
        if len(set(names)) > 1:
            raise ConfigError(
                f"{HERE} is planned on the devices that are here, the others without any",
                fix="plan it in a command of its own",
            )
        return
    for topology in topologies:
        platform = topology.chip.platform if topology.chip else ""
        packages, fix = COMPILERS[platform]
        if not has_compiler(platform):
            needed = " or ".join(packages)
            raise ConfigError(f"compiling for {topology.name} needs the package {needed}", fix=fix)
    # libtpu else asks the metadata server of a cloud machine what it runs on, and lets one process in.
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def devices_of(topology: Topology) -> list[Any]:
    """The devices to compile for, those of a slice or host one after the other."""
    import jax
    from jax.experimental import topologies

    if topology.chip is None:
        return jax.devices()
    if topology.chip.platform == "cuda":
        hosts = topology.slices
        found = topologies.get_topology_desc(
            "cuda",
            platform="cuda",
            topology=f"1x{hosts}x{topology.devices // hosts}",
            target_config=target_config(topology.chip.target),
        )
        return list(found.devices)
    grid = "x".join(map(str, topology.grid))
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    found = topologies.get_topology_desc(f"{topology.chip.name}:{grid}", platform="tpu", **more)
    return list(found.devices)


def versions(topology: Topology) -> dict[str, str]:
    """What decides about the program besides our own code: compilers, and the flags they are given."""
    # The devices that are here may be of either platform, which only jax could say.
    platforms = [topology.chip.platform] if topology.chip else list(COMPILERS)
    names = ["jax", "jaxlib", *(name for platform in platforms for name in COMPILERS[platform][0])]
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return installed_versions(names) | {
        name: os.environ[name] for name in flags if os.environ.get(name)
    }


def lower(program: Any, batch: dict[str, Any]) -> tuple[Any, str]:
    """(the lowered step, digest of its text)."""
    import jax

    from llava_jax.train.program import abstract_flags

    with jax.set_mesh(program.mesh):
        flags = abstract_flags(program.mesh)
        lowered = program.step.lower(program.state, program.frozen, batch, flags)
    return lowered, hashlib.sha256(lowered.as_text().encode()).hexdigest()[:16]


def compile_step(lowered: Any, digest: str, arguments: int) -> Compiled:
    """Compiles; a TPU program that is too large is a result, not an error.

    arguments: bytes of a device that the step is given.
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except Exception as error:
        used = over_memory(str(error), arguments)
        if used is None:
            raise
        return Compiled(digest, False, used, seconds=round(time.monotonic() - start, 1))
    memory = compiled.memory_analysis()
    arguments, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    # XLA's own peak, where the version has it, counts what lives at once; else all temporaries do.
    whole = arguments + temporary + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or whole
    return Compiled(
        digest,
        True,
        int(peak),
        int(arguments),
        int(temporary),
        int(memory.host_temp_size_in_bytes + memory.host_argument_size_in_bytes),
        round(time.monotonic() - start, 1),
        compiled.as_text(),
    )


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def over_memory(message: str, arguments: int) -> int | None:
    """Bytes that a refused program wanted, from the compiler's message; None for another error.

    libtpu refuses in two ways: for all that a program needs, or for its temporaries alone.
    """
    if found := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", message):
        return int(float(found[1]) * _UNITS[found[2]])
    if found := re.search(r"required for HLO temporaries \(([\d.]+)([KMGT])\)", message):
        return int(float(found[1]) * _UNITS[found[2]]) + arguments
    return None
