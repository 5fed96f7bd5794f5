"""Other people's config.json <-> LlavaConfig. Nothing here reads weights or imports transformers.

Field names and defaults: transformers' LlamaConfig, MistralConfig, CLIPVisionConfig, LlavaConfig
(4.37 and 5.23 agree on those used), and llava/model/llava_arch.py for the `mm_` fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from llava_jax.config import (
    CLIP_MEAN,
    CLIP_STD,
    LlavaConfig,
    VisionConfig,
)
from llava_jax.convert.config_reader import Reader, shown
from llava_jax.convert.language_configs import (
    language_config,
    language_json,
)
from llava_jax.convert.preprocessor import FILE as PREPROCESSOR_FILE
from llava_jax.convert.preprocessor import pads, pixel_config
from llava_jax.errors import ConfigError, WeightError

# Towers that checkpoints name without carrying their configuration (openai's config.json files).
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14-336": VisionConfig(),
    "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
    "openai/clip-vit-base-patch32": VisionConfig(224, 32, 768, 12, 12, 3072),
    "openai/clip-vit-base-patch16": VisionConfig(224, 16, 768, 12, 12, 3072),
}
_HF_VISION = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}


def vision_config(
    data: Mapping[str, Any],
    where: str,
    preprocessor: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    processor_where: str = PREPROCESSOR_FILE,
) -> VisionConfig:
    """A CLIPVisionConfig, or a whole CLIPConfig (its vision half), with the processor's settings.

    processor_where: what errors call `preprocessor`.
    """
    if isinstance(data.get("vision_config"), Mapping):
        data, where = data["vision_config"], f"{where}: vision_config"
    kind = Reader(data, where).word("model_type", "clip_vision_model")
    if kind not in ("clip_vision_model", "clip"):
        raise WeightError(
            f"{where}: a vision tower of type {shown(kind)} is not supported", fix="CLIP is"
        )
    r = Reader({**(defaults or {}), **data}, where)
    if r.integer("num_channels", 3) != 3:
        raise WeightError(f"{where}: num_channels is not 3")
    mean, std = (_triple(preprocessor, k, processor_where) for k in ("image_mean", "image_std"))
    size = r.integer("image_size", 224)
    try:
        return VisionConfig(
            image_size=size,
            patch_size=r.integer("patch_size", 32),
            width=r.integer("hidden_size", 768),
            layers=r.integer("num_hidden_layers", 12, high=10_000),
            heads=r.integer("num_attention_heads", 12),
            mlp_width=r.integer("intermediate_size", 3072),
            norm_eps=r.number("layer_norm_eps", 1e-5),
            hidden_act=r.word("hidden_act", "quick_gelu"),
            image_mean=mean or CLIP_MEAN,
            image_std=std or CLIP_STD,
            pixels=pixel_config(preprocessor, size, processor_where),
        )
    except ConfigError as error:
        raise WeightError(f"{where}: {error.message}") from None


def vision_json(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `vision_config`, without mean and std (those are the processor's)."""
    c = config
    return {
        "model_type": "clip_vision_model",
        "architectures": ["CLIPVisionModel"],
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_channels": 3,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_act": c.hidden_act,
        "layer_norm_eps": c.norm_eps,
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
    length = data.get("tokenizer_model_max_length")
    ratio = r.word("image_aspect_ratio", "square")
    return _llava(
        where,
        vision=vision,
        language=language_config(data, where, generation),
        projector=r.word("mm_projector_type", "linear"),
        feature_layer=r.integer("mm_vision_select_layer", -2, low=-1000),
        feature_select=r.word("mm_vision_select_feature", "patch"),
        image_aspect_ratio=ratio,
        max_length=None if length is None else r.integer("tokenizer_model_max_length", high=10**9),
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
    text, vision = data.get("text_config") or {}, data.get("vision_config") or {}
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
    text = Reader(text, f"{where}: text_config").data
    text = {"pad_token_id": data.get("pad_token_id"), **text}
    if data.get("eos_token_id") is not None:  # transformers asks the outer config first
        text = {**text, "eos_token_id": data["eos_token_id"]}
    language = language_config(text, f"{where}: text_config", generation)
    if r.flag("tie_word_embeddings"):
        language = replace(language, tied_head=True)
    vision_data = Reader(vision, f"{where}: vision_config").data
    defaults = None if vision_data else _HF_VISION
    return _llava(
        where,
        vision=vision_config(
            vision_data, f"{where}: vision_config", preprocessor, defaults, processor_where
        ),
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


def image_token(data: Mapping[str, Any]) -> Any:
    """The id of <image> in a Hugging Face config.json; transformers 5 reads either name."""
    return data.get("image_token_index", data.get("image_token_id", 32000))


def updated(kept: Mapping[str, Any] | None, fresh: Mapping[str, Any]) -> dict[str, Any]:
    """`fresh`, with the fields of `kept` that it does not set: unknown fields find their way back."""
    return {**(kept or {}), **fresh}


def _llava(where: str, **fields) -> LlavaConfig:
    try:
        return LlavaConfig(**fields)
    except ConfigError as error:
        raise WeightError(f"{where}: {error.message}") from None


def _triple(
    data: Mapping[str, Any] | None, key: str, where: str
) -> tuple[float, float, float] | None:
    values = (data or {}).get(key)
    if values is None:
        return None
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(v, int | float) for v in values)
        or (key == "image_std" and 0 in values)
    ):
        raise WeightError(f"{where}: {key} is not three numbers")
    return (float(values[0]), float(values[1]), float(values[2]))
