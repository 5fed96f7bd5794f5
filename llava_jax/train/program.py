"""The one compiled step of a run, from settings, sizes and parameters of which only shapes matter.

The training loop, `llava-jax plan` and `python -m bench train` all build their step here, so what is planned or
measured is what a run executes. The devices of the mesh need not be there: jax.experimental.topologies
has some to compile for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute
from llava_jax.llava import abstract_params, param_shardings
from llava_jax.sharding import batch_array_sharding, check_rows, replicated
from llava_jax.train.control import Flags, with_flags
from llava_jax.train.groups import Group, trained_groups
from llava_jax.train.model_io import compute_of, split_params
from llava_jax.train.optim import make_optimizer
from llava_jax.train.select import trainable_names
from llava_jax.train.step import Params, TrainState, make_loss, make_step, no_recent


@dataclass(frozen=True)
class Program:
    """The step of a run and what it works on.

    state, frozen: jax.ShapeDtypeStructs with shardings: what `step` takes, none of it in memory.
    groups: what the rows of metrics["norms"] are of, by title.
    step: jitted (state, frozen, batch, flags) -> (state, metrics); donates the state. To be called or
    lowered under jax.set_mesh(mesh), with a batch as put_batch or `abstract_batch` makes it.
    """

    mesh: Mesh
    compute: Compute
    optimizer: optax.GradientTransformation
    groups: dict[str, Group]
    state: TrainState
    frozen: Params
    step: Callable

    def start(self, trained: Params) -> TrainState:
        """The state before the first step. trained: float32, lying as `state.params` says."""
        return TrainState(
            jax.jit(lambda: jnp.int32(0), out_shardings=replicated(self.mesh))(),
            trained,
            jax.jit(self.optimizer.init, out_shardings=_places(self.state.opt_state))(trained),
            None
            if self.state.recent is None
            else jax.jit(no_recent, out_shardings=replicated(self.mesh))(),
        )


def make_program(
    config: Any,
    model: LlavaConfig,
    params: Mapping[str, Any],
    mesh: Mesh,
    steps: int,
    compute: Compute | None = None,
    files: int = 0,
) -> Program:
    """The step of a run of `steps` steps with settings `config` (configs/common.py).

    params: every parameter by name, with shape, dtype and sharding: arrays, or `planned_params`.
    compute: how the network computes; None: as compute_of says. files: of how many data files the loss
    is to be told apart.
    Raises ConfigError for a part of config.trainable that the model does not have.
    """
    compute = compute or compute_of(config, model, mesh)
    names = trainable_names(params, config.trainable)
    trained, frozen = _split(params, names, compute.dtype)
    optimizer, _ = make_optimizer(config, sorted(names), steps)
    groups = trained_groups(config, names)
    count: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(
        count,
        trained,
        _like_params(jax.eval_shape(optimizer.init, trained), trained, mesh),
        _placed(jax.eval_shape(no_recent), replicated(mesh)) if config.skip_spikes else None,
    )
    loss = make_loss(model, compute, config.loss_groups, config.z_loss, files)
    dropout = model.lora and model.lora.dropout
    seed = config.seed if dropout else None
    step = make_step(
        loss,
        optimizer,
        average=config.loss_average,
        seed=seed,
        groups=[g.names for g in groups.values()],
        spikes=config.skip_spikes,
        by_file=files > 0,
    )
    places = (_places(state), replicated(mesh))
    step_fn = jax.jit(with_flags(step), donate_argnums=0, out_shardings=places)
    return Program(mesh, compute, optimizer, groups, state, frozen, step_fn)


def planned_params(model: LlavaConfig, mesh: Mesh) -> Params:
    """Every parameter of `model` as it would lie on `mesh`; none is made."""
    places: Any = param_shardings(model, mesh)
    return {name: _placed(leaf, places[name]) for name, leaf in abstract_params(model).items()}


def abstract_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, micro: int) -> dict[str, Any]:
    """ShapeDtypeStructs of what `put_batch` makes of all rows of a global batch. Raises as it does."""
    for value in batch.values():  # of rows, or of groups of rows
        check_rows(len(value), mesh, micro)
    return {
        name: jax.ShapeDtypeStruct(
            (micro, len(value) // micro, *value.shape[1:]),
            value.dtype,
            sharding=batch_array_sharding(name, value.shape, mesh),
        )
        for name, value in batch.items()
    }


def abstract_flags(mesh: Mesh) -> Any:
    """ShapeDtypeStruct of what `put_flags` makes."""
    place = NamedSharding(mesh, P(mesh.axis_names))
    return jax.ShapeDtypeStruct((mesh.size, len(Flags._fields)), jnp.int32, sharding=place)


# Shapes --------------------------------------------------------------------------------------------


def _placed(leaf: Any, sharding: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _places(tree: Any) -> Any:
    """The sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _split(params: Mapping[str, Any], names: set[str], dtype: Any) -> tuple[Params, Params]:
    """What split_params makes of `params`, on shapes alone."""
    bare = {name: jax.ShapeDtypeStruct(p.shape, p.dtype) for name, p in params.items()}
    parts = jax.eval_shape(lambda tree: split_params(dict(tree), names, dtype), bare)
    trained, frozen = (
        {name: _placed(leaf, params[name].sharding) for name, leaf in part.items()}
        for part in parts
    )
    return trained, frozen


def _like_params(opt_state: Any, trained: Params, mesh: Mesh) -> Any:
    """Placed like this: moments as their parameter, counters replicated."""

    def place(path, leaf):
        for key in reversed(path):
            name = getattr(key, "key", None)
            if name in trained and leaf.ndim:
                return _placed(leaf, trained[name].sharding)
        return _placed(leaf, replicated(mesh))

    return jax.tree_util.tree_map_with_path(place, opt_state)
