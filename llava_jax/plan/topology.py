"""Names of machines: v5p-128, 2xv5e-256, 8xA100-40, here. Imports no jax.

v5p-N counts cores, as Cloud TPU does, so N/2 chips; v5e-N and v6e-N count chips. SLICESxv5e-N is
several slices over the data center's network, NxH100 is N GPUs, 8 to a host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llava_jax.chips import CHIPS, Chip
from llava_jax.errors import ConfigError

HERE = "here"
EXAMPLES = "v5e-8, v5p-128, 2xv5e-256, 8xA100-40, 16xH100, 1xH200 or here"


@dataclass(frozen=True)
class Topology:
    """A machine. chip: None for the devices that are here.

    devices: in all. slices: groups of devices joined by fast links (ICI, NVLink); DCN joins the groups.
    grid: of one TPU slice.
    """

    name: str
    chip: Chip | None
    devices: int
    slices: int = 1
    grid: tuple[int, ...] = ()


def parse_topology(name: str) -> Topology:
    """The machine called `name`. Raises ConfigError for a name or size that does not exist."""
    if name == HERE:
        return Topology(name, None, 0)
    if found := re.fullmatch(r"(?:(\d+)x)?(v5e|v6e|v5p)-(\d+)", name):
        return _tpu(name, int(found[1] or 1), CHIPS[found[2]], int(found[3]))
    if found := re.fullmatch(r"(\d+)x(\w+(?:-\d+)?)", name):
        chip = {n.lower(): c for n, c in CHIPS.items() if c.platform == "cuda"}.get(
            found[2].lower()
        )
        if chip:
            return _gpu(name, int(found[1]), chip)
    raise ConfigError(f"no topology {name!r}", fix=f"for example {EXAMPLES}")


def _tpu(name: str, slices: int, chip: Chip, size: int) -> Topology:
    if not slices:
        raise ConfigError(f"no topology {name!r}: it has no slice", fix=f"for example {EXAMPLES}")
    chips = size // 2 if chip.name == "v5p" else size
    powers = chips.bit_length() - 1
    exists = chips and chips == 2**powers and powers != 1 and powers < 14
    if not exists or (chip.name == "v5p" and (size % 2 or chips == 1)):
        sizes = "8, 16, 32, ... cores" if chip.name == "v5p" else "1, 4, 8, 16, ... chips"
        raise ConfigError(f"no topology {name!r}: {chip.name} slices have {sizes}")
    # The usual slices: as near to a square or a cube as powers of two come.
    sides = 3 if chip.name == "v5p" else 2
    grid = tuple(2 ** ((powers + side) // sides) for side in range(sides))
    if grid == (1, 2, 2):
        grid = (2, 2, 1)
    return Topology(name, chip, slices * chips, slices, grid)


def _gpu(name: str, count: int, chip: Chip) -> Topology:
    hosts = -(-count // chip.per_host)
    if not count:
        raise ConfigError(f"no topology {name!r}: it has no GPU", fix=f"for example 8x{chip.name}")
    if hosts > 1 and count % chip.per_host:
        whole = f"{(hosts - 1) * chip.per_host}x{chip.name} or {hosts * chip.per_host}x{chip.name}"
        raise ConfigError(
            f"no topology {name!r}: hosts have {chip.per_host} GPUs, and several hosts are whole ones",
            fix=f"name {whole}",
        )
    return Topology(name, chip, count, hosts)
