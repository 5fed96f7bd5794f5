"""A language model alone: joined with a CLIP tower, or added to a delta that was made from it."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.convert.formats.tower import Tower, open_tower, tower_leaves
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import hub
from llava_jax.convert.io.lazy import Lazy, Leaf, of_array, summed
from llava_jax.convert.source import Options, Source, identify
from llava_jax.convert.table import keys, language
from llava_jax.convert.vocabulary import EMBED, HEAD
from llava_jax.errors import WeightError
from llava_jax.reader import config_of

log = logging.getLogger(__name__)

STAGE1_LENGTH = 2048  # model_max_length of all training scripts of the original


def open_language(folder: Path, options: Options) -> Source:
    """A LlamaForCausalLM (or Mistral) folder: the language half of a checkpoint."""
    data = folders.model_config(folder)
    generation = folders.read_json(folder / "generation_config.json")
    config = LlavaConfig(
        language=language.language_config(data, str(folder / "config.json"), generation)
    )
    state, files = folders.read_folder(folder, options.allow_pickle)
    leaves, rest = keys.to_jax(state, keys.LLAMA, config, where=str(folder), mixed=options.mixed)
    metadata = {"llama": {"config": data, "generation_config": generation}}
    buffers = {f"llama:{n}": t for n, t in rest.items()}
    tokenizer = folders.tokenizer_folder(folder)
    return Source("llama", config, leaves, metadata, buffers, files, tokenizer)


def with_tower(
    lm: Source, tower: Tower, config: LlavaConfig, data: dict[str, Any], options: Options
) -> Source:
    """A language model with a tower, and no projector yet.

    config: of the whole. data: the original's config.json for it, {} where there is none.
    """
    vision, buffers, files = tower_leaves(tower, config, options)
    original = {"config": data, "tower_inside": False, "tower": tower.metadata}
    return Source(
        "joined",
        config,
        {**vision, **lm.leaves},
        {"original": original, **lm.metadata},
        lm.buffers | buffers,
        lm.files + files,
        lm.tokenizer,
    )


def open_joined(folder: Path, options: Options) -> Source:
    """CLIP + a language model + a projector of random weights: where stage 1 starts.

    Raises WeightError without options.vision_tower.
    """
    if options.vision_tower is None:
        raise WeightError(
            f"{folder} is a language model alone",
            fix="give --vision-tower with a CLIP folder to make a LLaVA of the two",
        )
    lm = open_language(folder, options)
    tower = open_tower({}, folder, options)
    with config_of(folder):
        config = LlavaConfig(
            vision=tower.config,
            language=lm.config.language,
            projector=options.projector or "mlp2x_gelu",
            max_length=min(STAGE1_LENGTH, lm.config.language.max_positions),
        )
    source = with_tower(lm, tower, config, {}, options)
    dtype = options.type or lm.leaves[EMBED].dtype
    seed = options.seed or 0
    source.leaves |= random_projector(config, dtype, seed)
    log.info("the projector is new and random (seed %d)", seed)
    return source


def random_projector(config: LlavaConfig, dtype: np.dtype, seed: int) -> dict[str, Leaf]:
    """A fresh projector: U(-1/sqrt(d_in), 1/sqrt(d_in)) for kernel and bias, nn.Linear's own rule."""
    rng = np.random.Generator(np.random.PCG64(seed))
    leaves, d_in, d_out = {}, config.vision.width, config.language.width
    for i in range(config.projector_depth):
        for name, shape in (("kernel", (d_in, d_out)), ("bias", (d_out,))):
            values = rng.uniform(-(d_in**-0.5), d_in**-0.5, shape).astype(np.float32).astype(dtype)
            lazy = of_array(values, "random projector")
            leaves[f"projector.linear_{i}.{name}"] = Leaf((lazy,), False)
        d_in = d_out
    return leaves


def apply_delta(source: Source, options: Options) -> Source:
    """Adds the base to a delta (LLaVA v0, v1.1) in float32; a complete checkpoint passes through.

    A delta is recognised by its last norm, whose scales lie near zero, where a model's lie near one.
    Source of the rule: llava/model/apply_delta.py (wider embeddings add only the first rows).
    """
    norm = float(np.abs(source.leaves["language.norm.scale"].read().astype(np.float32)).mean())
    if options.base is None:
        if norm < 0.05:
            raise WeightError(
                "this is a delta: its norms are close to zero",
                fix="give --base with the language model it was made from",
            )
        return source
    path = hub.resolve(options.base, options.allow_pickle)
    alone = identify(path) == "llama"
    if not alone and norm < 0.05:
        raise WeightError(
            f"{options.base} is not a language model alone", fix="a delta was made from one"
        )
    complete = WeightError("this checkpoint is complete, and no delta", fix="leave out --base")
    if not alone:
        raise complete
    base = open_language(path, options)
    reference = base.leaves["language.norm.scale"].read().astype(np.float32)
    if norm > 0.5 * float(np.abs(reference).mean()):
        raise complete
    leaves = dict(source.leaves)
    for name, leaf in base.leaves.items():
        delta = leaves[name]
        if len(delta.parts) != len(leaf.parts):
            raise WeightError(
                f"the base has {len(leaf.parts)} layers, the delta {len(delta.parts)}"
            )
        parts = tuple(_sum(d, b, name, options.type) for d, b in zip(delta.parts, leaf.parts))
        leaves[name] = Leaf(parts, delta.stacked)
    log.info("added the base to the delta")
    return replace(source, leaves=leaves, files=source.files + base.files)


def _sum(delta: Lazy, base: Lazy, name: str, dtype: np.dtype | None) -> Lazy:
    grows = name in (EMBED, HEAD) and all(b <= d for b, d in zip(base.shape, delta.shape))
    if delta.shape != base.shape and not grows:
        raise WeightError(
            f"{name} has shape {list(delta.shape)} in the delta, {list(base.shape)} in the base"
        )

    def read() -> np.ndarray:
        out = delta.read().astype(np.float32)
        out[tuple(slice(n) for n in base.shape)] += base.read().astype(np.float32)
        return out

    return summed(read, delta, dtype)
