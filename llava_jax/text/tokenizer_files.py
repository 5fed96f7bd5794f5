"""The tokenizer files of a checkpoint folder: reading those of LLaVA, Vicuna and llava-hf, writing ours."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.text.tokenizer import Tokenizer

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"
FILES = (MODEL, CONFIG, ADDED, SPECIAL)

# what every LLaVA tokenizer has; another value would change ids or decoded text
_USUAL = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}

log = logging.getLogger(__name__)


def read_tokenizer(path: Path, *, legacy: bool | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a single sentencepiece file.

    legacy: None takes `legacy` of tokenizer_config.json; where that is missing or null it is True,
    as in transformers 4.37.2 (transformers 5 reads the same folder as False).
    Raises ConfigError if tokenizer.model is missing or unreadable, or a JSON file is malformed.
    """
    folder = path if path.is_dir() else path.parent
    model = path / MODEL if path.is_dir() else path
    if not model.is_file():
        fix = "copy tokenizer.model of the base model into the folder"
        if (folder / "tokenizer.json").is_file():
            fix += "; tokenizer.json alone does not give the original's ids"
        raise ConfigError(f"{path}: no {MODEL}", fix=fix)
    config = _read_json(folder / CONFIG) if path.is_dir() else {}
    named = _named(config, _read_json(folder / SPECIAL) if path.is_dir() else {})
    if legacy is None:
        legacy = config.get("legacy")
    if legacy is None:
        log.info("%s: `legacy` is not set, so it is True, as in transformers 4.37", path)
        legacy = True
    if unheeded := _unheeded(config):
        log.warning("%s: settings without effect here: %s", folder / CONFIG, ", ".join(unheeded))
    added, plain = _added_tokens(folder if path.is_dir() else None, named)
    try:
        return Tokenizer(
            model.read_bytes(),
            legacy=bool(legacy),
            added=added,
            plain_added=plain,
            bos_token=_content(named.get("bos_token")) or "<s>",
            eos_token=_content(named.get("eos_token")) or "</s>",
            unk_token=_content(named.get("unk_token")) or "<unk>",
            pad_token=_content(named.get("pad_token")),
        )
    except ConfigError as e:
        raise ConfigError(f"{model}: {e.message.removeprefix('tokenizer: ')}", fix=e.fix) from e


def write_tokenizer(tokenizer: Tokenizer, folder: Path, extra: dict[str, Any]) -> None:
    """Writes tokenizer.model, tokenizer_config.json, special_tokens_map.json, added_tokens.json.

    `extra` entries (chat_template, model_max_length, processor_class ...) join the config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(tokenizer.model)
    named = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
    }
    additional = [
        t for t in tokenizer.added if t not in tokenizer.plain_added and t not in named.values()
    ]
    decoder = {
        str(id_): {**_entry(token), "special": token not in tokenizer.plain_added}
        for token, id_ in sorted(
            {**tokenizer.special_tokens, **tokenizer.added}.items(), key=lambda item: item[1]
        )
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        **({"additional_special_tokens": additional} if additional else {}),
        **named,
        "clean_up_tokenization_spaces": False,
        "legacy": tokenizer.legacy,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "LlamaTokenizer",
        "use_default_system_prompt": False,
        **extra,
    }
    special = {name: _entry(token) for name, token in named.items()}
    if additional:
        special["additional_special_tokens"] = [_entry(t) for t in additional]  # type: ignore[assignment]
    _write_json(folder / CONFIG, config)
    _write_json(folder / SPECIAL, special)
    if tokenizer.added:
        _write_json(folder / ADDED, tokenizer.added)
    else:
        (folder / ADDED).unlink(missing_ok=True)


def _named(config: dict, special: dict) -> dict:
    """Both files in one; where they differ, transformers 4.37.2 believes the one written last.

    That is the config if it lists its tokens. A folder older than that often has its padding token
    in special_tokens_map.json alone, and `"pad_token": null` in the config.
    """
    config = {key: value for key, value in config.items() if value is not None}
    return {**special, **config} if "added_tokens_decoder" in config else {**config, **special}


def _added_tokens(folder: Path | None, named: dict) -> tuple[dict[str, int], list[str]]:
    """Tokens behind the sentencepiece vocabulary (text -> id), and those of them not special.

    The basic tokens that a folder repeats here keep the ids they have in the sentencepiece model.
    """
    special = {_content(t) for t in named.get("additional_special_tokens") or ()}
    special |= {_content(named.get(f"{n}_token")) for n in ("bos", "eos", "unk", "pad")}
    added: dict[str, int] = dict(_read_json(folder / ADDED)) if folder else {}
    for id_, entry in (named.get("added_tokens_decoder") or {}).items():
        added[_content(entry)] = int(id_)  # type: ignore[index]
        if isinstance(entry, dict) and entry.get("special"):
            special.add(_content(entry))
    return added, [token for token in added if token not in special]


def _unheeded(config: dict) -> list[str]:
    """Settings that transformers would act on and we do not."""
    found = [
        f"{name}={config[name]}"
        for name, usual in _USUAL.items()
        if config.get(name) not in (None, usual)
    ]
    for entry in (config.get("added_tokens_decoder") or {}).values():
        if isinstance(entry, dict):
            flags = [f for f in ("lstrip", "rstrip", "single_word") if entry.get(f)]
            found += [f"{flag} of {entry.get('content')}" for flag in flags]
    return found


def _content(token: Any) -> str | None:
    """A token is written as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _entry(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path}: not valid JSON") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return data


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
