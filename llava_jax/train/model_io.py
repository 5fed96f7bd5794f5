"""The model of a run: opened by its headers, placed on the mesh, checked, and written at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.config import LlavaConfig
from llava_jax.errors import ConfigError, WeightError
from llava_jax.llava import abstract_params, init_sharded, param_shardings
from llava_jax.sharding import replicated
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.vocabulary import load_fitting
from llava_jax.train.checks import fit_model
from llava_jax.train.distributed import is_main, on_main
from llava_jax.train.step import Params


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose headers were read and whose weights were not.

    config: as it will be trained. source: of llava_jax.convert.
    """

    config: LlavaConfig
    source: Any
    tokenizer: Tokenizer
    name: str


def open_model(config: Any) -> Opened:
    """The model that config.model names; reads no weights.

    Raises WeightError for a checkpoint that is incomplete or unknown, ConfigError for settings that
    contradict it.
    """
    from llava_jax.convert.opening import open_source
    from llava_jax.convert.source import Options

    m = config.model
    if not m.init:
        raise ConfigError("config.model.init is empty", fix="name a checkpoint folder or hub id")
    options = Options(m.base or None, m.vision_tower or None, m.allow_pickle)
    with fixes_as_settings():
        source = open_source(m.init, options)
    tokenizer = load_fitting(source.tokenizer, source.config.language.vocab_size, m.init)
    return Opened(fit_model(config, source.config), source, tokenizer, str(m.init))


_AS_SETTINGS = {
    r"--allow-pickle(?: \(allow_pickle=True\))?": "--config.model.allow_pickle=True",
    r"--vision-tower\b": "--config.model.vision_tower",
    r"--base\b": "--config.model.base",
}
"""What `llava-jax convert` calls an option, and a training run a setting."""


@contextlib.contextmanager
def fixes_as_settings() -> Iterator[None]:
    """Within it, a WeightError's fix names the settings of a run, not the options of `convert`."""
    try:
        yield
    except WeightError as error:
        fix = error.fix
        for option, setting in _AS_SETTINGS.items():
            fix = fix and re.sub(option, setting, fix)
        if fix == error.fix:
            raise
        raise WeightError(error.message, fix=fix) from error


def read_params(opened: Opened, seed: int, mesh: Mesh) -> Params:
    """Every parameter, straight onto its shards; adapters of a new LoRA run are made there.

    Raises WeightError naming a parameter that is not finite.
    """
    from llava_jax.convert.checkpoint import read_leaves

    shardings = param_shardings(opened.config, mesh)
    params = read_leaves(opened.source.leaves, shardings)
    check_finite(params, opened.name)
    missing = set(abstract_params(opened.config)) - set(params)
    if missing:  # open_source vouches for everything else
        params |= init_sharded(opened.config, seed, {n: shardings[n] for n in sorted(missing)})
    return params


def check_finite(params: Params, name: str) -> None:
    """Raises WeightError, naming the first parameters that hold a NaN or infinity.

    What lies after the feature layer of the tower is never run, and not looked at.
    """
    used = {n: v for n, v in params.items() if not n.startswith("vision.tail.")}
    finite = jax.device_get(jax.jit(_finite_by_layer)(used))
    bad = [n for n in used if not np.all(finite[n])]
    if not bad:
        return
    first = bad[0]
    layer = f" in layer {int(np.argmin(finite[first]))}" if np.ndim(finite[first]) else ""
    more = f", nor are {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    raise WeightError(
        f"{name}: {first} is not finite{layer}{more}",
        fix="llava-jax inspect MODEL --values lists them; take a checkpoint from before",
    )


def _finite_by_layer(params: Params) -> dict[str, jax.Array]:
    def one(name: str, value: jax.Array) -> jax.Array:
        axes = tuple(range(".layers." in name, value.ndim))
        return jnp.isfinite(value).all(axes)

    return {name: one(name, value) for name, value in params.items()}


def split_params(params: Params, names: set[str], dtype: Any) -> tuple[Params, Params]:
    """(trained ones in float32, the others in `dtype`); empties `params`, so that none is there twice."""
    trained, frozen = {}, {}
    for name in list(params):
        value = params.pop(name)
        if name in names:
            trained[name] = value.astype(jnp.float32)
        else:
            frozen[name] = value.astype(dtype)
    return trained, frozen


def save_model(folder: Path, opened: Opened, trained: Params) -> None:
    """Writes the trained model as a folder of this project's format (whole or not at all).

    What was not trained is copied from the files the run started from, in their own type: the copy
    on the devices was rounded to the compute dtype. With several processes the main one writes;
    parameters come to its host a layer at a time.
    """
    from llava_jax.convert import Checkpoint, save_checkpoint

    source = opened.source
    whole = {name: _on_host(name, value) for name, value in trained.items()}
    model = Checkpoint(
        opened.config,
        {**source.leaves, **whole},
        source.tokenizer,
        {"kind": source.kind, "path": opened.name},
        source.kept,
        source.extras,
    )
    on_main(lambda: save_checkpoint(model, folder, to="jax", overwrite=True))


def _on_host(name: str, value: jax.Array) -> Any:
    """`value` itself where this process sees all of it, else a copy of it in the main process."""
    if value.is_fully_addressable:
        return value
    mesh: Any = value.sharding
    copy = jax.jit(lambda x: x, out_shardings=replicated(mesh.mesh))
    if ".layers." not in name:
        whole = copy(value)
        return np.asarray(whole) if is_main() else None
    pick = jax.jit(lambda x, i: x[i], out_shardings=replicated(mesh.mesh))
    layers = []
    for i in range(len(value)):
        layer = pick(value, np.int32(i))
        if is_main():
            layers.append(np.asarray(layer))
    return np.stack(layers) if is_main() else None
