"""Which mesh axis each parameter and batch axis lies on. RULES is the only table.

Mesh axes: `data` splits the rows of the batch and replicates parameters; `fsdp` splits both; `context`
splits the positions of a row, and parameters with `fsdp`; `tensor` splits heads, MLP and vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.errors import ConfigError
from llava_jax.layers import is_variable

log = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "context", "tensor")
RULES: dict[str | None, tuple[str, ...]] = {
    "embed": ("fsdp", "context"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "vocab": ("tensor",),
    "layers": (),
    None: (),
}

ROWS = ("data", "fsdp")
BATCH = P(ROWS)
"""An array [B, ...] that has no axis of positions."""
SEQUENCE = P(ROWS, "context")
"""[B, T, ...]: tokens, embeddings, hidden states."""
QUERIES = P(ROWS, "context", "tensor")
"""Queries [B, T, N, H], and what attention gives for them."""
KEYS = P(ROWS, None, "tensor")
"""Keys and values [B, S, K, H] when attention reads them: every query sees all positions of its row."""
IMAGES = P((*ROWS, "context"))
"""The images of all rows [M, ...] in the tower, which has no axis of positions to split."""
_NO_POSITIONS = ("images", "target_at", "targets")
"""Arrays of a batch without an axis of positions."""


def make_mesh(
    data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, devices=None
) -> Mesh:
    """A mesh over all devices (or those given); one axis may be -1: whatever is left.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = [data, fsdp, context, tensor]
    given = " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(f"mesh {given}: sizes are positive, and at most one may be -1")
    known = int(np.prod([s for s in sizes if s > 0]))
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ConfigError(f"mesh {given} does not fit {len(devices)} devices")
    # Auto axes: with Explicit ones, jax.make_mesh's default, plain matmuls raise ShardingTypeError.
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, devices=devices, axis_types=(AxisType.Auto,) * len(MESH_AXES)
    )


def spec(name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh) -> P:
    """Where the parameter lies. An axis that its mesh axis does not divide stays whole, and is logged."""
    placed: list[str | tuple[str, ...] | None] = []
    for size, axis in zip(shape, axes):
        # Of several mesh axes, those that split something: what has one device on it goes without.
        over = RULES[axis][:1] + tuple(a for a in RULES[axis][1:] if mesh.shape[a] > 1)
        parts = math.prod(mesh.shape[a] for a in over)
        if size % parts:
            log.warning(
                "%s: axis %r of %d is not divisible by mesh axis %s=%d, kept whole",
                *(name, axis, size, " x ".join(over), parts),
            )
            over = ()
        placed.append(over if len(over) > 1 else (over[0] if over else None))
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
    return micro * math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(rows: int, mesh: Mesh, micro: int) -> None:
    """Raises ConfigError when the rows of a batch do not divide among micro-batches and devices."""
    parts = row_parts(mesh, micro)
    if rows % parts:
        raise ConfigError(
            f"the {rows} rows of a batch do not divide into {micro} micro-batches "
            f"on {parts // micro} devices (mesh data x fsdp)",
            fix=f"make batch_size a multiple of {parts}, or change config.mesh",
        )


def check_lengths(lengths: Iterable[int], mesh: Mesh) -> None:
    """Raises ConfigError for a padded length that the context axis does not divide."""
    parts = mesh.shape["context"]
    odd = [n for n in lengths if n % parts]
    if odd:
        raise ConfigError(
            f"rows of {odd[0]} positions cannot be split over mesh.context={parts}",
            fix=f"data.length_buckets and data.max_length must be multiples of {parts}",
        )


def own_row_parts(mesh: Mesh, micro: int) -> tuple[int, ...]:
    """Which of the `row_parts` this process holds, in the order in which `put_batch` takes them.

    Micro-batches are the first, second, ... rows of the batch for any number of processes. With a
    context or tensor axis over several processes, these hold the same rows.
    """
    across = row_parts(mesh, 1)
    return tuple(m * across + block for m in range(micro) for block in _own_blocks(mesh))


def _own_blocks(mesh: Mesh) -> list[int]:
    """The blocks along data x fsdp that lie on devices of this process."""
    blocks = mesh.devices.reshape(row_parts(mesh, 1), -1)
    here = jax.process_index()
    return [i for i, devices in enumerate(blocks) if any(d.process_index == here for d in devices)]


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, micro: int) -> dict[str, jax.Array]:
    """This process's rows of a global batch -> [micro, rows / micro, ...], split as SEQUENCE or BATCH.

    batch: the rows of `own_row_parts`, one part after the other; arrays that hold groups of rows are
    cut likewise. Raises as check_rows and check_lengths do.
    """
    blocks, across = _own_blocks(mesh), row_parts(mesh, 1)
    for value in batch.values():  # of rows, or of groups of rows
        check_rows(len(value) * across // len(blocks), mesh, micro)
    place = {block: i for i, block in enumerate(blocks)}

    def put(name: str, value: np.ndarray) -> jax.Array:
        partition = BATCH if name in _NO_POSITIONS else SEQUENCE
        if partition == SEQUENCE:
            check_lengths(value.shape[1:2], mesh)
        # Not -1: a batch without images has arrays of size 0.
        local = value.reshape(micro, len(value) // micro, *value.shape[1:])
        size = local.shape[1] // len(blocks)

        def shard(index) -> np.ndarray:
            start = place[(index[1].start or 0) // size] * size if size else 0
            return local[:, start : start + size, *index[2:]]

        shape = (micro, size * across, *value.shape[1:])
        sharding = NamedSharding(mesh, P(None, *partition))
        return jax.make_array_from_callback(shape, sharding, shard)

    return {name: put(name, value) for name, value in batch.items()}


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def constrain(x: jax.Array, partition: P) -> jax.Array:
    """with_sharding_constraint under `jax.set_mesh`; x itself where no mesh is set."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition)
