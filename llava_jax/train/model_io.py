"""The model of a run: opened by its headers, placed on the mesh, checked, and written at the end."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llava_jax.attention import Need, choose
from llava_jax.config import LlavaConfig, LoraConfig
from llava_jax.data.settings import as_trained
from llava_jax.errors import ConfigError, WeightError
from llava_jax.layers import Compute, column_norms
from llava_jax.llava import abstract_params, head_widths, init_sharded, param_shardings
from llava_jax.params import (
    is_lora,
    is_quantized,
    is_run,
    is_stacked,
    linears,
    parameter_shapes,
)
from llava_jax.quant import dequantize, quantize
from llava_jax.settings import TRAINING
from llava_jax.sharding import replicated
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.vocabulary import load_fitting
from llava_jax.train.distributed import is_main, together
from llava_jax.train.select import rates, select, trainable_names
from llava_jax.train.step import Params
from llava_jax.train.supervise import alive

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model whose headers were read and whose weights were not.

    config: as it will be trained. source: of llava_jax.convert.
    """

    config: LlavaConfig
    source: Any
    tokenizer: Tokenizer
    name: str


_AS_SETTINGS = {
    r"--allow-pickle(?: \(allow_pickle=True\))?": "--config.model.allow_pickle=True",
    r"--vision-tower\b": "--config.model.vision_tower",
    r"--base\b": "--config.model.base",
}
"""{option of `llava-jax convert`, as the fix of its errors names it: setting of a run}"""


def open_model(config: Any) -> Opened:
    """The model that config.model names; reads no weights.

    Raises WeightError for a checkpoint that is incomplete or unknown, ConfigError for settings that
    contradict it.
    """
    from llava_jax.convert import Options, open_source
    from llava_jax.convert.checkpoint import COMPLETE, kind_of

    m = config.model
    if not m.init:
        raise ConfigError("model.init is empty", fix="name a checkpoint folder or hub id")
    try:
        # Settings for a checkpoint without a tower or projector: stages share them, the first one adds it.
        kind = kind_of(m.init, m.allow_pickle)
        tower = None if kind in COMPLETE else m.vision_tower or None
        projector = m.projector if kind == "llama" else None
        options = Options(m.base or None, tower, m.allow_pickle, projector=projector)
        source = open_source(m.init, options)
    except WeightError as error:
        fix = error.fix or ""
        for option, setting in _AS_SETTINGS.items():
            fix = re.sub(option, setting, fix)
        raise WeightError(error.message, fix=fix or None) from error
    _warn_unread(m, kind, source)
    tokenizer = load_fitting(source.tokenizer, source.config.language.vocab_size, m.init)
    return Opened(fit_model(config, source.config), source, tokenizer, str(m.init))


def _warn_unread(m: Any, kind: str, source: Any) -> None:
    """Warns of a tower or projector in the settings `m` that is not the one that the model has already."""
    from llava_jax.convert.checkpoint import COMPLETE

    # What an earlier stage was joined with is in the metadata of its export.
    own = source.metadata.get("original", {}).get("tower", {}).get("name")
    if kind in COMPLETE and m.vision_tower and m.vision_tower != own:
        words = "model.vision_tower %s is not read: %s holds its own"
        log.warning(words, m.vision_tower, m.init)
    new = kind == "llama" or m.projector == TRAINING["model.projector"].default
    if not new and m.projector != source.config.projector:
        words = "model.projector %s has no effect: %s holds its own, %s"
        log.warning(words, m.projector, m.init, source.config.projector)


def fit_model(config: Any, model: LlavaConfig) -> LlavaConfig:
    """The configuration of `model`, a checkpoint's, as `config` trains it: with LoRA and length.

    How it squares images and which template it has are from the data settings from here on.
    Raises ConfigError for settings that the model cannot follow. An adapter that is continued keeps
    its own rank, scale and layers: settings that differ from them are an error.
    """
    model = as_trained(config.data, model)
    length, positions = config.data.max_length or 0, model.language.max_positions
    if length > positions:
        raise ConfigError(
            f"data.max_length is {length}, but the model has {positions} positions",
            fix=f"--config.data.max_length={positions}",
        )
    lora = _new_lora(config, model) if config.lora_rank else model.lora
    if lora and model.lora:
        for name in ("rank", "alpha", "rslora", "dora", "targets"):
            wanted, own = getattr(lora, name), getattr(model.lora, name)
            if wanted != own:
                raise ConfigError(
                    f"lora_{name} {_short(wanted)} differs from the adapter that "
                    f"{config.model.init} holds: {_short(own)}",
                    fix="--config.lora_rank=0 continues the adapter as it is",
                )
    if "lora" in config.trainable and lora is None:
        raise ConfigError("'lora' is in trainable, but there are no adapters", fix="set lora_rank")
    fitted = dataclasses.replace(
        model, lora=lora, quantize=config.quantize, max_length=length or model.max_length
    )
    names = (abstract_params if fitted.quantize else parameter_shapes)(fitted)
    names = trainable_names(names, config.trainable)
    rates(names, config)  # for what it raises
    if config.lora_rank and not any(map(is_lora, names)):
        raise ConfigError(
            f"lora_rank is {config.lora_rank}, but no word of trainable covers the adapters",
            fix="add lora to trainable",
        )
    return fitted


def _new_lora(config: Any, model: LlavaConfig) -> LoraConfig:
    """The adapters that the settings ask for, on the linear layers of `model` that they name."""
    known = linears(model)
    chosen = {
        name
        for word in config.lora_targets
        for name in select("lora_targets", word, known, "linear layer")
    }
    return LoraConfig(
        config.lora_rank,
        config.lora_alpha,
        config.lora_dropout,
        config.lora_rslora,
        config.lora_dora,
        tuple(name for name in known if name in chosen),
    )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value[:3]) + f" and {len(value) - 3} more" * (len(value) > 3)
    return f"{value:g}" if isinstance(value, float) else str(value)


def compute_of(config: Any, model: LlavaConfig, mesh: Mesh, turns: bool | None = None) -> Compute:
    """How the network computes, by a run's settings, on the devices of `mesh`.

    turns: whether some sample may have independent turns; None: as data.turns says.
    Raises ConfigError for a setting `attention` that the devices or the data do not allow.
    """
    turns = bool(config.data.turns == "independent" if turns is None else turns)
    need = Need(
        config.dtype,
        packed=bool(config.data.pack),
        turns=turns,
        window=model.language.sliding_window is not None,
        context=mesh.shape.get("context", 1),
        heads=head_widths(model),
    )
    kernel = choose(mesh.devices.flat[0], need, config.attention)
    return Compute(jnp.dtype(config.dtype), config.remat, config.unroll_layers, kernel, turns)


def read_params(opened: Opened, seed: int, mesh: Mesh, dtype: Any = jnp.float32) -> Params:
    """Every parameter, straight onto its shards; adapters of a new LoRA run are made there.

    With config.quantize the decoder's kernels are quantised as they are read, one stack after the
    other, from `dtype`. dtype: in which frozen parameters will be computed with.
    Raises WeightError naming a parameter that is not finite.
    """
    from llava_jax.convert import read_leaves

    config, leaves = opened.config, opened.source.leaves
    shardings = param_shardings(config, mesh)
    held = {n.removesuffix(".codes") for n in shardings if n.endswith(".codes")}
    kernels = {f"{name}.kernel" for name in held}
    params = read_leaves({n: v for n, v in leaves.items() if n not in kernels}, shardings)
    check_finite(params, opened.name)
    if held:
        plain = param_shardings(dataclasses.replace(config, quantize=""), mesh)
    for name in sorted(held):
        kernel = f"{name}.kernel"
        whole = read_leaves({kernel: leaves[kernel]}, plain)
        check_finite(whole, opened.name)
        places = shardings[f"{name}.codes"], shardings[f"{name}.scales"]
        make = jax.jit(lambda x: quantize(x.astype(dtype), config.quantize), out_shardings=places)
        params[f"{name}.codes"], params[f"{name}.scales"] = make(whole.pop(kernel))
    missing = sorted(set(abstract_params(config)) - set(params))
    if missing:  # open_source vouches for everything else
        params |= init_sharded(config, seed, {n: shardings[n] for n in missing})
    for name in (n for n in missing if n.endswith(".lora_m")):
        norms = jax.jit(_column_norms, static_argnums=1, out_shardings=shardings[name])
        params[name] = norms(_of_linear(params, name), dtype)
    return params


def _of_linear(params: Params, name: str) -> Params:
    """The parameters of the linear layer that `name` belongs to, by their last names."""
    place = name.rpartition(".")[0]
    return {n.rpartition(".")[2]: v for n, v in params.items() if n.rpartition(".")[0] == place}


def _column_norms(linear: Params, dtype: Any) -> jax.Array:
    """DoRA's first magnitudes: the norms of the columns of the kernel as it is computed with."""
    if "kernel" in linear:
        return column_norms(linear["kernel"].astype(dtype))
    d_in = linear["lora_a"].shape[-2]
    return column_norms(dequantize(linear["codes"], linear["scales"], d_in))


def check_finite(params: Params, name: str) -> None:
    """Raises WeightError, naming the first parameters that hold a NaN or infinity.

    The tower's layers after the feature layer are not checked: the model does not run them.
    """
    used = {n: v for n, v in params.items() if is_run(n)}
    finite = jax.device_get(jax.jit(_finite_by_layer)(used))
    bad = [n for n in used if not finite[n].all()]
    if not bad:
        return
    first = bad[0]
    layer = f" in layer {finite[first].argmin()}" if finite[first].ndim else ""
    more = f", nor are {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    raise WeightError(
        f"{name}: {first} is not finite{layer}{more}",
        fix="llava-jax inspect MODEL --values lists them; use an earlier checkpoint",
    )


def _finite_by_layer(params: Params) -> dict[str, jax.Array]:
    """bool[L] of stacked parameters, bool[] of others."""
    return {
        name: jnp.isfinite(value).all(tuple(range(is_stacked(name), value.ndim)))
        for name, value in params.items()
    }


def split_params(params: Params, names: set[str], dtype: Any) -> tuple[Params, Params]:
    """(trained ones in float32, the others in `dtype`); empties `params`, so that none exists twice."""
    trained, frozen = {}, {}
    for name in list(params):
        value = params.pop(name)
        if name in names:
            trained[name] = value.astype(jnp.float32)
        else:
            frozen[name] = value if is_quantized(name) else value.astype(dtype)
    return trained, frozen


def save_model(folder: Path, opened: Opened, trained: Params) -> None:
    """Writes the trained model as a folder of this project's format (whole or not at all).

    What was not trained is copied from the files the run started from, in their own type: the copy
    on the devices was rounded to the compute dtype. The main process writes. Parameters come to its
    host a layer at a time, when their turn to be written has come.
    """
    from llava_jax.convert import Checkpoint, save_checkpoint

    source = opened.source
    stream = Stream(trained)
    config = dataclasses.replace(opened.config, quantize="")
    held = {"quantized_base": {"type": opened.config.quantize}} if opened.config.quantize else {}
    model = Checkpoint(
        config,
        {**source.leaves, **stream.leaves()},
        source.tokenizer,
        {"kind": source.kind, "path": opened.name},
        source.metadata | held,
        source.buffers,
    )

    def save() -> None:
        with stream:
            save_checkpoint(model, folder, to="jax", overwrite=True)

    together(save if is_main() else stream.serve)


class Stream:
    """Sharded parameters as tensors that come to the main process when it reads them.

    Gathering a layer takes every process. The main one says which, in the order in which it reads;
    the others `serve` until it leaves the context.
    """

    def __init__(self, params: Params):
        # A place for each tensor: the same list in every process.
        self._places = [
            (name, layer)
            for name, value in params.items()
            for layer in (range(len(value)) if is_stacked(name) else [None])
        ]
        self._params = params
        mesh = cast(Any, next(iter(params.values())).sharding).mesh
        self._whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))
        self._layer = jax.jit(lambda x, i: x[i], out_shardings=replicated(mesh))

    def leaves(self) -> dict[str, Any]:
        """{name: llava_jax.convert Leaf} of the parameters; to be read within the context."""
        from llava_jax.convert.io.lazy import Lazy, Leaf

        parts: dict[str, list[Lazy]] = {}
        for number, (name, layer) in enumerate(self._places):
            value = self._params[name]
            shape = value.shape if layer is None else value.shape[1:]
            read = functools.partial(self._ask, number)
            parts.setdefault(name, []).append(Lazy(shape, np.dtype(value.dtype), read, name))
        return {name: Leaf(tuple(found), is_stacked(name)) for name, found in parts.items()}

    def serve(self) -> None:
        """Takes part in what the main process reads, until it is done."""
        while (number := _from_main(-1)) >= 0:
            self._gather(number)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        _from_main(-1)

    def _ask(self, number: int) -> np.ndarray:
        return np.asarray(self._gather(_from_main(number)))

    def _gather(self, number: int) -> jax.Array:
        """A whole tensor on every device, by every process."""
        alive(steps=False)
        name, layer = self._places[number]
        if layer is None:
            return self._whole(self._params[name])
        return self._layer(self._params[name], np.int32(layer))


def _from_main(number: int) -> int:
    """The number that the main process calls this with, in every process."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))
