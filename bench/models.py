"""The models of the benchmarks: our config and transformers' of the same shapes, with random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

SIZES = ("tiny", "65m", "65m-336", "7b", "13b")
IMAGE = -1  # transformers' placeholder: the last token of the vocabulary


def model_config(size: str, positions: int = 0) -> Any:
    """LlavaConfig of a size, with room for so many positions. 65m: tower 256 x 8, decoder 512 x 8.

    65m-336: with pictures of 336 pixels, so 576 features as the 7B has.
    """
    from llava_jax.config import LanguageConfig, LlavaConfig, VisionConfig

    small = LlavaConfig(
        vision=VisionConfig(112, 14, width=256, layers=8, heads=4, mlp_width=1024),
        language=LanguageConfig(
            width=512, layers=8, heads=8, kv_heads=8, head_width=64, mlp_width=1376
        ),
    )
    made = {
        "tiny": LlavaConfig.tiny(),
        "65m": small,
        "65m-336": replace(small, vision=replace(small.vision, image_size=336)),
        "7b": LlavaConfig.v15_7b(),
        "13b": LlavaConfig.v15_13b(),
    }[size]
    most = max(made.language.max_positions, positions)
    return replace(made, language=replace(made.language, max_positions=most))


def transformers_config(config: Any) -> Any:
    """transformers' LlavaConfig of the same shapes."""
    import transformers

    v, t = config.vision, config.language
    text = {
        "model_type": "llama",
        "vocab_size": t.vocab_size,
        "hidden_size": t.width,
        "intermediate_size": t.mlp_width,
        "num_hidden_layers": t.layers,
        "num_attention_heads": t.heads,
        "num_key_value_heads": t.kv_heads,
        "head_dim": t.head_width,
        "max_position_embeddings": t.max_positions,
        "rms_norm_eps": t.norm_eps,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": v.width,
        "intermediate_size": v.mlp_width,
        "num_hidden_layers": v.layers,
        "num_attention_heads": v.heads,
        "image_size": v.image_size,
        "patch_size": v.patch_size,
    }
    return transformers.LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=t.vocab_size + IMAGE,
        image_seq_length=config.image_tokens,
    )


def save_random(size: str, folder: Path, dtype: str = "float32") -> None:
    """A random model of a size in Hugging Face's layout, in `folder`; one that is there is left."""
    if (folder / "config.json").exists():
        return
    import torch
    import transformers

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = transformers.LlavaForConditionalGeneration(transformers_config(model_config(size)))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
