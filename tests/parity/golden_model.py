"""Helpers of the golden-logits tests: cases of golden.json as batches of this package."""

import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.convert import load_checkpoint
from llava_jax.llava import binder
from tests.conftest import SHARED

GOLDEN = "golden/model"
LOSS = 1e-5
"""How far a loss may be."""


def models_with(path: str = "golden.json") -> list[str]:
    """Names of the golden models that have `path`; ["main"], whose tests then skip, without any."""
    folders = sorted((SHARED / GOLDEN).glob(f"*/{path}"))
    return [str(f.relative_to(SHARED / GOLDEN).parts[0]) for f in folders] or ["main"]


def numbered(file: str, *keys: str) -> list[tuple[str, int]]:
    """(model, number) of every golden case that the models hold in `file` under `keys`."""
    found = []
    for model in models_with(file):
        path = SHARED / GOLDEN / model / file
        held = cases(path.parent, file) if path.exists() else {}
        for key in keys:
            held = held.get(key, {})
        found += [(model, i) for i in range(len(held))]
    return found or [("main", 0)]


def adapters() -> list[tuple[str, str]]:
    """(model, folder) of every golden LoRA pair; one, whose test then skips, without any."""
    found = sorted((SHARED / GOLDEN).glob("*/*/adapter_config.json"))
    return [(p.parts[-3], p.parts[-2]) for p in found] or [("main", "lora_bin")]


def lora_cases() -> list[tuple[str, str, int]]:
    """(model, adapter, number) of every golden case with every adapter of its model."""
    return [
        (model, adapter, number)
        for model, adapter in adapters()
        for of, number in numbered("golden.json", "lora", "cases")
        if of == model
    ]


def column_stride(width: int, columns: int, *told: int | None) -> int:
    """Of an array that keeps `width` of `columns` columns, every n-th: n.

    Not every golden array says its stride. `told` are those that the file says of this array and of
    its neighbours, nearest first; else it is the one that gives the width, a power of two if one does.
    """
    fitting = [n for n in range(1, columns + 1) if -(-columns // n) == width]
    assert fitting, f"no stride keeps {width} of {columns} columns"
    powers = [n for n in fitting if n & (n - 1) == 0]
    return next(n for n in (*told, *powers, *fitting) if n in fitting)


@functools.cache
def cases(folder: Path, file: str = "golden.json") -> dict:
    return json.loads((folder / file).read_text())


@functools.cache
def arrays(folder: Path, file: str = "golden.npz"):
    return np.load(folder / file)


def load_with(folder: Path, overrides: dict, tmp_path: Path):
    """The checkpoint with some settings of its config.json changed."""
    if not overrides:
        return load_checkpoint(folder, allow_pickle=True)
    copy = tmp_path / folder.name
    copy.mkdir()
    for name in os.listdir(folder):
        if name != "config.json":
            (copy / name).symlink_to(folder / name)
    config = json.loads((folder / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | overrides))
    return load_checkpoint(copy, allow_pickle=True, vision_tower=folder.parent / "vision_tower")


def batch_of(case: dict, images: np.ndarray, config) -> tuple[dict, list[int]]:
    """(batch right-padded, lengths) of a case whose ids hold -200 at an image."""
    masks = case.get("attention_mask") or [[1] * len(r) for r in case["input_ids"]]
    rows = [np.array(ids)[np.array(mask, bool)] for ids, mask in zip(case["input_ids"], masks)]
    counts = [int((r == -200).sum()) for r in rows]
    slots_per = max(1, *counts) if len(counts) > 1 else max(1, counts[0])
    index = iter(case["image_index"])
    size = images.shape[-1]
    pixels = np.zeros((len(rows), slots_per, size, size, 3), np.float32)
    for b, n in enumerate(counts):
        for k in range(max(n, 1)):  # a sample without an image uses one up all the same
            image = images[next(index)].transpose(1, 2, 0)
            pixels[b, k] = image if n else 0
    return _batch(rows, pixels, config), [
        min(len(r) + n * (config.image_tokens - 1), config.max_length or 10**9)
        for r, n in zip(rows, counts)
    ]


def _batch(rows, pixels, config) -> dict:
    spliced = []
    for row in rows:
        tokens, slots = [], []
        for token in row:
            if token == -200:
                first = sum(s >= 0 for s in slots)
                slots += range(first, first + config.image_tokens)
                tokens += [0] * config.image_tokens
            else:
                slots.append(-1)
                tokens.append(int(token))
        limit = config.max_length
        spliced.append((tokens[:limit], slots[:limit]))
    width = max(len(t) for t, _ in spliced)
    shape = (len(rows), width)
    batch = {k: np.zeros(shape, np.int32) for k in ("tokens", "positions", "segments", "turns")}
    batch["slots"] = np.full(shape, -1, np.int32)
    for b, (tokens, slots) in enumerate(spliced):
        n = len(tokens)
        batch["tokens"][b, :n], batch["slots"][b, :n] = tokens, slots
        batch["positions"][b, :n], batch["segments"][b, :n] = np.arange(n), 1
    return batch | {"images": pixels}


def valid_rows(array: np.ndarray, mask) -> list[np.ndarray]:
    """The rows of `array` at the positions where `mask` is 1, a list of [t, ...]."""
    if mask is None:
        return list(array)
    return [a[np.array(m, bool)] for a, m in zip(array, mask)]


def forward(config, params, batch):
    """Logits float32[B, T, V] by a program of their own."""
    bind = binder(config)

    @jax.jit
    def logits(params, batch):
        model = bind(params)
        return model.logits(model(batch))

    return logits({n: jnp.asarray(p, jnp.float32) for n, p in params.items()}, batch)


def loss_of(logits, labels):
    """Mean cross entropy over the labels that are not -100, shifted by one."""
    logits, labels = logits[:, :-1], labels[:, 1:]
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, jnp.maximum(labels, 0)[..., None], -1
    ).squeeze(-1)
    return jnp.where(labels >= 0, nll, 0).sum() / (labels >= 0).sum()


def right_padded(rows, width):
    """int32[len(rows), width], -100 behind each row."""
    out = np.full((len(rows), width), -100, np.int32)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out
