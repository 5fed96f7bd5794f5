"""Tokenizer, processor and chat-template files of an export. Edited as data, never run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llava_jax.config import LlavaConfig
from llava_jax.convert import tokenizer_json
from llava_jax.convert.io.folder import read_json
from llava_jax.convert.io.output import write_json
from llava_jax.convert.table import pixels
from llava_jax.convert.vocabulary import IMAGE, PAD
from llava_jax.errors import ConfigError
from llava_jax.reader import Reader
from llava_jax.text import chat_template
from llava_jax.text.conversation import find_template
from llava_jax.text.tokenizer import Tokenizer
from llava_jax.text.tokenizer_files import (
    AddedTokens,
    added_tokens,
    check_model,
    content,
    legacy_of,
)

log = logging.getLogger(__name__)

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_FAST_ONLY = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that need tokenizer.json
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def copy(source: Path | None, work: Path) -> None:
    """The tokenizer's files as they are; a missing tokenizer is logged.

    Raises ConfigError for a tokenizer.model that is damaged.
    """
    if source is None:
        log.warning("the source has no tokenizer files: add them before use")
        return
    check_model(source)
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, work / name)


def write_hf(
    source: Path | None, work: Path, config: LlavaConfig, image_id: int, pad_id: int
) -> None:
    """The tokenizer's files with <image> and <pad> added, as LlavaProcessor wants them."""
    copy(source, work)
    if source is None:
        return
    added, tokens = {IMAGE: image_id, PAD: pad_id}, added_tokens(source)
    # A token without a row was never used; its id now belongs to another (see text.vocabulary).
    others = {t: n for t, n in tokens.ids.items() if t not in added and n not in added.values()}
    settings = read_json(work / "tokenizer_config.json")
    settings.pop("chat_template", None)  # a template is a program: only our own are exported
    _list_tokens(settings, tokens, added | others, lambda token: token in others)
    settings |= {
        "image_token": IMAGE,
        "pad_token": PAD,
        "padding_side": "left",
        "legacy": config.tokenizer_legacy,
        "processor_class": "LlavaProcessor",
    }
    settings.setdefault("tokenizer_class", "LlamaTokenizer")
    write_json(work / "tokenizer_config.json", settings)
    special = read_json(work / "special_tokens_map.json")
    special |= {"image_token": IMAGE, "pad_token": PAD}
    write_json(work / "special_tokens_map.json", special)
    listed = read_json(work / "added_tokens.json")
    listed = {t: n for t, n in listed.items() if t in others}
    write_json(work / "added_tokens.json", {**listed, **added})
    if tokenizer_json.write(work, config, others | added, tokens.plain):
        settings.pop("add_bos_token", None)
        write_json(work / "tokenizer_config.json", settings | tokenizer_json.SETTINGS)
    else:
        _add_to_fast(work / "tokenizer.json", added)


def _add_to_fast(path: Path, added: dict[str, int]) -> None:
    """The same for tokenizer.json, where the source has one."""
    if not path.is_file():
        return
    data = read_json(path)
    tokens = [t for t in data.get("added_tokens") or [] if t.get("content") not in added]
    tokens = [t for t in tokens if t.get("id") not in added.values()]
    for token, number in added.items():
        tokens.append({"id": number, "content": token, **_FLAGS, "special": True})
    data["added_tokens"] = tokens
    write_json(path, data)


def copy_hf(source: Path | None, work: Path) -> None:
    """The files of a source that was Hugging Face's already, but for the chat template."""
    copy(source, work)
    path = work / "tokenizer_config.json"
    settings = read_json(path)
    if settings.pop("chat_template", None) is not None:
        write_json(path, settings)


def copy_original(source: Path | None, work: Path, vocab_size: int) -> None:
    """The files for the original's slow LlamaTokenizer, without tokens past `vocab_size`.

    Those Hugging Face's format had added. A folder with tokenizer.json alone gets a tokenizer.model
    made of it. Raises ConfigError where that cannot be done.
    """
    if source is not None and not (source / "tokenizer.model").is_file():
        tokenizer = Tokenizer.load(source)
        left = {t: n for t, n in tokenizer.added.items() if n < vocab_size}
        pad = tokenizer.unk_token if tokenizer.pad_id >= vocab_size else None
        tokenizer.with_added(left, pad_token=pad).save(work)
        return
    copy(source, work)
    if source is None:
        return
    settings = read_json(work / "tokenizer_config.json")
    tokens = added_tokens(source)
    gone = {t for t, n in tokens.ids.items() if n >= vocab_size}
    if settings.get("tokenizer_class") in _FAST_ONLY:
        for key in ("model_input_names", "backend", "is_local", "extra_special_tokens"):
            settings.pop(key, None)
        settings |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    elif not gone:
        return
    left = {t: n for t, n in tokens.ids.items() if t not in gone}
    _list_tokens(settings, tokens, left, lambda token: token not in gone)
    settings.pop("processor_class", None)
    settings["padding_side"] = "right"
    if tokens.pad in gone:
        settings["pad_token"] = "<unk>"
    if IMAGE in gone:
        settings.pop("image_token", None)
    write_json(work / "tokenizer_config.json", settings)
    special = read_json(work / "special_tokens_map.json")
    if IMAGE in gone:
        special.pop("image_token", None)
    if content(special.get("pad_token")) in gone:
        special["pad_token"] = "<unk>"
    if special:
        write_json(work / "special_tokens_map.json", special)
    listed = read_json(work / "added_tokens.json")
    left = {k: v for k, v in listed.items() if k not in gone}
    (work / "added_tokens.json").unlink(missing_ok=True)
    if left:
        write_json(work / "added_tokens.json", left)
    (work / "tokenizer.json").unlink(missing_ok=True)  # the slow tokenizer reads none


def _list_tokens(
    settings: dict[str, Any],
    tokens: AddedTokens,
    wanted: Mapping[str, int],
    stays: Callable[[str], bool],
) -> None:
    """added_tokens_decoder in place: the entries that stay, and those of `wanted` that it lacks."""
    old = settings.get("added_tokens_decoder") or {}
    decoder = {k: v for k, v in old.items() if stays(content(v))}
    for token, number in wanted.items():
        special = token not in tokens.plain
        decoder.setdefault(str(number), {"content": token, **_FLAGS, "special": special})
    settings["added_tokens_decoder"] = dict(sorted(decoder.items(), key=lambda item: int(item[0])))


# Processor and chat template --------------------------------------------------------------------


def write_processor(work: Path, config: LlavaConfig) -> None:
    """preprocessor_config.json and processor_config.json, for transformers 4 and 5.

    With padding to a square the processor is LlavaImageProcessor, which has `do_pad`; CLIP's own
    would crop the sides away.
    """
    pads = config.image_aspect_ratio == "pad"
    name = "LlavaImageProcessor" if pads else "CLIPImageProcessor"
    write_json(
        work / "preprocessor_config.json",
        {**pixels.preprocessor_json(config, name), "processor_class": "LlavaProcessor"},
    )
    patch = config.feature_select == "patch"
    write_json(
        work / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "image_token": IMAGE,
            "num_additional_image_tokens": 1,
            "patch_size": config.vision.patch_size,
            "vision_feature_select_strategy": "default" if patch else "full",
        },
    )


def write_chat_template(work: Path, config: LlavaConfig) -> None:
    """chat_template.jinja and .json: the conversation template of the model, in Jinja."""
    template = find_template(config.template)
    text = chat_template.jinja(template, config.tokenizer_legacy, config.use_im_start_end)
    if text is None:
        log.info("template %s has no Jinja form here: no chat template written", config.template)
        return
    (work / "chat_template.jinja").write_text(text, "utf-8")
    write_json(work / "chat_template.json", {"chat_template": text})


# What a folder's files say ------------------------------------------------------------------------


def legacy(folder: Path, default: bool) -> bool:
    """The tokenizer's `legacy`; a file without the key means what its own stack makes of it."""
    if (folder / "tokenizer.json").is_file() and not (folder / "tokenizer.model").is_file():
        try:
            return legacy_of(folder)
        except ConfigError:
            return default  # matters only to whoever loads the tokenizer
    path = folder / "tokenizer_config.json"
    data = read_json(path)
    return Reader(data, str(path)).flag("legacy", default if data else False)
