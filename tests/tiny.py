"""A very small LLaVA and batches for it, for tests that need no data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.config import LanguageConfig, LlavaConfig, VisionConfig
from llava_jax.llava import abstract_params

CONFIG = LlavaConfig(
    vision=VisionConfig(image_size=28, patch_size=14, width=32, layers=3, heads=2, mlp_width=48),
    language=LanguageConfig(
        vocab_size=64,
        width=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=16,
        mlp_width=64,
        max_positions=128,
    ),
    max_length=64,
)


def random_batch(rows: int = 8, length: int = 24, images: int = 1, seed: int = 0, config=CONFIG):
    """A batch of the layout llava_jax.batch makes: an image first, then text, ragged ends."""
    rng = np.random.default_rng(seed)
    i, size = config.image_tokens, config.vision.image_size
    batch = {
        "tokens": rng.integers(3, config.language.vocab_size, (rows, length)),
        "slots": np.full((rows, length), -1),
        "positions": np.tile(np.arange(length), (rows, 1)),
        "segments": np.ones((rows, length)),
        "turns": np.zeros((rows, length)),
        "target_at": np.zeros((rows, 6)),
        "targets": np.full((rows, 6), -100),
    }
    batch = {name: value.astype(np.int32) for name, value in batch.items()}
    for row in range(rows):
        n = length - row % 5
        for k in range(images):
            batch["slots"][row, 1 + k * i : 1 + (k + 1) * i] = np.arange(k * i, (k + 1) * i)
        at = np.sort(rng.choice(np.arange(1 + images * i, n - 1), 1 + row % 6, replace=False))
        batch["target_at"][row, : len(at)] = at
        batch["targets"][row, : len(at)] = batch["tokens"][row, at + 1]
        for name in ("tokens", "positions", "segments"):
            batch[name][row, n:] = 0
    shape = (rows, images, size, size, 3)
    batch["images"] = rng.integers(0, 256, shape).astype(np.uint8)
    return batch


def grouped(batch, groups: int, config=CONFIG):
    """The same batch in fewer groups of rows, whose images and targets they share."""
    rows, length = batch["tokens"].shape
    within = np.arange(rows, dtype=np.int32)[:, None] % (rows // groups)
    per_row = batch["images"].shape[1] * config.image_tokens
    slots = np.where(batch["slots"] < 0, -1, batch["slots"] + within * per_row)
    shared = {"target_at": batch["target_at"] + within * length, "targets": batch["targets"]}
    shared = {name: value.reshape(groups, -1) for name, value in shared.items()}
    images = batch["images"].reshape(groups, -1, *batch["images"].shape[2:])
    return {**batch, **shared, "slots": slots, "images": images}


@functools.cache
def _params(config: LlavaConfig, seed: int) -> dict[str, np.ndarray]:
    rng, made = np.random.default_rng(seed), {}
    for name, leaf in abstract_params(config).items():
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        if name.endswith((".scale", ".bias")):
            values = values * np.float32(0.1) + name.endswith(".scale")
        elif name.endswith((".kernel", ".lora_a")):
            values *= np.float32(np.prod(leaf.shape[-2:-1]) ** -0.5)
        elif name.endswith(".lora_b"):
            values[:] = 0
        made[name] = values
    return made


def random_params(config: LlavaConfig = CONFIG, seed: int = 0) -> dict[str, jax.Array]:
    """Random parameters made without compiling anything; norms and biases are not at 1 and 0."""
    return {name: jnp.asarray(value) for name, value in _params(config, seed).items()}
