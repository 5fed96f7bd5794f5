"""Values of settings: their types, and how the text of --config.NAME=VALUE becomes one."""

from __future__ import annotations

import ast
import contextlib
import math
from typing import Any

from llava_jax.errors import ConfigError
from llava_jax.train.names import check_name, defaults, flat, split_stage

SEVERAL = ("data.path", "data.image_folder")
"""Settings that are one text or a tuple of them; commas in a text are for the data settings to read."""

WHOLE, NUMBERS = "_buckets", ("data.weights",)
"""Tuples of whole numbers, by the end of their names, and of numbers; other tuples hold texts."""


def set_override(config: Any, override: str) -> None:
    """Applies one `--config.NAME=VALUE` to `config`.

    Raises ConfigError for an unknown name and for a text that is not a value of the setting's type.
    """
    name, _, text = override.removeprefix("--config.").partition("=")
    known = [key for key, _ in flat(config) if not key.startswith("stages.")]
    check_name(name, known, config.stages)
    stage, setting = split_stage(name)
    value = parse(setting, text)
    check_type(setting, value, name)
    group, _, last = setting.rpartition(".")
    with config.unlocked():
        tree = config.stages[stage] if stage else config
        _group(tree, group)[last] = value
    config.stages.unlock()


def _group(tree: Any, dotted: str) -> Any:
    """The group called `dotted` inside `tree`, made where a stage lacks it; `tree` itself for ""."""
    for part in dotted.split(".") if dotted else ():
        if part not in tree:
            tree[part] = type(tree)()
        tree = tree[part]
    return tree


def parse(name: str, text: str) -> Any:
    """The value that `text` spells for the setting `name`.

    Tuples: (1,2), 1,2 and projector,lora alike. A text that spells no value of the setting's type
    is handed back, for `check_type` to refuse.
    """
    like = defaults()[name]
    if name in SEVERAL:
        return _tuple(text) if text.startswith(("(", "[")) else text
    if isinstance(like, str):
        return text
    if isinstance(like, bool):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        return words.get(text.lower(), text)
    if isinstance(like, (tuple, list)):
        return _tuple(text)
    if text.lower() == "none":
        return None
    for kind in (int, float) if isinstance(like, int) else (float,):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _tuple(text: str) -> Any:
    try:
        value = ast.literal_eval(text or "()")
    except (ValueError, SyntaxError):
        bare = text.strip("()[] ").rstrip(",")
        value = tuple(part.strip().strip("'\"") for part in bare.split(","))
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def check_type(name: str, value: Any, shown: str = "") -> None:
    """Raises ConfigError where `value` is not of the type of the default of `name`.

    shown: the setting's name in the message, where it is not `name`.
    """
    wanted, fix = _wanted(name, value, defaults()[name])
    if wanted:
        raise ConfigError(f"{shown or name} is {value!r}, not {wanted}", fix=fix)


def _wanted(name: str, value: Any, like: Any) -> tuple[str, str | None]:
    """("what a setting like `like` has to be", fix), or ("", None) where `value` is one."""
    if name in SEVERAL:
        texts = value if isinstance(value, (tuple, list)) else (value,)
        return (
            "" if all(isinstance(v, str) for v in texts) else "a text or a tuple of texts"
        ), None
    if isinstance(like, bool):
        return ("" if isinstance(value, bool) else "True or False"), None
    if isinstance(like, str):
        return ("" if isinstance(value, str) else "a text"), None
    if isinstance(like, (tuple, list)):
        return _wanted_tuple(name, value)
    if value is None and like is None:
        return "", None
    return _wanted_number(value, isinstance(like, int))


def _wanted_number(value: Any, whole: bool) -> tuple[str, str | None]:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        if not whole or isinstance(value, int):
            return "", None
        return "a whole number", f"write {int(value)}" if value == int(value) else None
    fix = f"without quotes: {value}" if isinstance(value, str) and _spells_number(value) else None
    return "a whole number" if whole else "a number", fix


def _wanted_tuple(name: str, value: Any) -> tuple[str, str | None]:
    kinds, words = str, "texts"
    if name.endswith(WHOLE):
        kinds, words = int, "whole numbers"
    elif name in NUMBERS:
        kinds, words = (int, float), "numbers"
    if not isinstance(value, (tuple, list)):
        fix = (
            f"a tuple of one ends with a comma: ({value!r},)" if isinstance(value, kinds) else None
        )
        return f"a tuple of {words}", fix
    fine = all(isinstance(v, kinds) and not isinstance(v, bool) for v in value)
    return ("" if fine else f"a tuple of {words}"), None


def _spells_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
