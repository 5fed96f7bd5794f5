"""The tokenizer files of a checkpoint folder: reading those of LLaVA, Vicuna and llava-hf, writing ours."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.errors import ConfigError, instead_of_file
from llava_jax.text import tokenizer_json
from llava_jax.text.tokenizer import Tokenizer

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"
FILES = (MODEL, CONFIG, ADDED, SPECIAL)

# what every LLaVA tokenizer has; another value would change ids or decoded text
_USUAL = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}

log = logging.getLogger(__name__)


def read_tokenizer(path: Path, *, legacy: bool | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a single sentencepiece file.

    A folder without tokenizer.model is read from its tokenizer.json (see `tokenizer_json`).
    legacy: None takes that of the folder (see `legacy_of`).
    Raises ConfigError if both are missing or unreadable, or a JSON file is malformed.
    """
    folder = path if path.is_dir() else None
    config = _read_json(folder / CONFIG) if folder else {}
    named = _named(config, _read_json(folder / SPECIAL) if folder else {})
    if unheeded := _unheeded(config):
        _warn_once(f"{path / CONFIG}: settings without effect here: {', '.join(unheeded)}")
    tokens = _added_tokens(folder, named)
    names = {f"{n}_token": _content(named.get(f"{n}_token")) for n in ("bos", "eos", "unk")}
    names = {name: token for name, token in names.items() if token}
    model, made = _model(path, names.get("unk_token"))
    if made is not None:
        legacy = made.legacy
        names.setdefault("unk_token", made.unk_token)
        if made.around != (names.get("bos_token", "<s>"), "$A"):
            said = " ".join(made.around)
            _warn_once(
                f"{path / tokenizer_json.FILE}: its form {said} of a text has no effect here"
            )
    try:
        return Tokenizer(
            model,
            legacy=legacy_of(path) if legacy is None else legacy,
            own_space=made.own_space if made else "slow",
            added=tokens.ids,
            plain_added=tokens.plain,
            pad_token=tokens.pad,
            **names,
        )
    except ConfigError as e:
        file = (
            path / MODEL if (path / MODEL).is_file() or not folder else path / tokenizer_json.FILE
        )
        raise ConfigError(f"{file}: {e.message.removeprefix('tokenizer: ')}", fix=e.fix) from e


def _model(path: Path, unk_token: str | None) -> tuple[bytes, tokenizer_json.Converted | None]:
    """(the sentencepiece model, and what tokenizer.json says where the model is made of it)."""
    file = path / MODEL if path.is_dir() else path
    if file.is_file():
        return _downloaded(file), None
    fast = path / tokenizer_json.FILE
    if not path.is_dir() or not fast.is_file():
        raise ConfigError(
            f"{path}: no {MODEL}", fix=f"copy {MODEL} of the base model into the folder"
        )
    made = tokenizer_json.convert(_read_json(fast), fast, unk_token)
    return made.model, made


def legacy_of(path: Path, default: bool = True) -> bool:
    """`legacy` of a tokenizer's folder: that of tokenizer_config.json.

    Where that is missing or null it is what tokenizer.json does, if that stands there without
    tokenizer.model or was saved by transformers 5; else `default`, which is True as in
    transformers 4.37.2 (transformers 5 reads the same folder as False).
    """
    config = _read_json(path / CONFIG) if path.is_dir() else {}
    fast = path / tokenizer_json.FILE
    if path.is_dir() and fast.is_file():
        if not (path / MODEL).is_file():
            return tokenizer_json.pipeline(_read_json(fast), fast)[0]
        if config.get("legacy") is None and config.get("backend") == "tokenizers":
            return tokenizer_json.pipeline(_read_json(fast), fast)[0]
    if config.get("legacy") is None:
        log.info("%s: `legacy` is not set, so it is %s, as in transformers 4.37", path, default)
        return default
    return bool(config["legacy"])


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


class AddedTokens(NamedTuple):
    """Tokens beside the sentencepiece model's.

    ids: text -> id, the basic tokens included if the folder lists them. plain: those that are not
    special. pad: the padding token, whether added or not; None if the folder names none.
    """

    ids: dict[str, int]
    plain: tuple[str, ...]
    pad: str | None


def added_tokens(folder: Path) -> AddedTokens:
    """The added tokens of a folder, of whichever of its files lists them; no model is read.

    Raises ConfigError if a JSON file is malformed.
    """
    named = _named(_read_json(folder / CONFIG), _read_json(folder / SPECIAL))
    return _added_tokens(folder, named)


def _added_tokens(folder: Path | None, named: dict) -> AddedTokens:
    special = {_content(t) for t in named.get("additional_special_tokens") or ()}
    special |= {_content(t) for t in _listed(named.get("extra_special_tokens"))}
    special |= {_content(named.get(f"{n}_token")) for n in ("bos", "eos", "unk", "pad")}
    added: dict[str, int] = {}
    entries = _json_tokens(folder) if folder else []
    if folder:
        added |= {t["content"]: t["id"] for t in entries}
        added |= _read_json(folder / ADDED)
    for id_, entry in (named.get("added_tokens_decoder") or {}).items():
        added[_content(entry)] = int(id_)  # type: ignore[index]
        if isinstance(entry, dict):
            entries.append(entry)
    flags = {entry["content"]: bool(entry.get("special")) for entry in entries}  # the last counts
    special |= {token for token, is_special in flags.items() if is_special}
    for token, id_ in added.items():
        if type(id_) is not int or id_ < 0 or not isinstance(token, str):
            raise ConfigError(f"{folder}: the added token {token!r} has the id {id_!r}")
    plain = tuple(token for token in added if token not in special)
    return AddedTokens(added, plain, _content(named.get("pad_token")))


def _json_tokens(folder: Path) -> list[dict[str, Any]]:
    """The added tokens of tokenizer.json, where transformers 5 has them and nowhere else."""
    fast = folder / tokenizer_json.FILE
    return [*tokenizer_json.added_tokens(_read_json(fast), fast)] if fast.is_file() else []


def _listed(tokens: Any) -> list[Any]:
    return list(tokens.values()) if isinstance(tokens, dict) else list(tokens or ())


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


@cache
def _warn_once(text: str) -> None:
    """A tokenizer is read several times on the way to a model."""
    log.warning("%s", text)


def _content(token: Any) -> str | None:
    """A token is written as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _entry(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags}


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    raw = _downloaded(path)
    try:
        data = json.loads(raw.decode("utf-8"))
    except ValueError as e:
        raise ConfigError(f"{path}: not valid JSON") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a JSON object")
    return data


def _downloaded(path: Path) -> bytes:
    """The bytes of a file. Raises ConfigError where something else lies in its place."""
    data = path.read_bytes()
    if found := instead_of_file(data):
        raise ConfigError(f"{path} {found[0]}", fix=found[1])
    return data


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")
