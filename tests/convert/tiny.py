"""Tiny random checkpoints of every kind, made on the spot: all parameters, all tensor names."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import sentencepiece

from llava_jax.config import LanguageConfig, LlavaConfig, LoraConfig, VisionConfig
from llava_jax.convert import Checkpoint, save_checkpoint
from llava_jax.params import parameter_shapes

# No two sizes alike, so that a transposed matrix shows in its shape wherever it can.
CONFIG = LlavaConfig(
    vision=VisionConfig(28, 14, 24, 3, 3, 40),
    language=LanguageConfig(
        vocab_size=90, width=32, layers=2, heads=4, kv_heads=2, head_width=10, mlp_width=48
    ),
    max_length=None,
)
ORIGINAL = replace(CONFIG, language=replace(CONFIG.language, head_width=8))  # it has no head_dim
TEXT = replace(ORIGINAL, language=replace(ORIGINAL.language, vocab_size=320))  # for `tokenizer`


def random_params(config=CONFIG, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * 0.3 + ("norm" in name and "scale" in name)).astype(dtype)
        for name, shape in parameter_shapes(config).items()
    }


def checkpoint(config=CONFIG, dtype="float32", seed=0, tokenizer=None):
    return Checkpoint(config, random_params(config, dtype, seed), tokenizer)


def save(path: Path, to: str, config=None, **kwargs) -> Path:
    config = config or (CONFIG if to in ("hf", "jax") else ORIGINAL)
    kwargs = {"dtype": "float32", "seed": 0, "tokenizer": None} | kwargs
    made = checkpoint(config, kwargs.pop("dtype"), kwargs.pop("seed"), kwargs.pop("tokenizer"))
    return save_checkpoint(made, path, to=to, **kwargs)


def lora(config=ORIGINAL):
    return replace(config, lora=LoraConfig(rank=3, alpha=6.0, dropout=0.1))


def language_model(path: Path, config=ORIGINAL, seed=0) -> Path:
    """The language half alone, as a LlamaForCausalLM folder."""
    from llava_jax.convert.io import output
    from llava_jax.convert.io.lazy import leaf, of_array
    from llava_jax.convert.table import keys
    from llava_jax.convert.table.language import language_json

    params = random_params(config, seed=seed)
    leaves = {n: leaf(n, of_array(p)) for n, p in params.items()}
    path.mkdir(parents=True)
    output.write_safetensors(path, keys.to_theirs(leaves, keys.LLAMA, config))
    data = language_json(config.language)
    (path / "config.json").write_text(json.dumps(data))
    return path


def clip(path: Path, config=ORIGINAL, seed=0) -> Path:
    """The tower alone, as a CLIPVisionModel folder."""
    from llava_jax.convert.io import output
    from llava_jax.convert.io.lazy import leaf, of_array
    from llava_jax.convert.table import configs, keys, pixels

    leaves = {n: leaf(n, of_array(p)) for n, p in random_params(config, seed=seed).items()}
    path.mkdir(parents=True)
    output.write_safetensors(path, keys.to_theirs(leaves, keys.CLIP, config))
    (path / "config.json").write_text(json.dumps(configs.vision_json(config.vision)))
    processor = pixels.preprocessor_json(config)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def tokenizer(folder: Path, size=320) -> Path:
    """A sentencepiece model of `size` pieces with tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "corpus.txt"
    words = "what is in this picture user assistant a red disc on the left of chat between".split()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 8)) for _ in range(300)]
    text.write_text("\n".join([*lines, "USER: ASSISTANT: What?"] * 2))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=size,
        model_type="bpe",
        character_coverage=1.0,
        minloglevel=2,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    text.unlink()
    (folder / "tokenizer.vocab").unlink()
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same_tensors(a: Path, b: Path) -> None:
    """Raises unless two folders hold the same names, dtypes, shapes and bytes."""
    from llava_jax.convert.io import folder as folders

    one, other = (folders.read_folder(p, allow_pickle=True)[0] for p in (a, b))
    assert set(one) == set(other)
    for name in one:
        x, y = one[name].read(), other[name].read()
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        assert np.ascontiguousarray(x).tobytes() == np.ascontiguousarray(y).tobytes(), name
