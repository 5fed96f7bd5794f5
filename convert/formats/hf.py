"""Hugging Face's LLaVA: a LlavaForConditionalGeneration folder, of any generation of names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.convert import tokenizer_files, vocabulary
from llava_jax.convert.formats.tower import processor_config
from llava_jax.convert.io import folder as folders
from llava_jax.convert.io import output
from llava_jax.convert.io.output import Progress, write_json
from llava_jax.convert.source import (
    OURS_ONLY,
    Options,
    Source,
    Target,
    read_side,
    restore_ours,
    still_means,
    write_side,
)
from llava_jax.convert.table import configs, keys, language
from llava_jax.reader import Reader


def open_hf(folder: Path, options: Options) -> Source:
    """A folder of this format."""
    data = folders.model_config(folder)
    processor, processor_where = processor_config(folder)
    generation = folders.read_json(folder / "generation_config.json")
    legacy = tokenizer_files.legacy(folder, default=False)
    config = configs.from_hf(
        data, str(folder / "config.json"), processor, legacy, generation, processor_where
    )
    state, files = folders.read_folder(folder, options.allow_pickle)
    layout = keys.best_layout(state, keys.HF_LAYOUTS, config)
    leaves, rest = keys.to_jax(state, layout, config, where=str(folder), mixed=options.mixed)
    metadata, buffers = read_side(folder)
    metadata["hf"] = {
        "config": data,
        "layout": layout.name,
        "types": configs.types_of(leaves.values()),
        "generation_config": generation,
        "preprocessor_config": processor,
    }
    buffers |= {f"hf:{n}": t for n, t in rest.items()}
    tokenizer = folders.tokenizer_folder(folder)
    return restore_ours(Source("hf", config, leaves, metadata, buffers, files, tokenizer))


def write_hf(source: Source, work: Path, target: Target, progress: Progress | None) -> None:
    """A folder that transformers 4 and 5, vLLM and SGLang read."""
    read = source.metadata.get("hf") or {}
    config, leaves, image_id, pad_id = vocabulary.hf_vocabulary(source)
    layout = keys.LAYOUTS[target.layout or read.get("layout", "hf")]
    state = keys.to_theirs(leaves, layout, config) | source.buffers_of("hf")
    output.write_safetensors(work, state, shard_size=target.shard_size, progress=progress)
    data = _config(read, config, configs.hf_json(config, image_id, pad_id, "float32"))
    write_json(work / "config.json", configs.with_dtype(data, leaves.values(), read.get("types")))
    write_generation(work, read, config, pad_id)
    tokenizer_files.write_processor(work, config)
    tokenizer_files.write_chat_template(work, config)
    if read and config.language.vocab_size == source.config.language.vocab_size:
        tokenizer_files.copy_hf(source.tokenizer, work)
    else:
        tokenizer_files.write_hf(source.tokenizer, work, config, image_id, pad_id)
    write_side(source, work)


def write_generation(work: Path, read: dict[str, Any], config: LlavaConfig, pad_id: int) -> None:
    """generation_config.json: the one that was read if it ends answers where `config` does."""
    fresh = language.generation_json(config.language, pad_id)
    old = read.get("generation_config") or {}
    ends = old.get("eos_token_id")
    same = [*config.language.eos_ids] == (ends if isinstance(ends, list) else [ends])
    if not old or not (same or ends is None):  # without the field config.json decides
        old = old | fresh
    write_json(work / "generation_config.json", old)


def _config(read: dict[str, Any], config: LlavaConfig, fresh: dict) -> dict:
    """config.json: the one that was read if it still means `config`, else `fresh` over it."""
    old = read.get("config")
    if not old:
        return fresh
    processor, generation = read.get("preprocessor_config"), read.get("generation_config")
    if still_means(
        lambda: configs.from_hf(old, "", processor, generation=generation), config, OURS_ONLY
    ):
        return old
    r = Reader(old, "config.json")
    parts = {k: r.object(k) | fresh[k] for k in ("text_config", "vision_config")}
    parts["text_config"].pop("rope_parameters", None)
    return old | fresh | parts
