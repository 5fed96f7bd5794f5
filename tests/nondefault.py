"""Which settings of a training run the tests set to something else than the default.

Found in the text of the tests: `--config.NAME=VALUE` in a string, dictionaries with settings as keys,
keywords of calls that make settings, and assignments to a config's attributes.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llava_jax.settings import parse
from llava_jax.train.names import known_settings

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = object()
"""The value of an expression that is not written out."""

TRAINING = ("configs", "data", "parity/test_golden_training.py", "quickstart", "rehearsal", "train")
"""Where tests train or load data. Elsewhere the same words mean other things: only strings count."""

CALLS = {
    *(
        "DataSettings",
        "SimpleNamespace",
        "completed",
        "config",
        "config_of",
        "get_config",
        "loader",
    ),
    *("make_loader", "open_data", "overrides", "read", "replace", "settings", "start", "trained"),
}
"""Functions of the tests and of llava_jax.data whose keywords, and dictionaries, are settings."""


@functools.cache
def found() -> dict[str, set[str]]:
    """{setting: files under tests/ that set it to something else than its default}."""
    result: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        name = path.relative_to(ROOT / "tests").as_posix()
        if name == "test_defaults.py":  # holds examples
            continue
        strings_only = not name.startswith(TRAINING)
        for setting in in_tree(ast.parse(path.read_text(encoding="utf-8")), strings_only):
            result.setdefault(setting, set()).add(name)
    return result


def in_tree(tree: ast.AST, strings_only: bool = False) -> set[str]:
    """The settings that a piece of a program changes from their defaults."""
    pairs = _of_strings(tree) if strings_only else (*_of_strings(tree), *_of_program(tree))
    return {name for name, value in pairs if _differs(name, value)}


def _of_strings(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _of_text(node.value)


def _of_program(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """(setting, value) wherever `tree` gives a setting a value."""
    for node in ast.walk(tree):
        given: list[tuple[Any, ast.expr]] = []
        if isinstance(node, ast.Dict):
            given = _items(node, full_names=True)
        elif isinstance(node, ast.Call) and _called(node) in CALLS:
            given = [(keyword.arg, keyword.value) for keyword in node.keywords]
            for argument in node.args:
                given += _items(argument) if isinstance(argument, ast.Dict) else []
        elif isinstance(node, ast.Assign):
            given = [
                (_setting_of(target), value)
                for many in node.targets
                for target, value in _assigned(many, node.value)
            ]
        for key, value in given:
            for name in (key, f"data.{key}"):
                if name in known_settings():
                    yield name, _value(value)


def _items(node: ast.Dict, full_names: bool = False) -> list[tuple[Any, ast.expr]]:
    """(key, value) of a dictionary with words as keys; full_names: dotted words and known ones."""
    pairs = [
        (key.value, value)
        for key, value in zip(node.keys, node.values)
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    ]
    return [(k, v) for k, v in pairs if not full_names or k in known_settings()]


def _of_text(text: str) -> Iterator[tuple[str, Any]]:
    for word in text.split():
        if word.startswith("--config."):
            name, has_value, value = word.removeprefix("--config.").partition("=")
            if name in known_settings():
                yield name, parse(known_settings()[name], value) if has_value and value else UNKNOWN


def _called(node: ast.Call) -> str:
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def _assigned(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """The single assignments of `a, b = 1, 2`."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts))
    return [(target, value)]


def _setting_of(target: ast.expr) -> str:
    """data.pack for config.data.pack, if that is a setting."""
    parts: list[str] = []
    while isinstance(target, ast.Attribute):
        parts.insert(0, target.attr)
        target = target.value
    name = ".".join(parts)
    owner = getattr(target, "id", "")
    return name if name in known_settings() and owner in ("c", "config", "changed", "stage") else ""


def _value(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _differs(name: str, value: Any) -> bool:
    default = known_settings()[name].default
    if value is UNKNOWN:
        return True
    if isinstance(value, str) and not isinstance(default, str):
        value = parse(known_settings()[name], value)
    return (tuple(value) if isinstance(value, list) else value) != default
