"""Sizes and switches of a model, in one place. Imports no jax, so tools may read it cheaply.

Sources: SPEC facts of haotian-liu/LLaVA @ c121f04 and the released config.json files;
CLIP sizes of openai/clip-vit-large-patch14(-336); LLaMA sizes of Vicuna v1.5.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args, get_origin, get_type_hints

from llava_jax.errors import ConfigError
from llava_jax.reader import is_number, shown

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FEATURE_SELECTS = ("patch", "cls_patch")
ASPECT_RATIOS = ("pad", "square")
RESAMPLES = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's numbers 0-5
LINEARS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
"""The linear layers of a decoder layer."""
QUANTIZED = ("", "nf4", "int8")  # how frozen kernels may be held; see llava_jax.quant
BUDGETED_BY, PLACED = ("visionzip", "divprune", "pool"), ("consecutive", "original")
_MLP = re.compile(r"mlp([1-9][0-9]?)x_gelu")


@dataclass(frozen=True)
class PixelConfig:
    """How an image becomes the tower's image_size x image_size pixels, as CLIPImageProcessor does it.

    resize_to: (shortest edge,) or exactly (height, width), in pixels; None is the shortest edge to
    image_size. crop: the centre, black beyond a smaller image. rescale: factor of the values 0 to
    255. normalize: whether mean and std of VisionConfig are taken out.
    """

    resize: bool = True
    resize_to: tuple[int, ...] | None = None
    crop: bool = True
    resample: str = "bicubic"
    rescale: float = 1 / 255
    normalize: bool = True

    def __post_init__(self):
        _one_of("vision.pixels.resample", self.resample, RESAMPLES)


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision transformer. Widths count channels; `image_size` and `patch_size` are pixels."""

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"  # CLIP's own; exact "gelu" for the OpenCLIP-trained towers
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    pixels: PixelConfig = field(default_factory=PixelConfig)

    def __post_init__(self):
        _above_zero(
            self, "vision", "image_size", "patch_size", "width", "layers", "heads", "mlp_width"
        )
        _within(self, "vision", "norm_eps", 0.0, 1.0)
        if not all(self.image_std):
            raise ConfigError(f"vision.image_std is {self.image_std}, not three numbers above 0")
        _multiple(self, "vision", "image_size", "patch_size")
        _multiple(self, "vision", "width", "heads")
        _one_of("vision.hidden_act", self.hidden_act, ("quick_gelu", "gelu"))

    @property
    def units(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) to take out of rescaled pixels; zeros and ones where nothing is taken out."""
        if not self.pixels.normalize:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        return self.image_mean, self.image_std

    @property
    def side(self) -> int:
        """Patches in a row of an image."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches per image, the CLS token not counted."""
        return self.side**2


@dataclass(frozen=True)
class RopeScaling:
    """RoPE frequency scaling. `kind` is "linear" or "llama3" (the rule of transformers' rope utils)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self):
        _one_of("rope_scaling.kind", self.kind, ("linear", "llama3"))


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the linear layers that `targets` names (llava_jax.params.linears has all).

    The update is scale * x @ A @ B; `dropout` acts on x, in training only (PEFT's rule). rslora: scale
    is alpha / sqrt(rank) and not alpha / rank (arXiv 2312.03732). dora: the columns of the kernel with
    its update have trained magnitudes (arXiv 2402.09353).
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] = tuple(f"language.layers.{name}" for name in LINEARS)

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class LoraSet(LoraConfig):
    """Several adapters whose factors lie side by side, for serving: `rank` is the sum of theirs.

    each: rank and scale of every one. A row goes through the one that it names; no file holds this.
    """

    each: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class LanguageConfig:
    """A LLaMA-shaped decoder; `kv_heads` < `heads` gives grouped KV heads."""

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_width: int = 128
    mlp_width: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 4096
    tied_head: bool = False
    attention_bias: bool = False
    sliding_window: int | None = None  # Mistral v0.1: keys further back than this are not seen
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    more_eos_ids: tuple[int, ...] = ()  # further tokens at which an answer ends

    def __post_init__(self):
        _above_zero(
            self, "language", "vocab_size", "width", "layers", "heads", "kv_heads", "head_width"
        )
        _above_zero(self, "language", "mlp_width", "rope_theta", "max_positions")
        _within(self, "language", "norm_eps", 0.0, 1.0)
        _multiple(self, "language", "heads", "kv_heads")
        if self.head_width % 2:
            raise ConfigError(f"language.head_width {self.head_width} is odd: RoPE needs pairs")

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token at which an answer ends."""
        return (self.eos_id, *self.more_eos_ids)


@dataclass(frozen=True)
class TokenBudget:
    """How many features of an image the decoder reads, by which rule; see llava_jax.budget.

    by: of BUDGETED_BY. positions: of PLACED; original: those that they have among all of them.
    """

    tokens: int
    by: str = "visionzip"
    positions: str = "consecutive"

    def grid(self, side: int) -> tuple[int, int] | None:
        """(rows, columns) of so many areas of side x side patches, nearest to a square; None: there are none."""
        found = [(r, self.tokens // r) for r in range(1, side + 1) if not self.tokens % r]
        return max((g for g in found if g[0] <= g[1] <= side), default=None)


@dataclass(frozen=True)
class LlavaConfig:
    """A whole LLaVA: vision tower, projector, language model, and how prompts and images meet."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    projector: str = "mlp2x_gelu"  # "linear", "mlpNx_gelu" or "identity"
    feature_layer: int = -2  # index into the tower's hidden states; 0 is the embedding output
    feature_select: str = "patch"  # "patch" drops CLS, "cls_patch" keeps it
    image_aspect_ratio: str = "pad"
    template: str = "vicuna_v1"  # key of llava_jax.text.conversation.TEMPLATES
    max_length: int | None = 2048  # of a training sample, image features counted; None: no limit
    use_im_start_end: bool = False
    tokenizer_legacy: bool = False
    lora: LoraConfig | None = None
    quantize: str = ""  # how the decoder's frozen kernels are held in memory; "" in every file
    budget: TokenBudget | None = None  # of image features, to answer with; in no file

    def __post_init__(self):
        if self.projector not in ("linear", "identity") and not _MLP.fullmatch(self.projector):
            raise ConfigError(
                f"projector {self.projector[:60]!r} is unknown",
                fix="use linear, identity or mlpNx_gelu, N up to 99",
            )
        _one_of("feature_select", self.feature_select, FEATURE_SELECTS)
        _one_of("quantize", self.quantize, QUANTIZED)
        _one_of("image_aspect_ratio", self.image_aspect_ratio, ASPECT_RATIOS)
        if self.projector == "identity" and self.vision.width != self.language.width:
            raise ConfigError(
                f"projector identity needs equal widths: vision {self.vision.width}, "
                f"language {self.language.width}"
            )
        pixels = self.vision.pixels
        keeps_sides = not pixels.crop and len(pixels.resize_to or (0,)) == 1
        if keeps_sides and self.image_aspect_ratio != "pad":
            raise ConfigError(
                "do_center_crop of preprocessor_config.json is false: images that are not square "
                "would not fit the tower"
            )
        self.vision_layers_run  # noqa: B018  raises when the feature layer does not exist
        if self.budget is not None:
            self._check_budget(self.budget)

    def _check_budget(self, budget: TokenBudget) -> None:
        count, most, side = budget.tokens, self.image_features, self.vision.side
        least = 2 if budget.by == "visionzip" else 1  # the class token, and one merged
        if not least <= count < most:
            raise ConfigError(
                f"image_tokens is {count}, but {budget.by} takes from {least} to {most - 1} of the "
                f"{most} features that this tower gives of an image"
            )
        if budget.by == "visionzip" and not self.vision_layers_run:
            what = (
                f"feature_layer {self.feature_layer} has no attention, by which visionzip chooses"
            )
            raise ConfigError(what, fix="use image_tokens_by divprune or pool")
        if budget.by == "pool" and (self.feature_select != "patch" or not budget.grid(side)):
            what = f"pool makes rows times columns of {side} x {side} patches, not {count} features"
            if self.feature_select != "patch":
                what = "pool has no place for the class token that feature_select cls_patch keeps"
            raise ConfigError(what, fix="use image_tokens_by visionzip or divprune")
        if budget.positions == "original" and self.language.sliding_window is not None:
            raise ConfigError(
                "image_positions original does not go with a sliding window, which counts positions"
            )

    @property
    def vision_layers_run(self) -> int:
        """Transformer layers of the tower that the feature layer needs (23 of 24 for -2)."""
        layers, index = self.vision.layers, self.feature_layer
        run = index if index >= 0 else layers + 1 + index
        if not 0 <= run <= layers:
            raise ConfigError(f"feature_layer {index} does not exist in a tower of {layers} layers")
        return run

    @property
    def image_features(self) -> int:
        """Feature vectors that the tower gives of an image (576 for 336 px, patch)."""
        return self.vision.patches + (self.feature_select == "cls_patch")

    @property
    def image_tokens(self) -> int:
        """Feature vectors one image contributes to the sequence: all, or its budget."""
        return self.budget.tokens if self.budget else self.image_features

    @property
    def image_span(self) -> int:
        """Positions (RoPE) that an image takes: image_tokens, unless they keep their original ones."""
        original = self.budget is not None and self.budget.positions == "original"
        return self.image_features if original else self.image_tokens

    @property
    def projector_depth(self) -> int:
        """Linear layers in the projector: 0 for identity, 1 for linear, N for mlpNx_gelu."""
        if self.projector in ("identity", "linear"):
            return int(self.projector == "linear")
        return int(_MLP.fullmatch(self.projector).group(1))  # type: ignore[union-attr]

    # Presets -------------------------------------------------------------------------------------

    @classmethod
    def v15_7b(cls) -> LlavaConfig:
        """LLaVA-1.5-7B: CLIP ViT-L/14-336, two-layer MLP, Vicuna-7B v1.5."""
        return cls()

    @classmethod
    def v15_13b(cls) -> LlavaConfig:
        """LLaVA-1.5-13B: Vicuna-13B v1.5."""
        return replace(
            cls.v15_7b(),
            language=LanguageConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824),
        )

    @classmethod
    def v1_7b(cls) -> LlavaConfig:
        """LLaVA v1 (2023): CLIP at 224 px, linear projector, Vicuna-7B v1.3 (LLaMA-1 norm eps 1e-6)."""
        return replace(
            cls.v15_7b(),
            vision=VisionConfig(image_size=224),
            language=LanguageConfig(norm_eps=1e-6, max_positions=2048),
            projector="linear",
            image_aspect_ratio="square",
        )

    @classmethod
    def tiny(cls, vocab_size: int = 512) -> LlavaConfig:
        """Half a million parameters: every part of the 7B, small enough for tests and the quickstart."""
        return cls(
            vision=VisionConfig(
                image_size=64, patch_size=16, width=96, layers=4, heads=4, mlp_width=384
            ),
            language=LanguageConfig(
                vocab_size=vocab_size,
                width=96,
                layers=2,
                heads=4,
                kv_heads=4,
                head_width=24,
                mlp_width=256,
                rope_theta=1000.0,
                max_positions=1024,
            ),
            max_length=1024,
        )

    # As plain data -------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Nested plain dicts, JSON-ready; `from_dict` gives back an equal config, without a budget."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "budget" or v}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LlavaConfig:
        """Inverse of `to_dict`. Raises ConfigError for an unknown key."""
        return _build(cls, data, "model")


PRESETS = {
    "llava-v1.5-7b": LlavaConfig.v15_7b,
    "llava-v1.5-13b": LlavaConfig.v15_13b,
    "llava-v1-7b": LlavaConfig.v1_7b,
    "tiny": LlavaConfig.tiny,
}
_PARTS = {
    "vision": VisionConfig,
    "pixels": PixelConfig,
    "language": LanguageConfig,
    "rope_scaling": RopeScaling,
    "lora": LoraConfig,
}
_MAY_BE_NONE = ("rope_scaling", "lora")


def _build(cls: type, data: Mapping[str, Any], where: str):
    """A dataclass of this file from plain data; lists become tuples."""
    known = {f.name for f in dataclasses.fields(cls)} - {"budget"}
    unknown = sorted(set(data) - known)
    if unknown:
        raise ConfigError(f"{where}: unknown setting {unknown[0]!r}", fix=f"known: {sorted(known)}")
    needed = [f.name for f in dataclasses.fields(cls) if _has_no_default(f)]
    if missing := [name for name in needed if name not in data]:
        raise ConfigError(f"{where}: {missing[0]} is missing")
    values = typed(cls, data, where)
    for key, part in _PARTS.items():
        if values.get(key) is not None:
            values[key] = _build(part, values[key], key)
    return cls(**values)


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def typed(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values of a JSON file for fields of a dataclass of this file, parts of it still as plain data.

    Lists become tuples. Raises ConfigError where a value is not of its field's type.
    """
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    kinds = get_type_hints(cls)
    for key, value in values.items():
        if key in _PARTS:
            if not (isinstance(value, Mapping) or (value is None and key in _MAY_BE_NONE)):
                raise ConfigError(f"{where}: {key} is {shown(value)}, not a JSON object")
        elif not _fits(value, kinds[key]):
            raise ConfigError(f"{where}: {key} is {shown(data[key])}, not {_words(kinds[key])}")
    return values


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of a field's type."""
    inside = get_args(kind)
    if get_origin(kind) is tuple:
        count = None if inside[-1] is ... else len(inside)
        whole = isinstance(value, tuple) and count in (None, len(value))
        return whole and all(_fits(v, inside[0]) for v in value)
    if inside:  # such as int | None
        return any(_fits(value, k) for k in inside)
    if kind is int:
        return type(value) is int and abs(value) < 2**31
    return is_number(value) if kind is float else type(value) is kind


def _words(kind: Any) -> str:
    """A field's type, for messages: "int", "tuple of float", "int or None"."""
    inside = dict.fromkeys(getattr(k, "__name__", "") for k in get_args(kind) if k is not ...)
    if get_origin(kind) is tuple:
        count = "" if get_args(kind)[-1] is ... else f"{len(get_args(kind))} "
        return f"a list of {count}{' or '.join(inside)}"
    return " or ".join(inside).replace("NoneType", "null") or kind.__name__


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} {value!r} is unknown", fix=f"one of {', '.join(known)}")


def _above_zero(config: Any, where: str, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{where}.{name} is {getattr(config, name)!r}, not above 0")


def _within(config: Any, where: str, name: str, low: float, high: float) -> None:
    if not low <= getattr(config, name) <= high:
        raise ConfigError(
            f"{where}.{name} is {getattr(config, name)!r}, not in {low:g} to {high:g}"
        )


def _multiple(config: Any, where: str, name: str, of: str) -> None:
    value, divisor = getattr(config, name), getattr(config, of)
    if value % divisor:
        raise ConfigError(f"{where}.{name} {value} is not a multiple of {of} {divisor}")
