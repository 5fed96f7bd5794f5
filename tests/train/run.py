"""A tiny run: model folder, tokenizer and data, all made on the spot."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from examples.tiny.vocabulary import train as train_vocabulary
from llava_jax.convert import Checkpoint, save_checkpoint
from llava_jax.text.tokenizer import Tokenizer
from tests.tiny import CONFIG, random_params

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230)}


def make_data(folder: Path, count: int = 20) -> Path:
    """A JSON of one-colour pictures with two questions each; some records have no image."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for i in range(count):
        name = list(COLORS)[i % 3]
        turns = [("What color is it?", name), (f"Is it {name}?", "yes")]
        record = {"id": f"s{i}", "conversations": []}
        if i % 7 != 6:
            pixels = rng.normal(COLORS[name], 9, (20, 28, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
            record["image"] = f"images/{i}.png"
            turns[0] = (f"<image>\n{turns[0][0]}", name)
        for question, answer in turns:
            record["conversations"].append({"from": "human", "value": question})
            record["conversations"].append({"from": "gpt", "value": answer})
        records.append(record)
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return path


def make_model(folder: Path, data: Path) -> Path:
    """A random model in this project's format, with a vocabulary of the data's words."""
    texts = [t["value"] for r in json.loads(data.read_text()) for t in r["conversations"]]
    (folder / "tokenizer").mkdir(parents=True)
    train_vocabulary(texts * 3, folder / "tokenizer" / "tokenizer.model", size=340)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    tokenizer.save(folder / "tokenizer")
    language = dataclasses.replace(CONFIG.language, vocab_size=len(tokenizer), max_positions=512)
    config = dataclasses.replace(CONFIG, language=language, max_length=384)
    checkpoint = Checkpoint(config, random_params(config), tokenizer=folder / "tokenizer")
    return save_checkpoint(checkpoint, folder / "model", to="jax")


def overrides(model: Path, data: Path, **changes) -> list[str]:
    """Command-line settings of a run of a few short steps."""
    values = {
        "model.init": model,
        "data.path": data,
        "data.image_folder": data.parent,
        "data.max_length": 384,
        "batch_size": 8,
        "steps": 12,
        "save_every": 4,
        "lr": 3e-3,
        "dtype": "float32",
        **changes,
    }
    return [f"--config.{name}={value}" for name, value in values.items()]
