"""config.json of other projects <-> LlavaConfig. Nothing here reads weights or imports transformers.

Field names and defaults: transformers' LlamaConfig, MistralConfig, CLIPVisionConfig, LlavaConfig
(4.37 and 5.23 agree on those used), and llava/model/llava_arch.py for the `mm_` fields.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from llava_jax.config import CLIP_MEAN, CLIP_STD, LlavaConfig, VisionConfig
from llava_jax.convert.io.lazy import Lazy, Leaf
from llava_jax.convert.table.language import language_config, language_json
from llava_jax.convert.table.pixels import FILE as PREPROCESSOR_FILE
from llava_jax.convert.table.pixels import pads, pixel_config
from llava_jax.errors import WeightError
from llava_jax.reader import Reader, config_of, shown

log = logging.getLogger(__name__)

# Towers that checkpoints name without carrying their configuration (openai's config.json files).
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
    "openai/clip-vit-base-patch32": VisionConfig(224, 32, 768, 12, 12, 3072),
    "openai/clip-vit-base-patch16": VisionConfig(224, 16, 768, 12, 12, 3072),
}
# CLIPVisionConfig's key -> (our field, CLIPVisionConfig's default, LlavaConfig's default).
_VISION = {
    "image_size": ("image_size", 224, 336),
    "patch_size": ("patch_size", 32, 14),
    "hidden_size": ("width", 768, 1024),
    "num_hidden_layers": ("layers", 12, 24),
    "num_attention_heads": ("heads", 12, 16),
    "intermediate_size": ("mlp_width", 3072, 4096),
}


def vision_config(
    data: Mapping[str, Any],
    where: str,
    preprocessor: Mapping[str, Any] | None = None,
    processor_where: str = PREPROCESSOR_FILE,
    *,
    of_llava: bool = False,
) -> VisionConfig:
    """A CLIPVisionConfig, or a whole CLIPConfig (its vision half), with the processor's settings.

    processor_where: what errors call `preprocessor`. of_llava: absent sizes are those of LLaVA's tower.
    """
    if isinstance(data.get("vision_config"), Mapping):
        data, where = data["vision_config"], f"{where}: vision_config"
    kind = Reader(data, where).word("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise WeightError(
            f"{where}: a vision tower of type {shown(kind)} is not supported", fix="CLIP is"
        )
    r = Reader(data, where)
    if r.integer("num_channels", 3) != 3:
        raise WeightError(f"{where}: num_channels is not 3")
    mean, std = (_triple(preprocessor, k, processor_where) for k in ("image_mean", "image_std"))
    sizes = {
        ours: r.integer(key, defaults[of_llava], high=10_000 if ours == "layers" else 10**7)
        for key, (ours, *defaults) in _VISION.items()
    }
    with config_of(where):
        return VisionConfig(
            **sizes,
            norm_eps=r.number("layer_norm_eps", 1e-5, low=0.0, high=1.0),
            hidden_act=r.word("hidden_act", "quick_gelu"),
            image_mean=mean or CLIP_MEAN,
            image_std=std or CLIP_STD,
            pixels=pixel_config(preprocessor, sizes["image_size"], processor_where),
        )


def vision_json(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `vision_config`, without mean and std (those are the processor's)."""
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        **{key: getattr(config, ours) for key, (ours, *_) in _VISION.items()},
        "num_channels": 3,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "projection_dim": 768,
    }


def from_original(
    data: Mapping[str, Any],
    vision: VisionConfig,
    where: str,
    tokenizer_legacy: bool,
    generation: Mapping[str, Any] | None = None,
) -> LlavaConfig:
    """An original LLaVA config.json, whose tower is described by `vision`.

    generation: generation_config.json, for its end tokens.
    """
    r = Reader(data, where)
    if r.word("mm_patch_merge_type", "flat") != "flat":
        raise WeightError(
            f"{where}: mm_patch_merge_type is that of LLaVA-1.6, which is not supported"
        )
    if r.flag("s2"):
        raise WeightError(f"{where}: s2 towers are not supported")
    length = "tokenizer_model_max_length"
    with config_of(where):
        return LlavaConfig(
            vision=vision,
            language=language_config(data, where, generation),
            projector=r.word("mm_projector_type", "linear"),
            feature_layer=r.integer("mm_vision_select_layer", -2, low=-1000),
            feature_select=r.word("mm_vision_select_feature", "patch"),
            image_aspect_ratio=r.word("image_aspect_ratio", "square"),
            max_length=r.integer(length, high=10**9) if r.has(length) else None,
            use_im_start_end=r.flag("mm_use_im_start_end"),
            tokenizer_legacy=tokenizer_legacy,
        )


def original_json(config: LlavaConfig, tower: str) -> dict[str, Any]:
    """config.json for the original code. `tower` is the name or path for mm_vision_tower."""
    out = language_json(config.language)
    mistral = out["model_type"] == "mistral"
    del out["head_dim"]
    if config.max_length is not None:
        out["tokenizer_model_max_length"] = config.max_length
    return out | {
        "model_type": "llava_mistral" if mistral else "llava_llama",
        "architectures": ["LlavaMistralForCausalLM" if mistral else "LlavaLlamaForCausalLM"],
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_hidden_size": config.vision.width,
        "mm_patch_merge_type": "flat",
        "mm_projector_type": config.projector,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": config.use_im_start_end,
        "mm_vision_select_feature": config.feature_select,
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_tower": tower,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }


def from_hf(
    data: Mapping[str, Any],
    where: str,
    preprocessor: Mapping[str, Any] | None = None,
    tokenizer_legacy: bool = False,
    generation: Mapping[str, Any] | None = None,
    processor_where: str = PREPROCESSOR_FILE,
) -> LlavaConfig:
    """A LlavaForConditionalGeneration config.json.

    Without a processor configuration the original's padding to a square is assumed.
    generation: generation_config.json, for its end tokens.
    """
    r = Reader(data, where)
    image_token(data, where)  # read where a vocabulary is cut
    text, vision = r.object("text_config"), r.object("vision_config")
    layers = data.get("vision_feature_layer")
    if isinstance(layers, list):  # transformers concatenates them
        if len(layers) != 1:
            raise WeightError(f"{where}: several vision_feature_layer are not supported")
        r = Reader({**data, "vision_feature_layer": layers[0]}, where)
    if r.word("projector_hidden_act", "gelu") != "gelu":
        raise WeightError(f"{where}: projector_hidden_act other than gelu is not supported")
    if not r.flag("multimodal_projector_bias", True):
        raise WeightError(f"{where}: a projector without bias is not supported")
    strategy = r.word("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise WeightError(f"{where}: vision_feature_select_strategy {shown(strategy)} is unknown")
    text = {"pad_token_id": r.integer("pad_token_id", -1, low=-1), **text}
    if r.has("eos_token_id"):  # transformers asks the outer config first
        text["eos_token_id"] = data["eos_token_id"]
    language = language_config(text, f"{where}: text_config", generation)
    if r.flag("tie_word_embeddings"):
        language = replace(language, tied_head=True)
    vision = vision_config(
        vision,
        f"{where}: vision_config",
        preprocessor,
        processor_where,
        of_llava=not vision,
    )
    with config_of(where):
        return LlavaConfig(
            vision=vision,
            language=language,
            feature_layer=r.integer("vision_feature_layer", -2, low=-1000),
            feature_select="patch" if strategy == "default" else "cls_patch",
            image_aspect_ratio="pad" if pads(preprocessor) else "square",
            max_length=None,
            tokenizer_legacy=tokenizer_legacy,
        )


def hf_json(config: LlavaConfig, image_id: int, pad_id: int, dtype: str) -> dict[str, Any]:
    """config.json of a LlavaForConditionalGeneration; vocab_size is that of config.language."""
    text = language_json(replace(config.language, pad_id=pad_id))
    vision = vision_json(config.vision)
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_seq_length": config.image_tokens,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default" if config.feature_select == "patch" else "full",
        "tie_word_embeddings": config.language.tied_head,
        "torch_dtype": dtype,
        "text_config": text | {"torch_dtype": dtype},
        "vision_config": vision | {"torch_dtype": dtype},
    }


def image_token(data: Mapping[str, Any], where: str = "config.json") -> int:
    """The id of <image> in a Hugging Face config.json; transformers 5 reads either name.

    It may be one that the model has no row for, or a negative one.
    """
    r = Reader(data, where)
    key = "image_token_index" if r.has("image_token_index") else "image_token_id"
    return r.integer(key, 32000, low=-(10**7))


def _triple(
    data: Mapping[str, Any] | None, key: str, where: str
) -> tuple[float, float, float] | None:
    r = Reader(data or {}, where)
    values = r.numbers(key, 3)
    if values and key == "image_std" and any(abs(v) < 1e-6 for v in values):
        raise r.error(key, data and data[key], "three numbers other than zero")
    return (values[0], values[1], values[2]) if values else None


# The dtype that a config.json declares: always that of the weights beside it ----------------------

_DTYPE_KEYS = ("dtype", "torch_dtype")  # of transformers 5, and of 4 (which 5 reads too)


def types_of(tensors: Iterable[Leaf | Lazy]) -> list[str]:
    """The types of these parameters as torch calls them, such as ["bfloat16"]; most have one."""
    parts = (p for t in tensors for p in (t.parts if isinstance(t, Leaf) else (t,)))
    return sorted({p.dtype.name for p in parts})


def with_dtype(
    data: Mapping[str, Any], tensors: Iterable[Leaf | Lazy], read: list[str] | None = None
) -> dict[str, Any]:
    """A config.json whose dtype fields, of either spelling and at any depth, match `tensors`.

    read: the types that were beside `data` when it was read. If they still are, what it said of them
    stays, unless it would round them. Otherwise the dtype is that of `tensors`; where these differ it
    is float32, which holds all of them: transformers loads every parameter in the one dtype of
    config.json. Absent fields are not added: without them transformers looks at the weights.
    """
    kinds = types_of(tensors)
    if kinds == read and _declared(data) <= {*kinds, "float32", None}:
        return dict(data)
    dtype = kinds[0] if len(kinds) == 1 else "float32"
    if len(kinds) > 1:
        log.warning(
            "the weights are %s: config.json says float32, so that loading them rounds nothing "
            "(--dtype brings them to one type)",
            " and ".join(kinds),
        )
    return _set_dtype(data, dtype)


def _declared(data: Mapping[str, Any]) -> set[Any]:
    """Every dtype that a config.json names."""
    own = {data[k] if isinstance(data[k], str) else None for k in _DTYPE_KEYS if k in data}
    return own.union(*(_declared(v) for v in data.values() if isinstance(v, Mapping)))


def _set_dtype(data: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    out = {k: _set_dtype(v, dtype) if isinstance(v, Mapping) else v for k, v in data.items()}
    return out | {k: dtype for k in _DTYPE_KEYS if k in out}
