"""The names and shapes of parameters in other projects' checkpoints: one table, read both ways.

A rule gives a tensor's name there, its name here, and how the axes of the two are ordered.
`{i}` is the layer number there and the leading axis here. {lm}, {head}, {projector} and {vision}
are the prefixes in which the layouts differ. Sources: haotian-liu/LLaVA @ c121f04, the published
llava-hf files, transformers 5.23, PEFT 0.21. (GGUF's names follow from these: see formats/gguf.py.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from llava_jax.config import LINEARS, LlavaConfig
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.errors import WeightError
from llava_jax.params import check_params, parameter_shapes, same_type


@dataclass(frozen=True)
class Move:
    """An invertible change of axes. ours = theirs.transpose(axes)."""

    axes: tuple[int, ...] | None = None

    def to_ours(self, lazy: Lazy) -> Lazy:
        return self._turned(lazy, self.axes)

    def to_theirs(self, lazy: Lazy) -> Lazy:
        return self._turned(lazy, self._back)

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        return ours if self._back is None else tuple(ours[a] for a in self._back)

    @property
    def _back(self) -> tuple[int, ...] | None:
        return None if self.axes is None else tuple(int(a) for a in np.argsort(self.axes))

    @staticmethod
    def _turned(lazy: Lazy, axes: tuple[int, ...] | None) -> Lazy:
        if axes is None:
            return lazy
        return lazy.map(lambda a: a.transpose(axes), tuple(lazy.shape[a] for a in axes))


PEFT = "base_model.model."  # before the names of a model that PEFT has adapted
SAME = Move()
T = Move((1, 0))  # torch keeps a linear layer as [out, in]
CONV = Move((2, 3, 1, 0))  # OIHW -> HWIO


@dataclass(frozen=True)
class Rule:
    theirs: str
    ours: str
    move: Move = SAME


def _linear(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Weight and bias of a linear layer."""
    return Rule(f"{theirs}.weight", f"{ours}.kernel", T), Rule(f"{theirs}.bias", f"{ours}.bias")


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _decoder_linear(name: str) -> str:
    """ "attn.q" as a path in the decoder: "layers.{i}.self_attn.q_proj"."""
    block, _, linear = name.partition(".")
    return f"layers.{{i}}.{'self_attn' if block == 'attn' else block}.{linear}_proj"


LANGUAGE = (
    Rule("{lm}.embed_tokens.weight", "language.embed.embedding"),
    Rule("{lm}.layers.{i}.input_layernorm.weight", "language.layers.attn_norm.scale"),
    Rule("{lm}.layers.{i}.post_attention_layernorm.weight", "language.layers.mlp_norm.scale"),
    *(
        rule
        for name in LINEARS
        for rule in _linear("{lm}." + _decoder_linear(name), f"language.layers.{name}")
        if rule.ours.endswith("kernel") or name.startswith("attn")  # mlp_bias is not supported
    ),
    Rule("{lm}.norm.weight", "language.norm.scale"),
    Rule("{head}.weight", "language.head.kernel", T),
)


def _adapters(linears: Iterable[Rule]) -> tuple[Rule, ...]:
    """What PEFT calls the adapters of linear layers; takes the rules of their weights out of `linears`."""
    return tuple(
        Rule(f"{PEFT}{r.theirs.removesuffix('.weight')}.{theirs}", f"{r.ours[:-7]}.{ours}", move)
        for r in linears
        if r.ours.endswith(".kernel") and r.move is T and r.ours != "language.head.kernel"
        for theirs, ours, move in (
            ("lora_A.weight", "lora_a", T),
            ("lora_B.weight", "lora_b", T),
            ("lora_magnitude_vector", "lora_m", SAME),
        )
    )


LORA = _adapters(LANGUAGE)
# In the tower, `vision.layers` stands for `vision.layers` and, after the feature layer,
# `vision.tail.layers`.
VISION = (
    Rule("{vision}embeddings.class_embedding", "vision.class_embed"),
    Rule("{vision}embeddings.patch_embedding.weight", "vision.patch_embed.kernel", CONV),
    Rule("{vision}embeddings.position_embedding.weight", "vision.pos_embed"),
    *_norm("{vision}pre_layrnorm", "vision.pre_norm"),  # transformers' own spelling
    *_norm("{vision}encoder.layers.{i}.layer_norm1", "vision.layers.norm1"),
    *_norm("{vision}encoder.layers.{i}.layer_norm2", "vision.layers.norm2"),
    *(
        rule
        for theirs, ours in (
            ("self_attn.q_proj", "attn.q"),
            ("self_attn.k_proj", "attn.k"),
            ("self_attn.v_proj", "attn.v"),
            ("self_attn.out_proj", "attn.out"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for rule in _linear(f"{{vision}}encoder.layers.{{i}}.{theirs}", f"vision.layers.{ours}")
    ),
    *_norm("{vision}post_layernorm", "vision.tail.post_norm"),
)
VISION_LORA = _adapters(VISION)
# Tensors that some checkpoints carry and the model does not need: recomputed buffers, the newline
# vector of LLaVA-1.6, and the text half of a full CLIP. Carried for the way back, never used.
BUFFERS = re.compile(
    r"(.*\.)?embeddings\.position_ids"
    r"|(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)"
    r"|(model\.)?image_newline"
    r"|text_model\..+|logit_scale|(visual|text)_projection\.weight"
)


@dataclass(frozen=True)
class Layout:
    """The prefixes of one generation of files. None: it has no such component."""

    name: str
    lm: str | None = None
    head: str | None = None
    projector: str | None = None
    vision: str | None = None
    hf: bool = False

    def rules(self, config: LlavaConfig) -> tuple[Rule, ...]:
        """The rules of the components this layout has."""
        rules = () if self.lm is None else LANGUAGE + (LORA if config.lora else ())
        if self.projector is not None:
            projector = self._projector(config)
            rules += projector + (_adapters(projector) if config.lora else ())
        if self.vision is not None:
            rules += VISION + (VISION_LORA if config.lora else ())
        prefixes = {
            "{lm}": self.lm or "",
            "{head}": self.head or "",
            "{projector}": self.projector or "",
            "{vision}": f"{self.vision}." if self.vision else "",
        }
        pattern = re.compile("|".join(map(re.escape, prefixes)))
        return tuple(
            replace(r, theirs=pattern.sub(lambda m: prefixes[m[0]], r.theirs)) for r in rules
        )

    def _projector(self, config: LlavaConfig) -> tuple[Rule, ...]:
        if self.hf and config.projector != "mlp2x_gelu":
            raise WeightError(
                f"Hugging Face's LLaVA has no projector {config.projector!r}, only mlp2x_gelu",
                fix="use --to original or --to jax",
            )
        if config.projector == "linear":
            return _linear("{projector}", "projector.linear_0")
        rules: tuple[Rule, ...] = ()
        for k in range(config.projector_depth):
            # The original's nn.Sequential counts the GELUs as well.
            theirs = f"linear_{k + 1}" if self.hf else str(2 * k)
            rules += _linear(f"{{projector}}.{theirs}", f"projector.linear_{k}")
        return rules

    @property
    def decoder(self) -> Layout:
        """The decoder of this layout alone."""
        return replace(self, projector=None, vision=None)


_TOWER = "model.vision_tower.vision_tower.vision_model"
ORIGINAL = Layout("original", "model", "lm_head", "model.mm_projector", _TOWER)
ORIGINAL_NO_TOWER = replace(ORIGINAL, vision=None)
LLAMA = ORIGINAL.decoder
PROJECTOR = Layout("projector", projector="model.mm_projector")
CLIP = Layout("clip", vision="vision_model")
CLIP_BARE = Layout("clip5", vision="")  # what transformers 5 keeps in memory
_MM, _LM = "multi_modal_projector", "language_model"
HF_HUB = Layout("hf", f"{_LM}.model", f"{_LM}.lm_head", _MM, "vision_tower.vision_model", True)
HF_SAVED = Layout("hf5", f"{_LM}.model", f"{_LM}.lm_head", _MM, "vision_tower", True)
HF_MEMORY = Layout(
    "hf5_memory", f"model.{_LM}", "lm_head", f"model.{_MM}", "model.vision_tower", True
)
HF_MEMORY_4 = replace(HF_MEMORY, name="hf4_memory", vision="model.vision_tower.vision_model")
HF_LAYOUTS = (HF_HUB, HF_SAVED, HF_MEMORY, HF_MEMORY_4)
LAYOUTS = {layout.name: layout for layout in (ORIGINAL, CLIP, CLIP_BARE, *HF_LAYOUTS)}


@dataclass(frozen=True)
class Pairing:
    """One of our parameters, and the tensors (one, or one per layer) that hold it there."""

    ours: str
    theirs: tuple[str, ...]
    stacked: bool
    move: Move
    their_shape: tuple[int, ...]

    def leaf(self, tensors: Iterable[Lazy]) -> Leaf:
        """Our leaf of their `tensors`, which come in the order of `theirs`."""
        return Leaf(tuple(self.move.to_ours(t) for t in tensors), self.stacked)


def pairings(layout: Layout, config: LlavaConfig) -> list[Pairing]:
    """The rules of `layout`, written out for the sizes of `config`.

    Raises WeightError for a parameter of its components without a rule.
    """
    shapes = parameter_shapes(config)
    found = []
    for rule in layout.rules(config):
        names, first = [rule.ours], 0
        if rule.ours.startswith("vision.layers."):
            names.append(rule.ours.replace("vision.layers.", "vision.tail.layers."))
        for ours in names:
            if ours not in shapes:
                continue
            shape, stacked = shapes[ours], "{i}" in rule.theirs
            theirs: tuple[str, ...] = (rule.theirs,)
            if stacked:
                theirs = tuple(rule.theirs.replace("{i}", str(first + i)) for i in range(shape[0]))
                first, shape = first + shape[0], shape[1:]
            found.append(Pairing(ours, theirs, stacked, rule.move, rule.move.their_shape(shape)))
    parts = {"language": layout.lm, "projector": layout.projector, "vision": layout.vision}
    ruled = {p.ours for p in found}
    for name in shapes:
        if parts[name.partition(".")[0]] is not None and name not in ruled:
            raise WeightError(f"the key table has no rule for {name} in layout {layout.name}")
    return found


def places(layout: Layout, config: LlavaConfig) -> dict[str, tuple[Pairing, int]]:
    """{their name: (the parameter it belongs to, its layer there)} of every tensor of `layout`."""
    return {n: (p, i) for p in pairings(layout, config) for i, n in enumerate(p.theirs)}


def to_jax(
    state: Mapping[str, Lazy],
    layout: Layout,
    config: LlavaConfig,
    *,
    where: str,
    mixed: bool = False,
) -> tuple[dict[str, Leaf], dict[str, Lazy]]:
    """Foreign tensors as our leaves, and the known buffers that are left over.

    Raises WeightError, naming `where` and the tensor: unknown, missing, of the wrong shape, or
    (unless `mixed`) of another type than the rest of its component.
    """
    plan = pairings(layout, config)
    known = {name: p for p in plan for name in p.theirs}
    tied = config.language.tied_head and layout.head is not None
    buffers = {
        name: t
        for name, t in state.items()
        if name not in known and (is_buffer(name) or (tied and name == f"{layout.head}.weight"))
    }
    check_params(
        {name: t for name, t in state.items() if name not in buffers},
        {name: p.their_shape for name, p in known.items()},
        where,
        noun="tensor",
        types=lambda name: same_type(known[name].ours),
        mixed=mixed,
    )
    if tied:
        _check_tied(state, layout, where)
    leaves = {p.ours: p.leaf(state[n] for n in p.theirs) for p in plan}
    if mixed:
        leaves = {name: _widened(leaf) for name, leaf in leaves.items()}
    return leaves, buffers


def to_theirs(leaves: Mapping[str, Leaf], layout: Layout, config: LlavaConfig) -> dict[str, Lazy]:
    """Our leaves as their tensors, in the order of the table. Leaves of other components stay out."""
    state = {}
    for p in pairings(layout, config):
        if p.ours not in leaves:
            raise WeightError(f"missing parameter {p.ours}")
        for name, part in zip(p.theirs, leaves[p.ours].parts, strict=True):
            state[name] = p.move.to_theirs(part)
    return state


def hf_layouts(config: LlavaConfig) -> tuple[Layout, ...]:
    """Hugging Face's layouts, or none where they have no such projector."""
    return HF_LAYOUTS if config.projector == "mlp2x_gelu" else ()


def to_original(state: Mapping[str, Lazy], config: LlavaConfig) -> list[tuple[str, Lazy]]:
    """The tensors of `state` by the original's names, in their order; any layout may have named them.

    A leading "model." counts for nothing, as PEFT adds one. What no layout knows keeps its name.
    """
    original = {(p.ours, i): name for name, (p, i) in places(ORIGINAL, config).items()}
    known: dict[str, str] = {}
    for layout in hf_layouts(config):
        found = places(layout, config)
        known |= {n.removeprefix("model."): original[p.ours, i] for n, (p, i) in found.items()}
    return [(known.get(name.removeprefix("model."), name), t) for name, t in state.items()]


def is_buffer(name: str) -> bool:
    """Whether `name` is on the list of tensors that are carried along and not used."""
    return BUFFERS.fullmatch(name) is not None


def best_layout(names: Iterable[str], candidates: Iterable[Layout], config: LlavaConfig) -> Layout:
    """The candidate that knows most of `names`; the first of several that tie."""
    names = list(names)

    def known(layout: Layout) -> int:
        templates = [re.escape(r.theirs).replace(r"\{i\}", r"\d+") for r in layout.rules(config)]
        pattern = re.compile("|".join(templates) or "(?!)")
        return sum(pattern.fullmatch(n) is not None for n in names)

    return max(candidates, key=known)


def _widened(leaf: Leaf) -> Leaf:
    if len({p.dtype for p in leaf.parts}) == 1:
        return leaf
    wide = np.dtype(np.float32)  # holds both 16-bit types exactly
    return leaf.map(lambda p: p.map(lambda a: a.astype(wide), dtype=wide))


def _check_tied(state: Mapping[str, Lazy], layout: Layout, where: str) -> None:
    head = state.get(f"{layout.head}.weight")
    embed = state[f"{layout.lm}.embed_tokens.weight"]
    if head is None:
        return
    if head.shape != embed.shape or not np.array_equal(head.read(), embed.read()):
        raise WeightError(
            f"{where}: {layout.head}.weight differs from the embedding that the configuration "
            "ties it to",
            fix="set tie_word_embeddings to false in config.json",
        )
