"""Tiny models in the folders that a user starts from, named and split as the released ones are.

Every tensor is written by its published name (SPEC of the layouts: convert/table/keys.py has ours), with
numpy alone; nothing of the package makes them but the sentencepiece vocabulary.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from examples.tiny.vocabulary import train as train_vocabulary
from tests.rehearsal import sources

Tensors = dict[str, np.ndarray]


@dataclass(frozen=True)
class Size:
    """Sizes of a model: Vicuna and CLIP are the same, larger."""

    vocabulary: int = 640
    width: int = 64
    layers: int = 2
    heads: int = 4
    mlp: int = 128
    image: int = 28  # pixels; 4 features a picture
    patch: int = 14
    tower_width: int = 32
    tower_layers: int = 3
    tower_heads: int = 2
    tower_mlp: int = 64


TINY = Size()
FULL_LENGTH = Size(  # as many tokens, pictures and positions as the real one, each narrow
    vocabulary=32000, width=32, heads=2, mlp=64, image=336, tower_width=16, tower_layers=2
)


def _random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)


def _norm(width: int) -> np.ndarray:
    return np.ones(width, np.float32)


# Halves -------------------------------------------------------------------------------------------


def language_tensors(size: Size, rng: np.random.Generator) -> Tensors:
    """LlamaForCausalLM."""
    w, m = size.width, size.mlp
    made = {
        "model.embed_tokens.weight": _random(rng, size.vocabulary, w),
        "model.norm.weight": _norm(w),
        "lm_head.weight": _random(rng, size.vocabulary, w),
    }
    for i in range(size.layers):
        at = f"model.layers.{i}"
        made |= {f"{at}.self_attn.{n}_proj.weight": _random(rng, w, w) for n in "qkvo"}
        made |= {f"{at}.mlp.{n}_proj.weight": _random(rng, m, w) for n in ("gate", "up")}
        made[f"{at}.mlp.down_proj.weight"] = _random(rng, w, m)
        made |= {f"{at}.{n}_layernorm.weight": _norm(w) for n in ("input", "post_attention")}
    return made


def tower_tensors(size: Size, rng: np.random.Generator) -> Tensors:
    """The vision half of a CLIPModel, its names from `vision_model.` on."""
    w, m, patches = size.tower_width, size.tower_mlp, (size.image // size.patch) ** 2
    top = "vision_model.embeddings"
    made = {
        f"{top}.class_embedding": _random(rng, w),
        f"{top}.patch_embedding.weight": _random(rng, w, 3, size.patch, size.patch),
        f"{top}.position_embedding.weight": _random(rng, patches + 1, w),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for i in range(size.tower_layers):
        at = f"vision_model.encoder.layers.{i}"
        shapes = {f"self_attn.{n}_proj": (w, w) for n in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (m, w), "mlp.fc2": (w, m)}
        for name, shape in shapes.items():
            made[f"{at}.{name}.weight"] = _random(rng, *shape)
            made[f"{at}.{name}.bias"] = np.zeros(shape[0], np.float32)
        norms += [f"{at}.layer_norm{n}" for n in (1, 2)]
    for name in norms:
        made |= {f"{name}.weight": _norm(w), f"{name}.bias": np.zeros(w, np.float32)}
    return made


def projector_tensors(size: Size, rng: np.random.Generator) -> Tensors:
    """mlp2x_gelu, as {"0.weight", "0.bias", "2.weight", "2.bias"}."""
    return {
        "0.weight": _random(rng, size.width, size.tower_width),
        "0.bias": np.zeros(size.width, np.float32),
        "2.weight": _random(rng, size.width, size.width),
        "2.bias": np.zeros(size.width, np.float32),
    }


# Folders ------------------------------------------------------------------------------------------


def vicuna(folder: Path, size: Size = TINY, *, pickled: bool = False) -> Path:
    """As lmsys/vicuna-7b-v1.5: a Llama with its tokenizer. pickled: in .bin files, as it is there."""
    _write(folder, language_tensors(size, np.random.default_rng(1)), pickled=pickled)
    _json(folder / "config.json", _llama_config(size) | {"architectures": ["LlamaForCausalLM"]})
    _tokenizer(folder, size)
    return folder


def clip(folder: Path, size: Size = TINY, *, pickled: bool = False) -> Path:
    """As openai/clip-vit-large-patch14-336: a whole CLIPModel, its text half too."""
    rng = np.random.default_rng(2)
    tensors = tower_tensors(size, rng)
    tensors["vision_model.embeddings.position_ids"] = np.arange(
        (size.image // size.patch) ** 2 + 1, dtype=np.int64
    )[None]
    tensors |= {
        "logit_scale": np.full((), 2.6592, np.float32),
        "visual_projection.weight": _random(rng, 16, size.tower_width),
        "text_projection.weight": _random(rng, 16, 16),
        "text_model.embeddings.token_embedding.weight": _random(rng, 40, 16),
    }
    _write(folder, tensors, pickled=pickled)
    vision = _clip_config(size)
    _json(
        folder / "config.json",
        {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": 16,
            "text_config": {"model_type": "clip_text_model", "hidden_size": 16},
            "vision_config": vision,
        },
    )
    _json(folder / "preprocessor_config.json", _preprocessor(size))
    return folder


def original(folder: Path, size: Size = TINY, *, pickled: bool = False) -> Path:
    """As liuhaotian/llava-v1.5-7b: the tower is not in it, but named by its hub id."""
    rng = np.random.default_rng(3)
    tensors = language_tensors(size, rng)
    tensors |= {
        f"model.mm_projector.{n}": value for n, value in projector_tensors(size, rng).items()
    }
    _write(folder, _half(tensors), pickled=pickled)
    _json(
        folder / "config.json",
        _llama_config(size)
        | {
            "architectures": ["LlavaLlamaForCausalLM"],
            "model_type": "llava",
            "freeze_mm_mlp_adapter": False,
            "image_aspect_ratio": "pad",
            "mm_hidden_size": size.tower_width,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": "openai/clip-vit-large-patch14-336",
            "tune_mm_mlp_adapter": False,
            "use_mm_proj": True,
            "max_length": 4096,
        },
    )
    _tokenizer(folder, size)
    return folder


def hugging_face(folder: Path, size: Size = TINY) -> Path:
    """As llava-hf/llava-1.5-7b-hf: <image> and <pad> added, rows rounded up to a multiple of 64."""
    rng = np.random.default_rng(3)
    language, projector = language_tensors(size, rng), projector_tensors(size, rng)
    rows = -(-(size.vocabulary + 2) // 64) * 64
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        more = language[name].mean(0) + np.zeros((rows - size.vocabulary, 1), np.float32)
        language[name] = np.concatenate([language[name], more])
    tensors = {f"language_model.{n}": value for n, value in language.items()}
    tensors |= {f"vision_tower.{n}": value for n, value in tower_tensors(size, rng).items()}
    linear = {"0": "linear_1", "2": "linear_2"}
    for name, value in projector.items():
        number, _, kind = name.partition(".")
        tensors[f"multi_modal_projector.{linear[number]}.{kind}"] = value
    _write(folder, _half(tensors))
    image, pad = size.vocabulary, size.vocabulary + 1
    text = _llama_config(size) | {"architectures": ["LlamaForCausalLM"], "vocab_size": rows}
    _json(
        folder / "config.json",
        {
            "architectures": ["LlavaForConditionalGeneration"],
            "ignore_index": -100,
            "image_token_index": image,
            "image_seq_length": (size.image // size.patch) ** 2,
            "model_type": "llava",
            "pad_token_id": pad,
            "projector_hidden_act": "gelu",
            "text_config": text,
            "torch_dtype": "float16",
            "tie_word_embeddings": False,
            "vision_config": _clip_config(size),
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
        },
    )
    _json(folder / "preprocessor_config.json", _preprocessor(size))
    _tokenizer(folder, size, added={"<image>": image, "<pad>": pad})
    return folder


# Files --------------------------------------------------------------------------------------------


def _half(tensors: Tensors) -> Tensors:
    return {name: value.astype(np.float16) for name, value in tensors.items()}


def _write(folder: Path, tensors: Tensors, *, pickled: bool = False) -> None:
    """Two shards and their index, as safetensors or as torch's pickles."""
    folder.mkdir(parents=True)
    names = sorted(tensors)
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    files = {
        n: f"{stem}-0000{1 + (i > len(names) // 2)}-of-00002.{ending}" for i, n in enumerate(names)
    }
    for file in sorted(set(files.values())):
        part = {n: tensors[n] for n in names if files[n] == file}
        if pickled:
            import torch

            torch.save({n: torch.from_numpy(v) for n, v in part.items()}, folder / file)
        else:
            save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(value.nbytes for value in tensors.values())
    _json(
        folder / (f"{stem}.bin.index.json" if pickled else f"{stem}.safetensors.index.json"),
        {"metadata": {"total_size": total}, "weight_map": files},
    )


def _llama_config(size: Size) -> dict:
    return {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": size.width,
        "initializer_range": 0.02,
        "intermediate_size": size.mlp,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": size.vocabulary,
    }


def _clip_config(size: Size) -> dict:
    return {
        "hidden_act": "quick_gelu",
        "hidden_size": size.tower_width,
        "image_size": size.image,
        "intermediate_size": size.tower_mlp,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": size.tower_heads,
        "num_channels": 3,
        "num_hidden_layers": size.tower_layers,
        "patch_size": size.patch,
        "projection_dim": 16,
    }


def _preprocessor(size: Size) -> dict:
    return {
        "crop_size": size.image,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": size.image,
    }


def _tokenizer(folder: Path, size: Size, added: dict[str, int] | None = None) -> None:
    """tokenizer.model with exactly size.vocabulary pieces, and the files that lie beside it."""
    rng = np.random.default_rng(4)
    makers = [source.make for source in sources.SOURCES]
    records = [make(rng, i) for i in range(30) for make in makers]
    texts = [turn["value"] for record in records for turn in record["conversations"]]
    texts += ["A chat between a curious user and an artificial intelligence assistant. USER: "] * 9
    train_vocabulary(texts, folder / "tokenizer.model", size=min(size.vocabulary, 640) - 8)
    _fill(folder / "tokenizer.model", size.vocabulary)
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": False}
    settings |= {"tokenizer_class": "LlamaTokenizer", "model_max_length": 2048, **tokens}
    settings["pad_token"] = "<pad>" if added else None
    if added:
        flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        settings["added_tokens_decoder"] = {
            str(i): {"content": t, "special": True, **flags} for t, i in added.items()
        }
        _json(folder / "added_tokens.json", added)
    _json(folder / "tokenizer_config.json", settings)
    _json(folder / "special_tokens_map.json", tokens | {"pad_token": "<pad>" if added else "<unk>"})
    _json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def _fill(path: Path, count: int) -> None:
    """Adds pieces that no text contains until the model has `count`."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())  # pyright: ignore[reportAttributeAccessIssue]
    lowest = min(piece.score for piece in proto.pieces)
    for n in range(count - len(proto.pieces)):
        proto.pieces.add(piece=f"\u2581\u00a4{n:x}", score=lowest - 1 - n)
    path.write_bytes(proto.SerializeToString())


def _json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2))
