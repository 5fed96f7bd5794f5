"""The tokenizer files of a checkpoint folder: reading those of LLaVA, Vicuna and llava-hf, writing ours."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from llava_jax.errors import ConfigError, instead_of_file
from llava_jax.reader import Reader, is_id, is_text, shown
from llava_jax.text import tokenizer_json
from llava_jax.text.tokenizer import Tokenizer, sentencepiece_model
from llava_jax.util import read_object, write_text

MODEL, CONFIG = "tokenizer.model", "tokenizer_config.json"
ADDED, SPECIAL = "added_tokens.json", "special_tokens_map.json"

_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# values of every LLaVA tokenizer; others would change ids or decoded text
_USUAL = {"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}

log = logging.getLogger(__name__)


def read_tokenizer(path: Path, *, legacy: bool | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of a single sentencepiece file.

    A folder without tokenizer.model is read from its tokenizer.json (see `tokenizer_json`).
    legacy: None takes that of the folder (see `legacy_of`).
    Raises ConfigError if both are missing or unreadable, or a JSON file is malformed.
    """
    config = _settings(path / CONFIG)  # {} where `path` is a single file
    named = _named(config, _settings(path / SPECIAL))
    if ignored := _ignored(config):
        _warn_once(f"{path / CONFIG}: settings without effect here: {', '.join(ignored)}")
    names = {f"{n}_token": content(named.get(f"{n}_token")) for n in ("bos", "eos", "unk")}
    names = {name: token for name, token in names.items() if token}
    file, own_space = (path / MODEL if path.is_dir() else path), "slow"
    if file.exists():
        model = _read_model(file)
        legacy = legacy_of(path) if legacy is None else legacy
    else:
        file = path / tokenizer_json.FILE
        if not file.is_file():
            fix = f"copy {MODEL} of the base model into the folder"
            raise ConfigError(f"{path}: no {MODEL}", fix=fix)
        made = tokenizer_json.convert(_read_json(file), file, names.get("unk_token"))
        model, legacy, own_space = made.model, made.legacy, made.own_space
        names.setdefault("unk_token", made.unk_token)
        if made.around != (names.get("bos_token", "<s>"), "$A"):
            _warn_once(f"{file}: its form {' '.join(made.around)} of a text has no effect here")
    tokens = added_tokens(path)
    try:
        return Tokenizer(
            model,
            legacy=legacy,
            own_space=own_space,
            added=tokens.ids,
            plain_added=tokens.plain,
            pad_token=tokens.pad,
            **names,
        )
    except ConfigError as e:
        raise ConfigError(f"{file}: {e.message.removeprefix('tokenizer: ')}", fix=e.fix) from e


def check_model(folder: Path) -> None:
    """Raises ConfigError where `folder` has a tokenizer.model that is damaged."""
    file = folder / MODEL
    if file.exists():
        try:
            sentencepiece_model(_read_model(file))
        except ConfigError as e:
            said = e.message.replace("tokenizer:", f"{file}:")
            raise ConfigError(said, fix=e.fix or "copy that of its base model") from e


def _read_model(file: Path) -> bytes:
    if not file.is_file():
        raise ConfigError(f"{file} is not a file")
    model = file.read_bytes()
    if found := instead_of_file(model):
        raise ConfigError(f"{file} {found[0]}", fix=found[1])
    return model


def legacy_of(path: Path) -> bool:
    """`legacy` of a tokenizer's folder: that of tokenizer_config.json.

    Where that is missing or null it is what tokenizer.json does, if that stands there without
    tokenizer.model or was saved by transformers 5; else True, as in transformers 4.37.2
    (transformers 5 reads the same folder as False).
    """
    config = _settings(path / CONFIG)
    legacy, fast = config.get("legacy"), path / tokenizer_json.FILE
    saved_by_5 = legacy is None and config.get("backend") == "tokenizers"
    if fast.is_file() and (saved_by_5 or not (path / MODEL).is_file()):
        return tokenizer_json.pipeline(_read_json(fast), fast)[0]
    if legacy is None:
        log.info("%s: `legacy` is not set, so it is True, as in transformers 4.37", path)
    return legacy is None or bool(legacy)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, extra: dict[str, Any]) -> None:
    """Writes tokenizer.model, tokenizer_config.json, special_tokens_map.json, added_tokens.json.

    `extra` entries (chat_template, model_max_length, processor_class ...) join the config.
    Raises ConfigError for a tokenizer whose ids the slow LlamaTokenizer, which reads them, cannot give.
    """
    if tokenizer.own_space == "never":
        raise ConfigError(
            "the tokenizer puts no space in front of a text, as its tokenizer.json says, and "
            "tokenizer.model cannot say that: ids would be others",
            fix="write a format that keeps tokenizer.json: hf or jax",
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL).write_bytes(tokenizer.model)
    named = {f"{n}_token": getattr(tokenizer, f"{n}_token") for n in ("bos", "eos", "unk", "pad")}
    plain = tokenizer.plain_added
    additional = [t for t in tokenizer.added if t not in plain and t not in named.values()]
    by_id = sorted((tokenizer.special_tokens | tokenizer.added).items(), key=lambda item: item[1])
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(id_): {**_entry(token), "special": token not in plain} for token, id_ in by_id
        },
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
    special: dict[str, Any] = {name: _entry(token) for name, token in named.items()}
    if additional:
        special["additional_special_tokens"] = [_entry(t) for t in additional]
    for name, data in ((CONFIG, config), (SPECIAL, special), (ADDED, tokenizer.added)):
        if data:
            write_text(folder / name, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
        else:  # left over from a tokenizer that was here before
            (folder / name).unlink(missing_ok=True)


def _named(config: dict, special: dict) -> dict:
    """Both files in one; where they differ, transformers 4.37.2 believes the one written last.

    That is the config if it lists its tokens. A folder older than that often has its padding token
    in special_tokens_map.json alone, and `"pad_token": null` in the config.
    """
    config = {key: value for key, value in config.items() if value is not None}
    return {**special, **config} if "added_tokens_decoder" in config else {**config, **special}


class AddedTokens(NamedTuple):
    """Tokens in addition to the sentencepiece model's.

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
    named = _named(_settings(folder / CONFIG), _settings(folder / SPECIAL))
    extra = named.get("extra_special_tokens") or ()
    listed = [*(named.get("additional_special_tokens") or ())]
    listed += extra.values() if isinstance(extra, dict) else extra
    listed += [named.get(f"{n}_token") for n in ("bos", "eos", "unk", "pad")]
    special = {content(token) for token in listed}
    fast = folder / tokenizer_json.FILE  # transformers 5 has them there and nowhere else
    entries = [*tokenizer_json.added_tokens(_read_json(fast), fast)]
    added: dict[str, int] = {t["content"]: t["id"] for t in entries} | _read_json(folder / ADDED)
    for id_, entry in (named.get("added_tokens_decoder") or {}).items():
        added[content(entry)] = int(id_)  # type: ignore[index]
        if isinstance(entry, dict):
            entries.append(entry)
    flags = {entry["content"]: bool(entry.get("special")) for entry in entries}  # the last counts
    special |= {token for token, is_special in flags.items() if is_special}
    for token, id_ in added.items():
        if not is_id(id_) or not is_text(token):
            raise ConfigError(f"{folder}: the added token {token!r} has the id {shown(id_)}")
    plain = tuple(token for token in added if token not in special)
    return AddedTokens(added, plain, content(named.get("pad_token")))


def _ignored(config: dict) -> list[str]:
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


def content(token: Any) -> Any:
    """The text of a token, which is written as a string or as {"content": ...}."""
    return token.get("content") if isinstance(token, dict) else token


def _entry(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags}


def _settings(path: Path) -> dict[str, Any]:
    """tokenizer_config.json or special_tokens_map.json; {} where there is none.

    Raises ConfigError naming file and key where a value that is read here is of another type.
    """
    data = _read_json(path)
    r = Reader(data, str(path), ConfigError)
    r.flag("legacy")
    listed = [(key, data[key]) for key in data if key in _TOKENS and data[key] is not None]
    listed += [("additional_special_tokens", t) for t in r.list("additional_special_tokens")]
    more = data.get("extra_special_tokens")
    more = more.values() if isinstance(more, dict) else r.list("extra_special_tokens")
    listed += [("extra_special_tokens", token) for token in more]
    for id_, entry in r.object("added_tokens_decoder").items():
        if not (id_.isascii() and id_.isdigit() and len(id_) < 8):
            raise r.error("added_tokens_decoder", id_, "the id of a token")
        listed.append(("added_tokens_decoder", entry))
    for key, token in listed:
        if not content(token) or not is_text(content(token)):
            raise r.error(key, token, "a token")
    return data


def _read_json(path: Path) -> dict[str, Any]:
    return read_object(path, ConfigError) if path.is_file() else {}
