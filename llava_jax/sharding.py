"""Which mesh axis each parameter and batch axis lies on. RULES is the only table.

Mesh axes: `data` splits the rows of the batch and replicates parameters; `fsdp` splits both; `context`
splits the positions of a row, and parameters with `fsdp`; `tensor` splits heads, MLP and vocabulary.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError

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
LOOKED_UP = P("data", "context", "fsdp")
"""[B, T, D] as it comes from a table whose width is split."""
QUERIES = P(ROWS, "context", "tensor")
"""Queries [B, T, N, H], and what attention gives for them."""
IMAGES = P((*ROWS, "context"))
"""The images of all rows [M, ...] in the tower, which has no axis of positions to split."""
_NO_POSITIONS = ("images", "target_at", "targets", "files")
"""Arrays of a batch without an axis of positions."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    context: int = 1,
    slices: int = 0,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices (or those given); one axis may be -1: whatever is left.

    slices: groups of devices with fast links within them and slow ones between. The sizes are those of
    one slice; each slice holds its own part of the rows, so that `data` of the mesh is slices x data.
    0: the slices of a TPU that has several, else one.
    Raises ConfigError when the sizes do not multiply to the number of devices, or for slices that are
    not there.
    """
    devices = jax.devices() if devices is None else list(devices)
    of_tpu = len(_granules(devices)) if devices[0].platform == "tpu" else 1
    slices = slices or of_tpu
    sizes = [data, fsdp, context, tensor]
    given = " ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes))
    if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
        raise ConfigError(f"mesh {given}: sizes are positive, and at most one may be -1")
    known = math.prod(s for s in sizes if s > 0)
    if -1 in sizes:
        sizes[sizes.index(-1)] = len(devices) // slices // known
    if math.prod(sizes) * slices != len(devices):
        per = f" in each of {slices} slices" if slices > 1 else ""
        raise ConfigError(f"mesh {given}{per} does not fit {len(devices)} devices")
    # Auto axes: with Explicit ones, jax.make_mesh's default, plain matmuls raise ShardingTypeError.
    auto = (AxisType.Auto,) * len(MESH_AXES)
    if slices == of_tpu == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, devices=devices, axis_types=auto)
    return Mesh(_in_slices(devices, sizes, slices), MESH_AXES, axis_types=auto)


def _granules(devices: Sequence[Any]) -> set[Any]:
    """The slices that devices lie in; TPUs and GPUs know theirs."""
    return {getattr(d, "slice_index", None) for d in devices}


def _in_slices(devices: Sequence[Any], sizes: Sequence[int], slices: int) -> np.ndarray:
    """Devices by mesh axis, those of one slice after those of another along `data`.

    Where devices know no slice, or one alone, each process is a slice.
    """
    from jax.experimental.mesh_utils import create_hybrid_device_mesh

    by_process = len(_granules(devices)) == 1
    found = {d.process_index for d in devices} if by_process else _granules(devices)
    if len(found) != slices:
        what = "processes" if by_process else "slices"
        raise ConfigError(
            f"mesh.slices is {slices}, but the number of {what} is {len(found)}",
            fix=f"--config.mesh.slices={len(found)}",
        )
    across = (slices, *(1 for _ in MESH_AXES[1:]))
    return create_hybrid_device_mesh(tuple(sizes), across, devices, process_is_granule=by_process)


def alone() -> bool:
    """Whether the mesh that is set (jax.set_mesh) is of one device, or none is set."""
    return jax.sharding.get_abstract_mesh().size <= 1


# Parameters ----------------------------------------------------------------------------------------


def spec(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, units: Mapping[str, int]
) -> P:
    """Where a parameter lies. An axis that its mesh axes do not divide stays whole.

    units: of axes that are split by several entries at a time, such as the width of a head.
    """
    return P(*(_placed(size, axis, mesh, units) for size, axis in zip(shape, axes)))


def _placed(size: int, axis: str | None, mesh: Mesh, units: Mapping[str, int]) -> Any:
    # Of several mesh axes, those that split something: a name alone reads better than a tuple.
    over = tuple(a for i, a in enumerate(RULES[axis]) if i == 0 or mesh.shape[a] > 1)
    parts = math.prod(mesh.shape[a] for a in over)
    if size // units.get(axis or "", 1) % parts:
        return None
    return over if len(over) > 1 else next(iter(over), None)


def state_shardings(abstract: nnx.State, config: LlavaConfig, mesh: Mesh) -> nnx.State:
    """The same tree with a NamedSharding in place of each parameter; says what does not divide."""
    for line in undivided(config, mesh):
        _say_once(line)

    def one(path, variable):
        shape, axes = variable.get_value().shape, variable.out_sharding
        units = _head_widths(config, str(getattr(path[0], "key", path[0])))
        return variable.replace(NamedSharding(mesh, spec(shape, axes, mesh, units)))

    return jax.tree_util.tree_map_with_path(
        one, abstract, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def _head_widths(config: LlavaConfig, part: str) -> dict[str, int]:
    """The entries of a head, which stay together, of the tower or the language model."""
    width = config.language.head_width
    if part == "vision":
        width = config.vision.width // config.vision.heads
    return {"heads": width, "kv_heads": width}


def undivided(config: LlavaConfig, mesh: Mesh) -> list[str]:
    """A line for each size of the model that the mesh does not divide, with the setting that would.

    What is not divided is whole on every device of that mesh axis.
    """
    language, vision = config.language, config.vision
    tensor, lines, no_part = mesh.shape["tensor"], [], f"no part of {mesh.size} devices would"
    for what, size in (
        ("heads of the language model", language.heads),
        ("KV heads of the language model", language.kv_heads),
        ("entries of the vocabulary", language.vocab_size),
        ("entries of the language model's MLP", language.mlp_width),
        ("heads of the vision tower", vision.heads),
        ("entries of the vision tower's MLP", vision.mlp_width),
    ):
        if size % tensor:
            better = _divisor(size, tensor, mesh.size)
            lines.append(
                f"mesh.tensor={tensor} does not divide the {size:,} {what}, which stay whole on "
                f"every device; {f'mesh.tensor={better} would divide them' if better else no_part}"
            )
    shared = math.prod(mesh.shape[axis] for axis in RULES["embed"])
    for what, width in (("language model", language.width), ("vision tower", vision.width)):
        if width % shared:
            better = _divisor(width, shared, mesh.size)
            lines.append(
                f"mesh.fsdp x mesh.context = {shared} does not divide the width {width:,} of the "
                f"{what}, whose parameters stay whole on every device; "
                + (f"{better} would divide it, with mesh.data for the rest" if better else no_part)
            )
    return lines


def _divisor(size: int, wanted: int, devices: int) -> int:
    """The part of the devices nearest below `wanted`, else above, that divides `size`; 0 if none does."""
    found = [n for n in range(2, devices + 1) if size % n == devices % n == 0]
    return max((n for n in found if n <= wanted), default=min(found, default=0))


@functools.cache
def _say_once(line: str) -> None:
    log.warning("%s", line)


# Batches -------------------------------------------------------------------------------------------


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
            fix=f"make data.length_buckets and data.max_length, packed data.pack_length, multiples of {parts}",
        )


def own_row_parts(mesh: Mesh, micro: int) -> tuple[int, ...]:
    """Which of the `row_parts` this process holds, in the order in which `put_batch` takes them.

    Micro-batches are the first, second, ... rows of the batch for any number of processes. With a
    context or tensor axis over several processes, these hold the same rows.
    """
    across = row_parts(mesh, 1)
    return tuple(m * across + block for m in range(micro) for block in _own_blocks(mesh))


def counted_row_parts(mesh: Mesh, micro: int) -> tuple[int, ...]:
    """Those of `own_row_parts` that this process counts, so that each row is counted by one process."""
    across = row_parts(mesh, 1)
    blocks = mesh.devices.reshape(across, -1)
    first = [min(d.process_index for d in devices) for devices in blocks]
    here = jax.process_index()
    return tuple(p for p in own_row_parts(mesh, micro) if first[p % across] == here)


def _own_blocks(mesh: Mesh) -> list[int]:
    """The blocks along data x fsdp that lie on devices of this process."""
    blocks = mesh.devices.reshape(row_parts(mesh, 1), -1)
    here = jax.process_index()
    return [i for i, devices in enumerate(blocks) if any(d.process_index == here for d in devices)]


def batch_array_sharding(name: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """How an array of a batch lies, cut into micro-batches [micro, rows, ...]: as SEQUENCE or BATCH.

    shape: [rows, ...]. Raises as check_lengths does.
    """
    if name in _NO_POSITIONS:
        return NamedSharding(mesh, P(None, *BATCH))
    check_lengths(shape[1:2], mesh)
    return NamedSharding(mesh, P(None, *SEQUENCE))


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
        sharding = batch_array_sharding(name, value.shape, mesh)
        # Not -1: a batch without images has arrays of size 0.
        local = value.reshape(micro, len(value) // micro, *value.shape[1:])
        size = local.shape[1] // len(blocks)

        def shard(index) -> np.ndarray:
            start = place[(index[1].start or 0) // size] * size if size else 0
            return local[:, start : start + size, *index[2:]]

        shape = (micro, size * across, *value.shape[1:])
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
