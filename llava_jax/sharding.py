"""Which mesh axis each parameter and batch axis lies on. RULES is the only table.

Mesh axes: `data` replicates parameters and splits the batch; `fsdp` splits both; `tensor` splits
heads, MLP and vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.errors import ConfigError
from llava_jax.layers import is_variable

log = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")
RULES: dict[str | None, str | None] = {
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}
BATCH = P(("data", "fsdp"))


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh over all devices (or those given); one axis may be -1: whatever is left.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(f"mesh {sizes}: sizes are positive, and at most one may be -1")
    known = int(np.prod([s for s in sizes if s > 0]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {len(devices)} devices"
        )
    # Auto axes: with Explicit ones, jax.make_mesh's default, plain matmuls raise ShardingTypeError.
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def spec(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> P:
    """Where the parameter lies. An axis that its mesh axis does not divide stays whole, and is logged."""
    placed: list[str | None] = []
    for size, axis in zip(shape, axes):
        target = RULES[axis]
        if target is not None and size % mesh.shape[target]:
            log.warning(
                "%s: axis %r of %d is not divisible by mesh axis %s=%d, kept whole",
                *(name, axis, size, target, mesh.shape[target]),
            )
            target = None
        placed.append(target)
    return P(*placed)


def state_shardings(abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """The same tree with a NamedSharding in place of each parameter."""

    def one(path, variable):
        name = ".".join(str(getattr(p, "key", p)) for p in path)
        value = variable.get_value()
        return variable.replace(
            NamedSharding(mesh, spec(name, value.shape, variable.out_sharding, mesh))
        )

    return jax.tree_util.tree_map_with_path(one, abstract, is_leaf=is_variable)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, everything else whole."""
    return NamedSharding(mesh, BATCH)


def row_parts(mesh: Mesh, micro: int) -> int:
    """Into how many equal pieces the rows of a global batch are cut: micro-batches x data x fsdp."""
    return micro * mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(rows: int, mesh: Mesh, micro: int) -> None:
    """Raises ConfigError when the rows of a batch do not divide among micro-batches and devices."""
    parts = row_parts(mesh, micro)
    if rows % parts:
        raise ConfigError(
            f"the {rows} rows of a batch do not divide into {micro} micro-batches "
            f"on {parts // micro} devices (mesh data x fsdp)",
            fix=f"make batch_size a multiple of {parts}, or change config.mesh",
        )


def own_row_parts(mesh: Mesh, micro: int) -> tuple[int, ...]:
    """Which of the `row_parts` this process holds, in the order in which `put_batch` takes them.

    Micro-batches are the first, second, ... rows of the batch for any number of processes. With a
    tensor axis over several processes, these hold the same rows.
    """
    across = row_parts(mesh, 1)
    return tuple(m * across + block for m in range(micro) for block in _own_blocks(mesh))


def _own_blocks(mesh: Mesh) -> list[int]:
    """The blocks along data x fsdp that lie on devices of this process."""
    blocks = mesh.devices.reshape(row_parts(mesh, 1), mesh.shape["tensor"])
    here = jax.process_index()
    return [i for i, devices in enumerate(blocks) if any(d.process_index == here for d in devices)]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, micro: int) -> dict[str, jax.Array]:
    """This process's rows of a global batch -> [micro, rows / micro, ...], rows split as BATCH.

    batch: the rows of `own_row_parts`, one part after the other. Raises as check_rows does.
    """
    sharding = NamedSharding(mesh, P(None, *BATCH))
    blocks, across = _own_blocks(mesh), row_parts(mesh, 1)
    here = len(next(iter(batch.values())))
    check_rows(here * across // len(blocks), mesh, micro)
    size = here // (micro * len(blocks))
    place = {block: i * size for i, block in enumerate(blocks)}

    def put(value: np.ndarray) -> jax.Array:
        # Not -1: a batch without images has arrays of size 0.
        local = value.reshape(micro, len(value) // micro, *value.shape[1:])

        def shard(index) -> np.ndarray:
            start = place[(index[1].start or 0) // size] if size else 0
            return local[:, start : start + size]

        shape = (micro, size * across, *value.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: put(value) for name, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, partition: P) -> jax.Array:
    """with_sharding_constraint under `jax.set_mesh`; x itself where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition)
