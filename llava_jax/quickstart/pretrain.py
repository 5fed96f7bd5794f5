"""Makes the model that a tiny LLaVA starts from, out of the run's own captions and conversations.

What the original downloads, CLIP and Vicuna, is made here in a minute each: a vocabulary from the
text, a tower from the captions (tower.py), a language model from text alone (language.py). The
projector between them stays random, for stage 1 to train. A config asks for this with
`config.model.make = "llava_jax.quickstart.pretrain:make"` and says how in `config.tiny`.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llava_jax.config import LlavaConfig
from llava_jax.data.order import holdout
from llava_jax.data.pixels import Cache, ImageStore
from llava_jax.data.records import image_paths, read_all
from llava_jax.errors import ConfigError
from llava_jax.quickstart import vocabulary
from llava_jax.quickstart.captions import CaptionWords
from llava_jax.text.constants import IMAGE_TAG
from llava_jax.text.conversation import find_template
from llava_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Record = dict[str, Any]


def make(config: Any, folder: Path, *, quiet: bool = False) -> Path:
    """Writes the starting model of `config`'s run to `folder`, in this project's format.

    config: as llava_jax.train.stages.run_stages takes it; one stage has data.version "plain" (the
    captions), another the conversations. Images kept aside by data.holdout are not looked at.
    """
    from llava_jax.convert import Checkpoint, save_checkpoint
    from llava_jax.llava import init_params

    tiny, workdir = config.tiny, Path(folder).parent
    caption_data, talk_data = _data_of_stages(config)
    captions, talks = training_records(caption_data), training_records(talk_data)
    tokenizer = make_tokenizer(tiny, captions + talks, workdir / "vocabulary")
    model_config = make_config(tiny, len(tokenizer))
    params = {k: np.asarray(v) for k, v in init_params(model_config, config.seed).items()}
    log.info(
        "vocabulary of %d, %d parameters", len(tokenizer), sum(v.size for v in params.values())
    )

    tower = _make_tower(config, model_config, params, captions, caption_data, quiet)
    _write_losses(workdir / "tower", tower.losses)
    language = _make_language(config, model_config, params, tokenizer, captions, talks, quiet)
    _write_losses(workdir / "language", language.losses)
    params |= {k: np.asarray(v) for k, v in {**tower.params, **language.params}.items()}
    made = Checkpoint(model_config, params, workdir / "vocabulary", {"kind": "made from scratch"})
    return save_checkpoint(made, folder, to="jax", overwrite=True)


def _data_of_stages(config: Any) -> tuple[Any, Any]:
    """The data settings of the caption stage and of the conversation stage."""
    from llava_jax.train.stages import split_stages

    data = [stage.data for _, stage in split_stages(config)]
    plain = [d for d in data if d.version == "plain"]
    other = [d for d in data if d.version != "plain"]
    if not plain or not other:
        raise ConfigError("a tiny model is made from a stage of captions and one of conversations")
    return plain[0], other[0]


def training_records(data: Any) -> list[Record]:
    """The records of a stage, without those on images kept aside."""
    records, _ = read_all(data.path)
    kept, _ = holdout(records, data.holdout, data.holdout_seed)
    return [records[i] for i in kept]


# Vocabulary and sizes -------------------------------------------------------------------------------


def make_tokenizer(tiny: Any, records: Sequence[Record], folder: Path) -> Tokenizer:
    """Trains a vocabulary on the records' text and writes the tokenizer's files to `folder`."""
    turns = [turn for record in records for turn in record["conversations"]]
    texts = [turn["value"].replace(f"{IMAGE_TAG}\n", "") for turn in turns]
    template = find_template("vicuna_v1")
    roles = [f" {role}:" for role in template.roles]
    phrases = [f" {template.system}", *roles, " \n", *common_lines(texts), *tiny.phrases]
    path = folder / "tokenizer.model"
    vocabulary.train([*texts, template.system], path, phrases=phrases, size=tiny.vocabulary)
    tokenizer = Tokenizer.load(path, legacy=False)
    tokenizer.save(folder)
    return tokenizer


def common_lines(texts: Iterable[str], share: float = 0.02) -> list[str]:
    """The further lines that many texts have: prompts such as "\\nAnswer the question using ..."."""
    texts = list(texts)
    counts = Counter(f"\n{line}" for text in texts for line in text.split("\n")[1:] if line)
    return sorted(line for line, n in counts.items() if n >= share * len(texts))


def make_config(tiny: Any, vocab_size: int) -> LlavaConfig:
    """LlavaConfig.tiny in the sizes of `config.tiny`."""
    base = LlavaConfig.tiny(vocab_size)
    vision = replace(
        base.vision,
        image_size=tiny.image_size,
        patch_size=tiny.patch_size,
        width=tiny.tower_width,
        mlp_width=4 * tiny.tower_width,
        layers=tiny.tower_layers,
    )
    language = replace(
        base.language,
        width=tiny.language_width,
        layers=tiny.language_layers,
        head_width=tiny.language_width // base.language.heads,
        mlp_width=tiny.language_mlp,
    )
    return replace(base, vision=vision, language=language, feature_layer=tiny.feature_layer)


# The two halves -------------------------------------------------------------------------------------


def _make_tower(
    config, model_config: LlavaConfig, params, captions: list[Record], data: Any, quiet: bool
):
    from llava_jax.quickstart.tower import train_tower

    tiny = config.tiny
    texts = [caption_of(record) for record in captions]
    labels = CaptionWords.of(texts).labels(texts)
    images = load_pixels(data.image_folder, model_config, captions)
    return train_tower(
        model_config,
        params,
        images,
        labels,
        steps=tiny.tower_steps,
        lr=tiny.tower_lr,
        batch_size=tiny.tower_batch,
        augmentation=data.augment,
        seed=config.seed,
        quiet=quiet,
    )


def _make_language(
    config, model_config: LlavaConfig, params, tokenizer, captions, talks, quiet: bool
):
    from llava_jax.quickstart.language import TextSample, train_language
    from llava_jax.text.sample import ExampleMaker

    tiny = config.tiny
    known = {image_paths(record)[0]: caption_of(record) for record in captions}
    talks = [record for record in talks if image_paths(record)[0] in known]
    groups = []
    for records, version in ((captions, "plain"), (talks, "v1")):
        maker = ExampleMaker(
            tokenizer, version=version, max_length=None, image_tokens=1, turns="independent"
        )
        chosen = records[: tiny.language_records]
        groups.append([TextSample(maker(r), known[image_paths(r)[0]]) for r in chosen])
    return train_language(
        model_config,
        params,
        tokenizer,
        groups,
        steps=tiny.language_steps,
        lr=tiny.language_lr,
        rows=(tiny.caption_rows, tiny.language_batch - tiny.caption_rows),
        turns_per_sample=_data_of_stages(config)[1].turns_per_sample,
        seed=config.seed,
        quiet=quiet,
    )


def caption_of(record: Record) -> str:
    """What a caption record answers."""
    return record["conversations"][1]["value"]


def load_pixels(folder: str, model_config: LlavaConfig, records: Sequence[Record]) -> np.ndarray:
    """uint8[N, H, W, 3]: each record's first image as the tower sees it."""
    store = ImageStore(folder, model_config, Cache(0))
    with ThreadPoolExecutor(4) as pool:
        return np.stack(list(pool.map(lambda r: store.pixels(image_paths(r)[0]), records)))


def _write_losses(folder: Path, losses: list[float]) -> None:
    from llava_jax.train.log import METRICS

    folder.mkdir(parents=True, exist_ok=True)
    rows = ({"step": i, "loss": loss} for i, loss in enumerate(losses, 1))
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
