"""Makes what the quickstart starts from: a tiny CLIP and a tiny Vicuna, with a vocabulary.

    python -m examples.tiny --out llava_jax/assets

writes OUT/tiny-clip and OUT/tiny-vicuna in the layouts of the published models. See README.md here.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from examples.tiny import vocabulary
from llava_jax.config import LlavaConfig
from llava_jax.quickstart.dataset import make_dataset
from llava_jax.quickstart.scenes import PLACES, render, sample
from llava_jax.text.conversation import find_template
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.train.heap import keep_freed_memory
from llava_jax.util import read_json, write_json

CLIP, VICUNA, RECORD = "tiny-clip", "tiny-vicuna", "made_by.json"
VOCABULARY = 620  # before the phrases
PHRASES = (  # beside the prompts, what becomes a single token: short sequences train in minutes
    *("What", "Which", "Where", "Describe the image concisely.", "Describe the image as JSON."),
    *(' [{"color": "', '[{"color": "', '", "shape": "', '", "place": "', '"}, {"color": "', '"}]'),
    *PLACES,
    *(f" {place}" for place in PLACES),
)


SETTINGS = dict(
    pictures=16_000,
    tower_steps=1000,
    language_steps=1200,
    # Of pictures, weights and order. Far from the seeds of a quickstart, whose held-out pictures must
    # be new to these models too.
    seed=7_000_000,
)


def make(
    out: Path, *, settings: dict[str, int] = SETTINGS, quiet: bool = False
) -> tuple[Path, Path]:
    """Makes both models; the folders out/tiny-clip and out/tiny-vicuna."""
    from examples.tiny.language import train_language
    from examples.tiny.tower import train_tower
    from llava_jax.llava import init_params

    pictures, seed = settings["pictures"], settings["seed"]
    with tempfile.TemporaryDirectory() as scratch:
        data = make_dataset(Path(scratch) / "data", train=pictures, held_out=1, seed=seed)
        tokenizer = make_tokenizer(training_texts(data), Path(scratch) / "vocabulary")
        config = make_config(len(tokenizer))
        params = init_params(config, seed)

        scenes = sample(pictures, seed)
        labels = np.stack([scenes.colors, scenes.shapes], axis=-1).astype(np.int32) + 1
        options: Any = dict(steps=settings["tower_steps"], quiet=quiet)
        tower, losses = train_tower(config, params, render(scenes), labels, seed=seed, **options)
        print(f"vision tower     loss {losses[0]:.4f} to {np.mean(losses[-20:]):.4f}")

        batches = text_batches(config, tokenizer, data, list(scenes.objects()), seed)
        options["steps"] = settings["language_steps"]
        language, losses = train_language(config, params, batches, **options)
        print(f"language model   loss {losses[0]:.4f} to {np.mean(losses[-20:]):.4f}")

        params = {**params, **tower, **language}
        params = {name: np.asarray(value, np.float16) for name, value in params.items()}
        made = split(config, params, Path(scratch) / "vocabulary", out)
    for folder in made:
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        record = {"command": "python -m examples.tiny", "settings": settings, "sha256": digest}
        write_json(folder / RECORD, record, indent=1)
    return made


def make_config(vocab_size: int) -> LlavaConfig:
    """LlavaConfig.tiny with three layers in its tower, all of which run.

    A LLaVA takes the features of the last layer but one, so that two of them run there.
    """
    base = LlavaConfig.tiny(vocab_size)
    return replace(base, vision=replace(base.vision, layers=3), feature_layer=-1)


# Words ----------------------------------------------------------------------------------------------


def training_texts(data: Path) -> list[str]:
    """Every turn of the data set, without image tags."""
    records = [r for name in ("captions", "instruct") for r in read_json(data / f"{name}.json")]
    turns = (turn["value"] for record in records for turn in record["conversations"])
    return [text.replace("<image>\n", "") for text in turns]


def make_tokenizer(texts: Sequence[str], folder: Path) -> Tokenizer:
    """Trains a vocabulary on the texts and writes the tokenizer's files to `folder`."""
    template = find_template("vicuna_v1")
    roles = [f" {role}:" for role in template.roles]
    phrases = [f" {template.system}", *roles, " \n", *common_lines(texts), *PHRASES]
    path = folder / "tokenizer.model"
    vocabulary.train([*texts, template.system], path, phrases=phrases, size=VOCABULARY)
    tokenizer = Tokenizer.load(path, legacy=False)
    tokenizer.save(folder)
    return tokenizer


def common_lines(texts: Iterable[str], share: float = 0.02) -> list[str]:
    """The further lines that many texts have: prompts such as "\\nAnswer the question using ..."."""
    texts = list(texts)
    counts = Counter(f"\n{line}" for text in texts for line in text.split("\n")[1:] if line)
    return sorted(line for line, n in counts.items() if n >= share * len(texts))


def text_batches(
    config: LlavaConfig, tokenizer: Tokenizer, data: Path, objects: Sequence[Any], seed: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the data set's conversations, every sixth of captions, with words for images."""
    from examples.tiny.language import StandIn, with_words
    from llava_jax.data.loader import make_loader

    shared = dict(image_folder=str(data), pack=True, batch_size=16, max_length=208, threads=1)
    kinds = {
        "instruct": dict(turns="independent", turns_per_sample=6, row_multiple=10),
        "captions": dict(version="plain", row_multiple=4),
    }
    batches = {}
    for name, settings in kinds.items():
        path, images = data / f"{name}.json", 2 if name == "instruct" else 6
        settings |= dict(length_buckets=(208,), target_buckets=(128,), image_buckets=(images,))
        loader = make_loader(
            {**shared, **settings, "path": str(path), "seed": seed}, config, tokenizer
        )
        seen = {r["id"]: objects[int(Path(r["image"]).stem)] for r in read_json(path)}
        batches[name] = with_words(loader, seen, StandIn(config, tokenizer), seed)
    while True:
        for _ in range(5):
            yield next(batches["instruct"])
        yield next(batches["captions"])


# Folders --------------------------------------------------------------------------------------------


def split(
    config: LlavaConfig, params: dict[str, np.ndarray], tokenizer: Path, out: Path
) -> tuple[Path, Path]:
    """Writes the tower as a CLIP folder and the language model as a Llama folder.

    Both come out of an export in the layout of the original LLaVA, whose tower lies beside the rest.
    """
    from safetensors.numpy import load_file, save_file

    from llava_jax.convert import Checkpoint, save_checkpoint

    clip, vicuna = out / CLIP, out / VICUNA
    for folder in (clip, vicuna):
        shutil.rmtree(folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        whole = save_checkpoint(
            Checkpoint(config, params, tokenizer), Path(scratch) / "whole", to="original"
        )
        shutil.move(whole / "vision_tower", clip)
        vicuna.mkdir()
        state = load_file(whole / "model.safetensors")
        state = {name: value for name, value in state.items() if "mm_projector" not in name}
        save_file(state, vicuna / "model.safetensors", metadata={"format": "pt"})
        ours = ("mm_", "image_", "tune_mm", "freeze_mm", "use_mm")
        data = read_json(whole / "config.json")
        data = {k: v for k, v in data.items() if not k.startswith(ours)}
        data |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        write_json(vicuna / "config.json", data)
        for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
            shutil.copy(whole / name, vicuna / name)
        shutil.copy(whole / "generation_config.json", vicuna)
        shutil.rmtree(clip / "llava_jax", ignore_errors=True)
        for folder in (clip, vicuna):
            (folder / "model.safetensors").chmod(0o644)
    return clip, vicuna


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m examples.tiny", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two models")
    args = parser.parse_args()
    keep_freed_memory()
    for folder in make(args.out):
        print(folder)


if __name__ == "__main__":
    main()
