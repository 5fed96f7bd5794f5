"""What the flat parameters are: their names, their shapes, and whether these are the right ones.

A parameter is named by its place in the model: "language.layers.attn.q.kernel". Layers of a stack
are one parameter with a leading layer axis. Nothing here imports jax (2.5 s), so that tools can ask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from llava_jax.config import LINEARS, LanguageConfig, LlavaConfig, VisionConfig
from llava_jax.errors import ConfigError, WeightError, did_you_mean

V = TypeVar("V")

FLOATS = ("float32", "float16", "bfloat16")
"""The types that weights may have."""


# What a name means --------------------------------------------------------------------------------


def is_lora(name: str) -> bool:
    """Whether a parameter is of a LoRA adapter: a factor, or DoRA's magnitudes."""
    return name.endswith((".lora_a", ".lora_b", ".lora_m"))


def is_quantized(name: str) -> bool:
    """Whether an array is part of a kernel that is held in few bits: it is never trained or cast."""
    return name.endswith((".codes", ".scales"))


def weights_in(name: str, leaf: Any) -> int:
    """How many parameters an array stands for: nf4's codes hold two a byte, scales are none."""
    if name.endswith(".scales"):
        return 0
    return leaf.size * (2 if name.endswith(".codes") and leaf.dtype.name == "uint8" else 1)


def is_stacked(name: str) -> bool:
    """Whether a parameter holds all layers of a stack, with the layer as its first axis."""
    return ".layers." in name


def is_run(name: str) -> bool:
    """Whether the model computes with a parameter: the tower's layers after the feature layer are
    carried along for exports only."""
    return not name.startswith("vision.tail.")


def component(name: str) -> str:
    """The part of the model that a parameter belongs to: vision, projector, language or lora."""
    return "lora" if is_lora(name) else name.partition(".")[0]


def same_type(name: str) -> str:
    """The parameters that must have the type of `name`: those of its component. (Layers of the tower
    that are not run are apart, because no training touches them.)"""
    return component(name) if is_run(name) else "the layers that are not run"


# Whether these are the parameters -----------------------------------------------------------------


def check_params(
    found: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    where: str | Path = "",
    *,
    noun: str = "parameter",
    partial: bool = False,
    types: Callable[[str], str] | None = None,
    mixed: bool = False,
) -> None:
    """Raises WeightError, naming `where` and the parameter, unless `found` is what is `expected`.

    Only names, shapes and dtypes are looked at and no value is read, so that a checkpoint can be
    checked before it is streamed onto a mesh.

    Args:
      found: values by name; anything with `.shape` and `.dtype`, such as an array, a tracer, a
        jax.ShapeDtypeStruct, or a tensor of an open checkpoint.
      expected: shapes by name; `parameter_shapes` has those of a model.
      where: the file or folder, for the message. noun: what the message calls a value.
      partial: `found` may lack some of the expected names.
      types: the component of a name. With it, dtypes are checked too: floats of 16 or 32 bits, and
        the same one throughout a component. (A tensor of another type than its neighbours is the
        mark of a file that somebody edited.)
      mixed: allows a component to mix types.
    """
    unknown = [name for name in found if name not in expected]
    missing = [] if partial else [name for name in expected if name not in found]
    if unknown or missing:
        listed = [_listing(f"unknown {noun}", unknown), _listing(f"missing {noun}", missing)]
        near = islice(missing or expected, 2000)  # difflib takes 0.1 ms per name
        fix = did_you_mean(unknown[0], near, cutoff=0.85) if unknown else None
        raise WeightError(_at(where, "; ".join(filter(None, listed))), fix=fix)
    for name, value in found.items():
        have, want = list(value.shape), list(expected[name])
        if have != want:
            raise WeightError(_at(where, f"{name} has shape {have}, expected {want}"))
    if types is not None:
        _check_types(found, where, types, mixed)


def _check_types(
    found: Mapping[str, Any], where: str | Path, types: Callable[[str], str], mixed: bool
) -> None:
    components: dict[str, dict[str, str]] = {}
    for name, value in found.items():
        dtype = value.dtype.name
        if dtype not in FLOATS:
            said = f"{name} has type {dtype}, expected a float of 16 or 32 bits"
            quantised = value.dtype.kind in "iu"
            fix = "use the 16-bit weights" if quantised else None
            raise WeightError(_at(where, said), fix=fix)
        components.setdefault(types(name), {})[name] = dtype
    for part, dtypes in {} if mixed else components.items():
        (common, _), *others = Counter(dtypes.values()).most_common()
        if others:
            rare = others[-1][0]
            odd = _some([name for name, dtype in dtypes.items() if dtype == rare])
            other = next(name for name, dtype in dtypes.items() if dtype == common)
            raise WeightError(
                _at(where, f"{odd} is {rare}, the rest of {part} ({other}) is {common}"),
                fix="convert it with --mixed-types and --dtype to bring everything to one type",
            )


def unique(pairs: Iterable[tuple[str, V]], where: str | Path = "") -> dict[str, V]:
    """{name: value}. Raises WeightError for a duplicated name; as json's object_pairs_hook too."""
    found: dict[str, V] = {}
    for name, value in pairs:
        if name in found:
            files = [getattr(v, "origin", "") for v in (found[name], value)]
            more = f": {files[0]}, {files[1]}" if all(files) else ""
            raise WeightError(_at(where, f"{ascii(name)[1:-1][:120]} is duplicated{more}"))
        found[name] = value
    return found


def _at(where: str | Path, text: str) -> str:
    return f"{where}: {text}" if str(where) else text


def _listing(noun: str, names: list[str]) -> str:
    return f"{noun}{'s' * (len(names) > 1)} {_some(names)}" if names else ""


def _some(names: list[str], limit: int = 4) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# Names and shapes ---------------------------------------------------------------------------------


def parameter_shapes(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every parameter, LoRA's included where config.lora is set.

    A second statement of what llava_jax.llava builds; tests/test_params.py compares the two.
    """
    shapes = {**_vision(config.vision, config.vision_layers_run), **_projector(config)}
    shapes.update(_language(config.language))
    if config.lora:
        r, known = config.lora.rank, linears(config)
        for name in config.lora.targets:
            if name not in known:
                raise ConfigError(f"lora.targets: there is no linear layer {name!r}")
            *layers, d_in, d_out = shapes[f"{name}.kernel"]
            shapes[f"{name}.lora_a"] = (*layers, d_in, r)
            shapes[f"{name}.lora_b"] = (*layers, r, d_out)
            if config.lora.dora:
                shapes[f"{name}.lora_m"] = (*layers, d_out)
    return shapes


def linears(config: LlavaConfig) -> list[str]:
    """The linear layers that LoRA can adapt: all that are run but the head, stacks as one each."""
    kernels = (n for n in parameter_shapes(replace(config, lora=None)) if n.endswith(".kernel"))
    others = (
        "vision.patch_embed.kernel",
        "language.head.kernel",
    )  # a convolution; PEFT leaves it out
    return [n.removesuffix(".kernel") for n in kernels if is_run(n) and n not in others]


def _vision(c: VisionConfig, run: int) -> dict[str, tuple[int, ...]]:
    d, p = c.width, c.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "vision.patch_embed.kernel": (p, p, 3, d),
        "vision.class_embed": (d,),
        "vision.pos_embed": (1 + c.patches, d),
    }
    for norm in ("vision.pre_norm", "vision.tail.post_norm"):
        shapes |= {f"{norm}.scale": (d,), f"{norm}.bias": (d,)}
    for stack, n in (("vision.layers", run), ("vision.tail.layers", c.layers - run)):
        if not n:
            continue
        for norm in ("norm1", "norm2"):
            shapes |= {f"{stack}.{norm}.scale": (n, d), f"{stack}.{norm}.bias": (n, d)}
        for name in ("q", "k", "v", "out"):
            shapes[f"{stack}.attn.{name}.kernel"] = (n, d, d)
            shapes[f"{stack}.attn.{name}.bias"] = (n, d)
        for name, d_in, d_out in (("fc1", d, c.mlp_width), ("fc2", c.mlp_width, d)):
            shapes[f"{stack}.mlp.{name}.kernel"] = (n, d_in, d_out)
            shapes[f"{stack}.mlp.{name}.bias"] = (n, d_out)
    return shapes


def _projector(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    d_in, d_out = config.vision.width, config.language.width
    for i in range(config.projector_depth):
        shapes[f"projector.linear_{i}.kernel"] = (d_in, d_out)
        shapes[f"projector.linear_{i}.bias"] = (d_out,)
        d_in = d_out
    return shapes


def _language(c: LanguageConfig) -> dict[str, tuple[int, ...]]:
    n, d, f = c.layers, c.width, c.mlp_width
    q, kv = c.heads * c.head_width, c.kv_heads * c.head_width
    shapes: dict[str, tuple[int, ...]] = {
        "language.embed.embedding": (c.vocab_size, d),
        "language.layers.attn_norm.scale": (n, d),
        "language.layers.mlp_norm.scale": (n, d),
        "language.norm.scale": (d,),
    }
    sizes = ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))
    for name, (d_in, d_out) in zip(LINEARS, sizes):
        shapes[f"language.layers.{name}.kernel"] = (n, d_in, d_out)
        if c.attention_bias and name.startswith("attn"):
            shapes[f"language.layers.{name}.bias"] = (n, d_out)
    if not c.tied_head:
        shapes["language.head.kernel"] = (d, c.vocab_size)
    return shapes
