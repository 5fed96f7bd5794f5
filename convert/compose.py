"""Checkpoints that are put together from several: CLIP + LLM, projector + base, delta + base."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LanguageConfig, LlavaConfig
from llava_jax.convert import configs, detect, hub, keymap, quantised, tensors
from llava_jax.convert import source as sources
from llava_jax.convert.lazy import Lazy, Leaf, cast, of_array, single
from llava_jax.convert.source import Options, Source
from llava_jax.errors import ConfigError, WeightError
from llava_jax.params import check_params, component

log = logging.getLogger(__name__)

EMBED, HEAD = "language.embed.embedding", "language.head.kernel"
STAGE1_LENGTH = 2048  # model_max_length of all training scripts of the original


@dataclass
class Language:
    """A language model folder, opened."""

    config: LanguageConfig
    leaves: dict[str, Leaf]
    extras: dict[str, Lazy]
    kept: dict[str, Any]
    files: list[Path]


def open_language(folder: Path, options: Options) -> Language:
    """A LlamaForCausalLM (or Mistral) folder."""
    data = tensors.model_config(folder)
    generation = tensors.read_json(folder / "generation_config.json")
    language = configs.language_config(data, "config.json", generation)
    state, files = tensors.read_folder(folder, options.allow_pickle)
    leaves, rest = keymap.to_jax(
        state,
        keymap.LLAMA,
        LlavaConfig(language=language),
        where=str(folder),
        mixed=options.mixed,
    )
    kept = {"config": data, "generation_config": generation}
    return Language(language, leaves, {f"llama:{n}": t for n, t in rest.items()}, kept, files)


def join(folder: Path, options: Options) -> Source:
    """CLIP + a language model + a projector of random weights: where stage 1 starts.

    Raises WeightError without options.vision_tower.
    """
    if options.vision_tower is None:
        raise WeightError(
            f"{folder} is a language model alone",
            fix="give --vision-tower with a CLIP folder to make a LLaVA of the two",
        )
    lm = open_language(folder, options)
    tower = sources.open_tower({}, folder, options)
    try:
        config = LlavaConfig(
            vision=tower.config,
            language=lm.config,
            projector=options.projector,
            max_length=min(STAGE1_LENGTH, lm.config.max_positions),
        )
    except ConfigError as error:
        raise WeightError(f"{folder}: {error.message}") from None
    vision, extras, files = sources.tower_leaves(tower, config, options)
    dtype = options.type or lm.leaves[EMBED].dtype
    leaves = {**vision, **random_projector(config, dtype, options.seed)}
    leaves |= lm.leaves
    log.info("the projector is new and random (seed %d)", options.seed)
    kept = {
        "original": {"config": {}, "tower_inside": False, "tower": tower.kept},
        "llama": lm.kept,
    }
    tokenizer = tensors.tokenizer_folder(folder)
    return Source("joined", config, leaves, kept, lm.extras | extras, lm.files + files, tokenizer)


def random_projector(config: LlavaConfig, dtype: np.dtype, seed: int) -> dict[str, Leaf]:
    """A fresh projector: U(-1/sqrt(d_in), 1/sqrt(d_in)) for kernel and bias, nn.Linear's own rule."""
    rng = np.random.Generator(np.random.PCG64(seed))
    leaves, d_in, d_out = {}, config.vision.width, config.language.width
    for i in range(config.projector_depth):
        for name, shape in (("kernel", (d_in, d_out)), ("bias", (d_out,))):
            values = rng.uniform(-(d_in**-0.5), d_in**-0.5, shape).astype(np.float32).astype(dtype)
            leaves[f"projector.linear_{i}.{name}"] = single(of_array(values, "random projector"))
        d_in = d_out
    return leaves


# A base and what is laid over it ----------------------------------------------------------------


def open_base(folder: Path, data: dict[str, Any], options: Options, base: str | Path) -> Source:
    """The model under an adapter or projector whose own config.json is `data`.

    A language model is joined with the tower that `data` names, and still lacks a projector; a
    whole LLaVA is taken as it is. The vocabulary grows to what `data` says.
    """
    path = hub.resolve(base, options.allow_pickle)
    data = quantised.without(data)  # of QLoRA: its base was quantised while it was trained
    if detect.identify(path) == "lora":
        raise WeightError(f"{path} is an adapter itself, and no base")
    if detect.identify(path) != "llama":
        from llava_jax.convert.opening import open_source  # which needs this module

        under = open_source(path, replace(options, base=None, dtype=None, merge=False, mixed=False))
        return _fitted(under, data, folder) if data else under
    lm = open_language(path, options)
    described = {**lm.kept["config"], **data}
    tower = sources.open_tower(data, folder, options)
    config = configs.from_original(
        described, tower.config, f"{folder.name}/config.json", sources._legacy(path, default=True)
    )
    vision, extras, files = sources.tower_leaves(tower, config, options)
    kept = {
        "original": {"config": data, "tower_inside": False, "tower": tower.kept},
        "llama": lm.kept,
    }
    under = Source(
        "original",
        replace(config, language=lm.config),
        {**vision, **lm.leaves},
        kept,
        lm.extras | extras,
        lm.files + files,
        tensors.tokenizer_folder(folder, path),
    )
    return _fitted(under, data, folder)


def _fitted(under: Source, data: dict[str, Any], folder: Path) -> Source:
    """`under` with the settings of `data`, which must be of the same sizes but for the vocabulary."""
    have = under.config.language
    if "hidden_size" not in data:
        return under
    want = configs.language_config(data, f"{folder.name}/config.json")
    for name in ("width", "layers", "heads", "kv_heads", "mlp_width"):
        if getattr(want, name) != getattr(have, name):
            raise WeightError(
                f"{folder}: made for a base with {name} {getattr(want, name)}, "
                f"this one has {getattr(have, name)}",
                fix="give the right --base",
            )
    if want.vocab_size < have.vocab_size:
        return under
    under.leaves = grown(under.leaves, have.vocab_size, want.vocab_size)
    under.config = replace(under.config, language=replace(have, vocab_size=want.vocab_size))
    if "mm_projector_type" in data:
        under.config = configs.from_original(
            data, under.config.vision, f"{folder.name}/config.json", under.config.tokenizer_legacy
        )
        under.config = replace(under.config, language=replace(have, vocab_size=want.vocab_size))
        under.kept.setdefault("original", {"tower_inside": False, "tower": {}})["config"] = data
    return under


def open_projector(path: Path, options: Options) -> Source:
    """A stage-1 result (mm_projector.bin, a folder with one, or the file itself) over its base.

    With mm_use_im_start_end the file holds the token embeddings too: all rows, or the new ones.
    """
    folder, file = (path.parent, path) if path.is_file() else (path, detect.projector_file(path))
    if file is None:
        raise WeightError(f"{folder}: holds no projector")
    if options.base is None:
        raise WeightError(
            f"{file} is a projector alone", fix="give --base with the language model it belongs to"
        )
    data = tensors.read_json(folder / "config.json")
    state = strip_peft(tensors.read_file(file, options.allow_pickle))
    kind = projector_kind(state, file.name)
    if data.get("mm_projector_type", kind) != kind:
        raise WeightError(
            f"{file.name}: holds a {kind} projector, config.json says {data['mm_projector_type']}"
        )
    if "mm_hidden_size" not in data:
        data = {**data, "mm_projector_type": kind, "image_aspect_ratio": "pad"}
    under = open_base(folder, data, options, options.base)
    source = overlay(under, state, replace(under.config, projector=kind), file.name, options)
    source.kept.setdefault("original", {})["projector_file"] = "bin"
    return replace(source, kind="projector", files=[*source.files, file])


def projector_kind(state: dict[str, Lazy], file: str) -> str:
    """The mm_projector_type that the names of a projector's tensors mean."""
    names = {n.removeprefix("model.mm_projector.") for n in state if "mm_projector." in n}
    if names == {"weight", "bias"}:
        return "linear"
    numbers = sorted({int(n.split(".")[0]) for n in names if n.split(".")[0].isdigit()})
    if not numbers or numbers != list(range(0, 2 * len(numbers), 2)):
        raise WeightError(f"{file}: its tensors {sorted(names)[:4]} are of no known projector")
    return f"mlp{len(numbers)}x_gelu"


def overlay(
    under: Source, state: dict[str, Lazy], config: LlavaConfig, where: str, options: Options
) -> Source:
    """`under` with the tensors of `state` (original names, any part of the model) in place of its own.

    Raises WeightError for a name that the original has not, a wrong shape, or a projector in part.
    """
    layout = keymap.ORIGINAL
    plan = {e.ours: e for e in keymap.entries(layout, replace(config, lora=None))}
    by_name = {name: (e, i) for e in plan.values() for i, name in enumerate(e.theirs)}
    leaves = dict(under.leaves)
    found: dict[str, Lazy] = {}
    touched: dict[str, list[Lazy | None]] = {}
    for name, lazy in state.items():
        if name not in by_name and keymap.is_buffer(name):
            continue
        if by_name.get(name, (None,))[0] is plan[EMBED]:
            lazy = _rows(lazy, name, leaves, config)
        found[name] = lazy
    check_params(
        found,
        {name: e.their_shape for name, (e, _) in by_name.items()},
        where,
        noun="tensor",
        partial=True,
        types=lambda name: component(by_name[name][0].ours),
        mixed=options.mixed,
    )
    for name, lazy in found.items():
        entry, i = by_name[name]
        if options.dtype is None and entry.ours in leaves and entry.ours.startswith("language."):
            lazy = _of_type(lazy, leaves[entry.ours].dtype, f"{where}: {name}")
        parts = touched.setdefault(entry.ours, [None] * len(entry.theirs))
        parts[i] = keymap._moved(lazy, entry.move)
    for ours, parts in touched.items():
        old = leaves.get(ours)
        filled = [p or (old.parts[i] if old else None) for i, p in enumerate(parts)]
        leaves[ours] = Leaf(tuple(p for p in filled if p is not None), plan[ours].stacked)
    lacking = [n for e in plan.values() if e.ours not in leaves for n in e.theirs]
    check_params({}, dict.fromkeys(lacking, ()), where, noun="tensor")
    return replace(under, config=config, leaves={n: leaves[n] for n in plan})


def _of_type(lazy: Lazy, dtype: np.dtype, name: str) -> Lazy:
    """`lazy` in the type of the base it is laid over, as the original's load_state_dict does it."""
    if lazy.dtype.name in ("float32", "float16", "bfloat16") and lazy.dtype != dtype:
        log.warning("%s is %s, and cast to the base's %s", name, lazy.dtype, dtype)
        return cast(lazy, dtype)
    return lazy


def _rows(lazy: Lazy, name: str, leaves: dict[str, Leaf], config: LlavaConfig) -> Lazy:
    """An embedding of all rows, or of the added ones only, as one of all rows."""
    vocab = config.language.vocab_size
    if len(lazy.shape) != 2 or lazy.shape[0] >= vocab or lazy.shape[0] > 16:
        return lazy
    old, new = leaves[EMBED].parts[0], lazy.shape[0]
    return Lazy(
        old.shape,
        old.dtype,
        lambda: np.concatenate([old.read()[:-new], lazy.read().astype(old.dtype)]),
        f"{lazy.origin} over {old.origin}",
    )


def strip_peft(state: dict[str, Lazy]) -> dict[str, Lazy]:
    """Original names from PEFT's: "base_model." goes, then a doubled "model." (builder.py's rule)."""
    state = {n.removeprefix("base_model."): t for n, t in state.items()}
    if any(n.startswith("model.model.") for n in state):
        state = {n.removeprefix("model."): t for n, t in state.items()}
    return state


# Vocabulary -------------------------------------------------------------------------------------


def grown(leaves: dict[str, Leaf], old: int, new: int) -> dict[str, Leaf]:
    """Embedding and head with `new` instead of `old` tokens; the added ones are the mean of the rest.

    A mean row of the head gives the mean logit, which greedy decoding never picks.
    """
    leaves = dict(leaves)
    for name, axis in ((EMBED, 0), (HEAD, 1)):
        if name in leaves and new > old:
            leaves[name] = leaves[name].map(lambda p, axis=axis: _grown(p, axis, old, new))
    return leaves


def cut(leaves: dict[str, Leaf], size: int) -> dict[str, Leaf]:
    """Embedding and head of the first `size` tokens."""
    leaves = dict(leaves)
    leaves[EMBED] = leaves[EMBED].map(lambda p: p.map(lambda a: a[:size], (size, *p.shape[1:])))
    if HEAD in leaves:
        leaves[HEAD] = leaves[HEAD].map(lambda p: p.map(lambda a: a[:, :size], (p.shape[0], size)))
    return leaves


def _grown(lazy: Lazy, axis: int, old: int, new: int) -> Lazy:
    def read() -> np.ndarray:
        array = lazy.read()
        # float64 in one fixed order: the same bytes on every run.
        total = np.zeros(array.shape[1 - axis], np.float64)
        for start in range(0, old, 1024):
            rows = array[start : start + 1024] if axis == 0 else array[:, start : start + 1024].T
            total += rows.astype(np.float64).sum(axis=0)
        row = (total / old).astype(np.float32).astype(lazy.dtype)
        shape = (new - old, len(row)) if axis == 0 else (len(row), new - old)
        more = np.broadcast_to(row if axis == 0 else row[:, None], shape)
        return np.concatenate([array, more], axis=axis)

    shape = list(lazy.shape)
    shape[axis] = new
    return Lazy(tuple(shape), lazy.dtype, read, lazy.origin)


# Deltas -----------------------------------------------------------------------------------------


def apply_delta(source: Source, options: Options) -> Source:
    """Adds the base to a delta (LLaVA v0, v1.1) in float32; a complete checkpoint passes through.

    A delta shows in its last norm, whose scales lie near zero, where a model's lie near one.
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
    if detect.identify(path) != "llama" and norm < 0.05:
        raise WeightError(
            f"{options.base} is not a language model alone", fix="a delta was made from one"
        )
    if detect.identify(path) != "llama":
        raise WeightError("this checkpoint is complete, and no delta", fix="leave out --base")
    base = open_language(path, options)
    reference = base.leaves["language.norm.scale"].read().astype(np.float32)
    if norm > 0.5 * float(np.abs(reference).mean()):
        raise WeightError("this checkpoint is complete, and no delta", fix="leave out --base")
    leaves = dict(source.leaves)
    for name, leaf in base.leaves.items():
        ours = leaves[name]
        if len(ours.parts) != len(leaf.parts):
            raise WeightError(f"the base has {len(leaf.parts)} layers, the delta {len(ours.parts)}")
        parts = tuple(_sum(d, b, name, options.type) for d, b in zip(ours.parts, leaf.parts))
        leaves[name] = Leaf(parts, ours.stacked)
    log.info("added the base to the delta")
    return replace(source, leaves=leaves, files=source.files + base.files)


def _sum(delta: Lazy, base: Lazy, name: str, dtype: np.dtype | None) -> Lazy:
    grows = name in (EMBED, HEAD) and all(b <= d for b, d in zip(base.shape, delta.shape))
    if delta.shape != base.shape and not grows:
        raise WeightError(
            f"{name}: delta {list(delta.shape)} and base {list(base.shape)} do not fit"
        )

    def read() -> np.ndarray:
        out = delta.read().astype(np.float32)
        out[tuple(slice(n) for n in base.shape)] += base.read().astype(np.float32)
        return out

    whole = Lazy(delta.shape, np.dtype(np.float32), read, delta.origin)
    return cast(whole, dtype or delta.dtype)
