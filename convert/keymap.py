"""The names and shapes of parameters in other people's checkpoints: one table, read both ways.

A rule says how a tensor is called there, how it is called here, and how the two lie in memory.
`{i}` is the layer number there and the leading axis here. {lm}, {head}, {projector} and {vision}
are the prefixes in which the layouts differ. Names: SPEC facts of haotian-liu/LLaVA @ c121f04,
the published llava-hf files, transformers 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.convert.lazy import Lazy, Leaf
from llava_jax.errors import WeightError
from llava_jax.params import check_params, component, parameter_shapes


@dataclass(frozen=True)
class Move:
    """An invertible change of axes. ours = theirs.transpose(axes)."""

    axes: tuple[int, ...] | None = None

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        return array if self.axes is None else array.transpose(self.axes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        return array if self.axes is None else array.transpose(np.argsort(self.axes))

    def their_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        if self.axes is None:
            return ours
        return tuple(ours[int(a)] for a in np.argsort(self.axes))


SAME = Move()
T = Move((1, 0))  # torch keeps a linear layer as [out, in]
CONV = Move((2, 3, 1, 0))  # OIHW -> HWIO


@dataclass(frozen=True)
class Rule:
    theirs: str
    ours: str
    move: Move = SAME


def _both(theirs: str, ours: str, names: Iterable[tuple[str, str]]) -> tuple[Rule, ...]:
    """Weight and bias of linear layers."""
    return tuple(
        rule
        for a, b in names
        for rule in (
            Rule(f"{theirs}.{a}.weight", f"{ours}.{b}.kernel", T),
            Rule(f"{theirs}.{a}.bias", f"{ours}.{b}.bias"),
        )
    )


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias"))


LANGUAGE = (
    Rule("{lm}.embed_tokens.weight", "language.embed.embedding"),
    Rule("{lm}.layers.{i}.input_layernorm.weight", "language.layers.attn_norm.scale"),
    Rule("{lm}.layers.{i}.post_attention_layernorm.weight", "language.layers.mlp_norm.scale"),
    *_both(
        "{lm}.layers.{i}.self_attn",
        "language.layers.attn",
        (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("o_proj", "o")),
    ),
    Rule("{lm}.layers.{i}.mlp.gate_proj.weight", "language.layers.mlp.gate.kernel", T),
    Rule("{lm}.layers.{i}.mlp.up_proj.weight", "language.layers.mlp.up.kernel", T),
    Rule("{lm}.layers.{i}.mlp.down_proj.weight", "language.layers.mlp.down.kernel", T),
    Rule("{lm}.norm.weight", "language.norm.scale"),
    Rule("{head}.weight", "language.head.kernel", T),
)
# In the tower, `vision.layers` stands for `vision.layers` and, behind the feature layer,
# `vision.tail.layers`.
VISION = (
    Rule("{vision}embeddings.class_embedding", "vision.class_embed"),
    Rule("{vision}embeddings.patch_embedding.weight", "vision.patch_embed.kernel", CONV),
    Rule("{vision}embeddings.position_embedding.weight", "vision.pos_embed"),
    *_norm("{vision}pre_layrnorm", "vision.pre_norm"),
    *_norm("{vision}encoder.layers.{i}.layer_norm1", "vision.layers.norm1"),
    *_norm("{vision}encoder.layers.{i}.layer_norm2", "vision.layers.norm2"),
    *_both(
        "{vision}encoder.layers.{i}.self_attn",
        "vision.layers.attn",
        (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out")),
    ),
    *_both("{vision}encoder.layers.{i}.mlp", "vision.layers.mlp", (("fc1", "fc1"), ("fc2", "fc2"))),
    *_norm("{vision}post_layernorm", "vision.tail.post_norm"),
)
_PEFT = "base_model.model."
LORA = tuple(
    rule
    for block, ours in (("self_attn", "attn"), ("mlp", "mlp"))
    for name in ("q", "k", "v", "o") * (ours == "attn") + ("gate", "up", "down") * (ours == "mlp")
    for rule in (
        Rule(
            f"{_PEFT}{{lm}}.layers.{{i}}.{block}.{name}_proj.lora_A.weight",
            f"language.layers.{ours}.{name}.lora_a",
            T,
        ),
        Rule(
            f"{_PEFT}{{lm}}.layers.{{i}}.{block}.{name}_proj.lora_B.weight",
            f"language.layers.{ours}.{name}.lora_b",
            T,
        ),
    )
)
# Tensors that some checkpoints carry and the model does not need: recomputed buffers, the newline
# vector of LLaVA-1.6, and the text half of a full CLIP. Kept for the way back, never used.
BUFFERS = tuple(
    re.compile(p)
    for p in (
        r"(.*\.)?embeddings\.position_ids",
        r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
        r"model\.image_newline",
        r"image_newline",
        r"text_model\..+",
        r"logit_scale",
        r"(visual|text)_projection\.weight",
    )
)


@dataclass(frozen=True)
class Layout:
    """How one generation of files calls things. A prefix of None: it has no such component."""

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
            rules += self._projector(config)
        if self.vision is not None:
            rules += VISION
        return tuple(Rule(self._fill(r.theirs), r.ours, r.move) for r in rules)

    def _projector(self, config: LlavaConfig) -> tuple[Rule, ...]:
        depth = config.projector_depth
        if self.hf:
            if config.projector != "mlp2x_gelu":
                raise WeightError(
                    f"Hugging Face's LLaVA has no projector {config.projector!r}, only mlp2x_gelu",
                    fix="use --to original or --to jax",
                )
            names = [("linear_1", "linear_0"), ("linear_2", "linear_1")]
        elif config.projector == "linear":
            return (
                Rule("{projector}.weight", "projector.linear_0.kernel", T),
                Rule("{projector}.bias", "projector.linear_0.bias"),
            )
        else:  # nn.Sequential counts the GELUs as well
            names = [(str(2 * k), f"linear_{k}") for k in range(depth)]
        return _both("{projector}", "projector", names)

    def _fill(self, template: str) -> str:
        vision = f"{self.vision}." if self.vision else ""
        return (
            template.replace("{lm}", self.lm or "")
            .replace("{head}", self.head or "")
            .replace("{projector}", self.projector or "")
            .replace("{vision}", vision)
        )


_TOWER = "model.vision_tower.vision_tower.vision_model"
ORIGINAL = Layout("original", "model", "lm_head", "model.mm_projector", _TOWER)
ORIGINAL_NO_TOWER = Layout("original", "model", "lm_head", "model.mm_projector")
LLAMA = Layout("llama", "model", "lm_head")
PROJECTOR = Layout("projector", projector="model.mm_projector")
CLIP = Layout("clip", vision="vision_model")
CLIP_BARE = Layout("clip5", vision="")  # what transformers 5 keeps in memory
_MM, _LM = "multi_modal_projector", "language_model"
HF_HUB = Layout("hf", f"{_LM}.model", f"{_LM}.lm_head", _MM, "vision_tower.vision_model", True)
HF_SAVED = Layout("hf5", f"{_LM}.model", f"{_LM}.lm_head", _MM, "vision_tower", True)
HF_MEMORY = Layout(
    "hf5_memory", f"model.{_LM}", "lm_head", f"model.{_MM}", "model.vision_tower", True
)
HF_MEMORY_4 = Layout(
    "hf4_memory", f"model.{_LM}", "lm_head", f"model.{_MM}", "model.vision_tower.vision_model", True
)
HF_LAYOUTS = (HF_HUB, HF_SAVED, HF_MEMORY, HF_MEMORY_4)
LAYOUTS = {lay.name: lay for lay in (ORIGINAL, LLAMA, PROJECTOR, CLIP, CLIP_BARE, *HF_LAYOUTS)}


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and the tensors, one or one per layer, that it is called there."""

    ours: str
    theirs: tuple[str, ...]
    stacked: bool
    move: Move
    their_shape: tuple[int, ...]


def entries(layout: Layout, config: LlavaConfig) -> list[Entry]:
    """The rules of `layout`, written out for the sizes of `config`."""
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
            if not stacked:
                theirs: tuple[str, ...] = (rule.theirs,)
            else:
                theirs = tuple(rule.theirs.replace("{i}", str(first + i)) for i in range(shape[0]))
                first, shape = first + shape[0], shape[1:]
            found.append(Entry(ours, theirs, stacked, rule.move, rule.move.their_shape(shape)))
    return found


def to_jax(
    state: Mapping[str, Lazy],
    layout: Layout,
    config: LlavaConfig,
    *,
    where: str,
    mixed: bool = False,
) -> tuple[dict[str, Leaf], dict[str, Lazy]]:
    """Their tensors as our leaves, and the known buffers that were left over.

    Raises WeightError, naming `where` and the tensor: unknown, missing, of the wrong shape, or
    (unless `mixed`) of another type than the rest of its component.
    """
    plan = entries(layout, config)
    ours = {name: e.ours for e in plan for name in e.theirs}
    expected = {name: e.their_shape for e in plan for name in e.theirs}
    tied = config.language.tied_head and layout.head is not None
    rest = {
        name: t
        for name, t in state.items()
        if name not in expected and (is_buffer(name) or (tied and name == f"{layout.head}.weight"))
    }
    check_params(
        {name: t for name, t in state.items() if name not in rest},
        expected,
        where,
        noun="tensor",
        types=lambda name: component(ours[name]),
        mixed=mixed,
    )
    if tied:
        _check_tied(state, layout, where)
    leaves = {
        e.ours: Leaf(tuple(_moved(state[name], e.move) for name in e.theirs), e.stacked)
        for e in plan
    }
    if mixed:
        leaves = {name: _widened(leaf) for name, leaf in leaves.items()}
    return leaves, rest


def to_theirs(leaves: Mapping[str, Leaf], layout: Layout, config: LlavaConfig) -> dict[str, Lazy]:
    """Our leaves as their tensors, in the order of the table. Leaves of other components stay out."""
    state = {}
    for e in entries(layout, config):
        if e.ours not in leaves:
            raise WeightError(f"parameter {e.ours} is missing")
        leaf = leaves[e.ours]
        for name, part in zip(e.theirs, leaf.parts, strict=True):
            state[name] = part.map(e.move.to_theirs, e.their_shape)
    return state


def is_buffer(name: str) -> bool:
    """Whether `name` is on the list of tensors that are kept but not used."""
    return any(p.fullmatch(name) for p in BUFFERS)


def best_layout(names: Iterable[str], candidates: Iterable[Layout], config: LlavaConfig) -> Layout:
    """The candidate that knows the most of `names`; the first of equals."""
    names = list(names)

    def known(layout: Layout) -> int:
        templates = [re.escape(r.theirs).replace(r"\{i\}", r"\d+") for r in layout.rules(config)]
        pattern = re.compile("|".join(templates) or "(?!)")
        return sum(pattern.fullmatch(n) is not None for n in names)

    return max(candidates, key=known)


def _moved(lazy: Lazy, move: Move) -> Lazy:
    shape = tuple(lazy.shape[a] for a in move.axes) if move.axes else lazy.shape
    return lazy.map(move.to_ours, shape)


def _widened(leaf: Leaf) -> Leaf:
    kinds = {p.dtype for p in leaf.parts}
    if len(kinds) == 1:
        return leaf
    wide = np.dtype(np.float32)  # holds both 16-bit types exactly
    return leaf.map(lambda p: p.map(lambda a: a.astype(wide), dtype=wide))


def _check_tied(state: Mapping[str, Lazy], layout: Layout, where: str) -> None:
    head = state.get(f"{layout.head}.weight")
    embed = state.get(f"{layout.lm}.embed_tokens.weight")
    if head is None or embed is None:
        return
    if head.shape != embed.shape or not np.array_equal(head.read(), embed.read()):
        raise WeightError(
            f"{where}: {layout.head}.weight differs from the embedding that the configuration "
            "ties it to",
            fix="set tie_word_embeddings to false in config.json",
        )
