"""Parameters for generation: placed on the devices, decoder layers unstacked.

A scan over stacked layers copies each layer's weights out of the stack for every decoded token (CPU,
GPU) and the whole cache (GPU, TPU); separate layers are read, and their cache written, in place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llava_jax import llava
from llava_jax.config import LlavaConfig
from llava_jax.layers import Compute, no_rngs
from llava_jax.llava import Llava
from llava_jax.params import check_params, parameter_shapes
from llava_jax.quant import quantize

STACK = "language.layers."
_LAYER = re.compile(r"^language\.layers\.(\d+)\.(.+)$")

_transpose = jax.jit(jnp.transpose)
_pick = jax.jit(lambda stacked, i: jax.lax.dynamic_index_in_dim(stacked, i, keepdims=False))


def graph(config: LlavaConfig, compute: Compute, unrolled: bool) -> tuple[Any, nnx.State]:
    """(graphdef, abstract state) of the model; its decoder is a list of layers if `unrolled`."""

    def make():
        model = Llava(config, compute, rngs=no_rngs())
        if unrolled:
            model.language.unrolled()
        return model

    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(make))


def load(
    config: LlavaConfig,
    params: Mapping[str, Any],
    factors: Mapping[str, Any],
    compute: Compute,
    *,
    mesh: Mesh | None,
    unrolled: bool,
    consume: bool,
) -> tuple[Any, nnx.State]:
    """(graphdef, state) of a model over `params` and `factors`, the flat stacked parameters.

    config.quantize: the decoder's kernels are quantised on their way to the devices.
    consume: removes the arrays from `params` one by one, so that a large model never exists twice.
    Raises WeightError for a missing, unknown or misshapen parameter.
    """
    check_params({**params, **factors}, parameter_shapes(config))
    reduce = jax.jit(quantize, static_argnums=1)
    shardings = llava.param_shardings(replace(config, quantize=""), mesh) if mesh else {}
    if mesh and config.quantize:
        shardings |= llava.param_shardings(config, mesh)
    placed: dict[str, jax.Array] = {}
    # The largest first: while it is read, its file's pages are in memory too, and least else.
    sizes = {name: value.nbytes for kept in (params, factors) for name, value in kept.items()}
    for name in sorted(sizes, key=lambda n: sizes[n], reverse=True):
        kept = factors if name in factors else params
        value = kept.pop(name) if consume and kept is params else kept[name]  # type: ignore[attr-defined]
        sharding = shardings.get(name)
        held = bool(config.quantize) and name.startswith(STACK) and name.endswith(".kernel")
        for key, array in _kept(name, value, sharding, unrolled and name.startswith(STACK)):
            if not held:
                placed[key] = array
                continue
            # One by one: no more than this array is in memory in both forms.
            for last, part in zip(("codes", "scales"), reduce(array, config.quantize)):
                place = shardings.get(name.removesuffix("kernel") + last)
                if place is not None and key != name:
                    place = _of_layer(place)
                placed[key.removesuffix("kernel") + last] = _put(part, _fitting(place, part.shape))
        if hasattr(value, "release"):
            jax.block_until_ready(list(placed.values())[-1])
            value.release()
        del value
    graphdef, abstract = graph(config, compute, unrolled)
    filled = [
        (path, v.replace(placed[".".join(map(str, path))]))
        for path, v in nnx.to_flat_state(abstract)
    ]
    return graphdef, nnx.from_flat_state(filled)


def replaced(
    state: nnx.State, own: Mapping[str, Any], config: LlavaConfig, mesh: Mesh | None
) -> nnx.State:
    """A state with other values for some of its parameters, which lie where the old ones do."""
    shardings = llava.param_shardings(replace(config, quantize=""), mesh) if mesh else {}

    def one(path: tuple, held: Any) -> tuple[tuple, Any]:
        name = ".".join(map(str, path))
        return path, held.replace(_put(own[name], shardings.get(name))) if name in own else held

    return nnx.from_flat_state([one(*pair) for pair in nnx.to_flat_state(state)])


def _put(value: Any, sharding: NamedSharding | None) -> jax.Array:
    # Transposed values go as they lie: XLA transposes faster than numpy. Never a view of a file.
    value = value if isinstance(value, jax.Array) else np.asarray(value)
    if sharding is None and jax.default_backend() != "cpu" and _transposed(value):
        # A host's core transposes some 0.6 GB a second, an accelerator as fast as it copies.
        return _transpose(jax.device_put(value.T, may_alias=False))
    return jax.device_put(value, sharding, may_alias=False)


def _transposed(value: Any) -> bool:
    """Whether this is a matrix of the host that lies in memory by columns."""
    return isinstance(value, np.ndarray) and value.ndim == 2 and value.T.flags.c_contiguous


def _kept(
    name: str, value: Any, sharding: NamedSharding | None, apart: bool
) -> Iterator[tuple[str, jax.Array]]:
    """(name in the model, array) of a parameter; with `apart`, of each of its layers."""
    if not apart:
        yield name, _put(value, sharding)
        return
    one = None if sharding is None else _of_layer(sharding)
    for i in range(len(value)):
        layer = _pick(value, i) if isinstance(value, jax.Array) else value[i]
        yield f"{STACK}{i}.{name.removeprefix(STACK)}", _put(layer, one)


def _fitting(sharding: NamedSharding | None, shape: tuple[int, ...]) -> NamedSharding | None:
    """The sharding, or a copy on every device where it does not divide: a small model's few scales."""
    if sharding is None:
        return None
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return NamedSharding(sharding.mesh, P())
    return sharding


def _of_layer(sharding: NamedSharding) -> NamedSharding:
    return NamedSharding(sharding.mesh, P(*sharding.spec[1:]))


def stacked(state: nnx.State) -> Iterator[tuple[str, Any]]:
    """(name, array) of the flat stacked parameters, one at a time: the inverse of `load`."""
    groups: dict[str, dict[int, Any]] = {}
    for name, value in llava.flatten(state).items():
        if match := _LAYER.match(name):
            groups.setdefault(f"{STACK}{match[2]}", {})[int(match[1])] = value
        else:
            yield name, value
    for name, layers in groups.items():
        yield name, np.stack([np.asarray(layers[i]) for i in range(len(layers))])
