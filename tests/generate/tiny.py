"""A model of a few thousand parameters, and prompts for it."""

import io
from dataclasses import replace
from functools import cache

import numpy as np
import sentencepiece

from llava_jax.config import LanguageConfig, LlavaConfig, VisionConfig
from llava_jax.generate import Generator
from llava_jax.llava import abstract_params
from llava_jax.model import LlavaModel
from llava_jax.text.example import Example
from llava_jax.text.tokenizer import Tokenizer

VOCAB = 61
LANGUAGE = LanguageConfig(
    vocab_size=VOCAB,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=48,
    max_positions=256,
)
CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=16, layers=2, heads=2, mlp_width=32),
    language=LANGUAGE,
)
# A window shorter than the prompts, and every other thing that changes the parameters' shapes.
WINDOWED = replace(
    CONFIG, language=replace(LANGUAGE, sliding_window=6, tied_head=True, attention_bias=True)
)


@cache
def params(config: LlavaConfig = CONFIG) -> dict[str, np.ndarray]:
    """Random ones, made by numpy: compiling the model's own initialisation takes seconds."""
    rng = np.random.default_rng(7)
    made = {}
    for name, leaf in abstract_params(config).items():
        width = leaf.shape[-2] if name.endswith("kernel") else 16
        value = rng.normal(0, width**-0.5, leaf.shape).astype(np.float32)
        made[name] = 1 + value if name.endswith("scale") else value
    return made


@cache
def generator(config: LlavaConfig = CONFIG) -> Generator:
    # No token ends an answer: -1 is never chosen, so answers are long and worth comparing.
    return Generator(config, params(config), eos_ids=(-1,))


def prompt(length: int, images: int = 0, seed: int = 0) -> Example:
    """`length` ids of which `images` are slots."""
    rng = np.random.default_rng(100 * length + 10 * images + seed)
    ids = rng.integers(3, VOCAB, length)
    ids[rng.choice(length, images, replace=False)] = -200
    pictures = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    return Example(ids, tuple(pictures))


@cache
def tokenizer() -> Tokenizer:
    """BPE with byte fallback, as LLaMA's."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: what is this? ASSISTANT: a red disc on a table"] * 9),
        model_writer=out,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=3,
    )
    return Tokenizer(out.getvalue())


@cache
def model() -> LlavaModel:
    """A random model that talks nonsense, with a tokenizer."""
    language = replace(LANGUAGE, vocab_size=320, max_positions=512)
    config = replace(CONFIG, language=language)
    return LlavaModel(config, params(config), tokenizer())


MIXED = [prompt(5, 1), prompt(12), prompt(9, 2), prompt(1)]
