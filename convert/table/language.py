"""The language half of a config.json <-> LanguageConfig.

Field names and defaults: transformers' LlamaConfig and MistralConfig (4.37 and 5.24 agree on those
used).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llava_jax.config import LanguageConfig, RopeScaling
from llava_jax.errors import WeightError
from llava_jax.reader import TINY, Reader, shown

LANGUAGE_TYPES = ("llama", "mistral", "llava", "llava_llama", "llava_mistral")
# LlamaConfig's key -> (our field, LlamaConfig's default, largest value). Absent key-value heads and
# head width follow from heads and width.
_SIZES = {
    "vocab_size": ("vocab_size", 32000, 10**7),
    "hidden_size": ("width", 4096, 10**7),
    "intermediate_size": ("mlp_width", 11008, 10**7),
    "num_hidden_layers": ("layers", 32, 10_000),
    "num_attention_heads": ("heads", 32, 10**7),
    "num_key_value_heads": ("kv_heads", None, 10**7),
    "head_dim": ("head_width", None, 10**7),
    "max_position_embeddings": ("max_positions", 2048, 10**9),
}
_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}


def language_config(
    data: Mapping[str, Any], where: str, generation: Mapping[str, Any] | None = None
) -> LanguageConfig:
    """A LlamaConfig, a MistralConfig, or the language half of an original LLaVA config.json.

    generation: generation_config.json, whose eos_token_id goes before that of config.json, as in
    transformers' `generate`.
    """
    kind = Reader(data, where).word("model_type", "llama")
    if kind not in LANGUAGE_TYPES:
        raise WeightError(
            f"{where}: a language model of type {shown(kind)} is not supported",
            fix="LLaMA-shaped models are: llama, mistral",
        )
    mistral = kind in ("mistral", "llava_mistral")
    r = Reader({**(_MISTRAL if mistral else {}), **data}, where)
    if r.word("hidden_act", "silu") != "silu" or r.flag("mlp_bias"):
        raise WeightError(f"{where}: hidden_act other than silu, or mlp_bias, is not supported")
    sizes: dict[str, int] = {}
    for key, (ours, default, high) in _SIZES.items():
        if default is None:
            heads = sizes["heads"]
            default = heads if ours == "kv_heads" else sizes["width"] // heads
        sizes[ours] = r.integer(key, default, high=high)
    _multiple(r.where, sizes, "num_attention_heads", "num_key_value_heads")
    if sizes["head_width"] % 2:
        raise WeightError(f"{where}: head_dim {sizes['head_width']} is odd: RoPE needs pairs")
    theta, scaling = _rope(data, where)
    beside = f"{where.partition('config.json')[0]}generation_config.json"
    ends = Reader(generation or {}, beside).integers("eos_token_id", ())
    ends = ends or r.integers("eos_token_id", (2,))
    return LanguageConfig(
        **sizes,
        norm_eps=r.number("rms_norm_eps", 1e-6, low=0.0, high=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        tied_head=r.flag("tie_word_embeddings"),
        attention_bias=r.flag("attention_bias"),
        sliding_window=r.integer("sliding_window")
        if mistral and r.data["sliding_window"] is not None
        else None,
        bos_id=r.integer("bos_token_id", 1, low=0),
        eos_id=ends[0],
        more_eos_ids=ends[1:],
        # Absent, or LLaMA's -1: the original pads with <unk>, id 0.
        pad_id=max(r.integer("pad_token_id", 0, low=-1), 0),
    )


def _multiple(where: str, sizes: Mapping[str, int], key: str, of: str) -> None:
    value, divisor = (sizes[_SIZES[k][0]] for k in (key, of))
    if value % divisor:
        raise WeightError(f"{where}: {key} {value} is not a multiple of {of} {divisor}")


# What transformers requires of each kind beside rope_theta (modeling_rope_utils.py).
_ROPE_FIELDS = {
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def _rope(data: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """transformers 5 says rope_parameters, 4 says rope_theta and rope_scaling."""
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    theta = Reader(data, where).number("rope_theta", 10000.0, low=TINY)
    if not data.get(key):
        return theta, None
    r = Reader(data[key], f"{where}: {key}")
    theta = r.number("rope_theta", theta, low=TINY)
    kind = r.word("rope_type", r.word("type", "default"))
    nested = next((name for name, value in r.data.items() if isinstance(value, Mapping)), None)
    if nested is not None:
        raise WeightError(f"{r.where}: {shown(nested)}: settings per layer are not supported")
    if r.number("partial_rotary_factor", 1.0) != 1.0:
        raise WeightError(f"{r.where}: a partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind not in _ROPE_FIELDS:
        raise WeightError(
            f"{r.where}: rope_type {shown(kind)} is not supported",
            fix=f"default, {' and '.join(_ROPE_FIELDS)} are",
        )
    beside = data.get("original_max_position_embeddings")
    if beside is not None:  # as Phi-3 has it; transformers moves it into the settings
        r = Reader({**r.data, "original_max_position_embeddings": beside}, r.where)
    missing = [name for name in _ROPE_FIELDS[kind] if not r.has(name)]
    if missing:
        raise WeightError(
            f"{r.where}: {', '.join(missing)} missing, which rope_type {kind} needs",
            fix="transformers refuses it too: take the values from the base model's config.json",
        )
    if kind == "linear":
        return theta, RopeScaling(kind, r.number("factor", low=TINY))
    low, high = r.number("low_freq_factor", low=TINY), r.number("high_freq_factor", low=TINY)
    if high <= low:
        raise WeightError(f"{r.where}: high_freq_factor {high:g} is not above low_freq_factor")
    length = r.integer("original_max_position_embeddings")
    return theta, RopeScaling(kind, r.number("factor", low=TINY), low, high, length)


def language_json(config: LanguageConfig) -> dict[str, Any]:
    """The inverse of `language_config`, in the spelling that transformers 4 and 5 both read."""
    c, scaling = config, config.rope_scaling
    mistral = c.sliding_window is not None
    out: dict[str, Any] = {
        "model_type": "mistral" if mistral else "llama",
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        **{key: getattr(c, ours) for key, (ours, *_) in _SIZES.items()},
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": c.bos_id,
        "eos_token_id": eos_json(c),
        "pad_token_id": c.pad_id,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    if mistral:
        out["sliding_window"] = c.sliding_window
    else:
        out |= {"attention_bias": c.attention_bias, "mlp_bias": False}
    if scaling:
        out["rope_scaling"] = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            out["rope_scaling"] |= {
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
    return out


def eos_json(config: LanguageConfig) -> int | list[int]:
    """eos_token_id of a config.json or generation_config.json: one id, or a list of several."""
    return [config.eos_id, *config.more_eos_ids] if config.more_eos_ids else config.eos_id


def generation_json(config: LanguageConfig, pad_id: int) -> dict[str, Any]:
    """generation_config.json: where answers begin and end."""
    return {
        "bos_token_id": config.bos_id,
        "eos_token_id": eos_json(config),
        "pad_token_id": pad_id,
    }
