"""Reads a config file, ours or a user's own: its errors in one line that names the file and line.

A config file is Python with a function get_config() that takes llava_jax.configs.common's settings,
or another file's, and changes them. The settings are locked, so a name that does not exist is an
error where it is set.
"""

from __future__ import annotations

import ast
import re
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from llava_jax.configs import common
from llava_jax.errors import ConfigError, LlavaError, did_you_mean
from llava_jax.settings import TRAINING, check, flat, parse
from llava_jax.train.names import check_name, hint, known_settings, near_setting, split_stage

START = "start from llava_jax.configs.common.get_config()"


def load_config(name: str, overrides: list[str]) -> Any:
    """The locked ConfigDict of a config file with `--config.x=y` overrides applied.

    name: as `find_config` takes it; NAME:TEXT hands TEXT to get_config.
    Raises ConfigError, naming the file and line, for a file that cannot be read, a mistyped name
    (with the nearest one) and a value of the wrong type.
    """
    path, _, argument = name.partition(":")
    file = find_config(path)
    config = run_file(file, argument)
    check_config(config, file)
    if config.name != file.stem and (config_folder() / f"{config.name}.py").is_file():
        config.name = file.stem  # the file sets no name: this one is of the config it starts from
    for override in overrides:
        set_override(config, override)
    return config


def config_folder() -> Path:
    """Where the configs that come with the package are."""
    import llava_jax.configs

    return Path(str(llava_jax.configs.__file__)).parent


def shipped_configs() -> dict[str, str]:
    """{bare name: first line of the docstring} of the configs that come with the package."""
    found = {}
    for path in sorted(config_folder().glob("*.py")):
        if path.stem not in ("__init__", "common"):
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = words.partition("\n")[0]
    return found


def find_config(name: str) -> Path:
    """The file called `name`: a path, or a file of the installed configs with or without .py."""
    bare = Path(name).with_suffix(".py")
    for candidate in (Path(name), bare, config_folder() / bare.name):
        if candidate.is_file():
            return candidate
    known = list(shipped_configs())
    fix = did_you_mean(bare.stem, known, "{!r}") or f"one of {', '.join(known)}"
    raise ConfigError(f"no config file {name!r}", fix=fix)


def set_override(config: Any, override: str) -> None:
    """Applies one `--config.NAME=VALUE` to `config`.

    Raises ConfigError for an unknown name and for a text that is not a value of the setting's type.
    """
    name, _, text = override.removeprefix("--config.").partition("=")
    check_name(name, [n for n, _ in flat(config) if not n.startswith("stages.")], config.stages)
    stage, setting = split_stage(name)
    row = known_settings()[setting]
    value = parse(row, text)
    check(row, value, name)
    with config.unlocked():
        tree = config.stages[stage] if stage else config
        *groups, last = setting.split(".")
        for group in groups:
            if group not in tree:  # of a stage
                tree[group] = ConfigDict()
            tree = tree[group]
        tree[last] = value
    config.stages.unlock()


# The file ------------------------------------------------------------------------------------------


def run_file(file: Path, argument: str = "") -> Any:
    """What the get_config of `file` returns. Raises ConfigError for whatever goes wrong in it."""
    module = ModuleType("llava_jax_config_file")
    module.__file__ = str(file)
    try:
        code = compile(file.read_bytes(), str(file), "exec")
        exec(code, module.__dict__)  # noqa: S102, a config file is a program
    except Exception as error:
        raise ConfigError(_explained(error, file)) from error
    function = getattr(module, "get_config", None)
    if not callable(function):
        raise ConfigError(f"{file}: there is no function get_config", fix=START)
    try:
        config = function(argument) if argument else function()
    except LlavaError:
        raise
    except Exception as error:
        raise _reworded(error, file) from error
    if not isinstance(config, ConfigDict):
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", 1)
        what = "nothing" if config is None else f"a {type(config).__name__}"
        raise ConfigError(
            f"{file}:{line}: get_config returns {what}, not a ConfigDict",
            fix="end it with return c",
        )
    return config


def check_config(config: Any, file: Path) -> None:
    """Raises ConfigError for settings of `file` that are unknown or missing, and for wrong values."""
    known = known_settings()
    settings = {n: v for n, v in flat(config) if not n.startswith("stages.")}
    for name, value in settings.items():
        _at(file, name, check_name, name, known)
        _at(file, name, check, known[name], value)
    missing = [name for name in TRAINING if name not in settings]
    if missing or "stages" not in config:
        raise ConfigError(
            f"{file}: the config has no {', '.join(missing[:4] or ['stages'])}", fix=START
        )
    for stage, changes in config.stages.items():
        if not hasattr(changes, "items"):
            raise ConfigError(f"{file}: stages.{stage} is {changes!r}, not a group of settings")
        for name, value in flat(changes):
            full = f"stages.{stage}.{name}"
            _at(file, name, check_name, full, settings, config.stages)
            _at(file, name, check, known[name], value, full)
    common.lock(config)


def _at(file: Path, name: str, check: Any, *args: Any) -> None:
    """Runs `check`; its error names `file` and, where it can be found, the line that sets `name`."""
    try:
        check(*args)
    except ConfigError as error:
        line = _line_that_sets(file, name.rpartition(".")[2])
        where = f"{file}:{line}" if line else str(file)
        raise ConfigError(f"{where}: {error.message}", fix=error.fix) from error


def _line_that_sets(file: Path, name: str) -> int | None:
    """The last line of `file` that assigns an attribute, a keyword or a key called `name`."""
    lines = [
        node.lineno
        for node in ast.walk(ast.parse(file.read_bytes()))
        if (
            isinstance(node, ast.Attribute)
            and node.attr == name
            and isinstance(node.ctx, ast.Store)
        )
        or (isinstance(node, ast.keyword) and node.arg == name)
        or (isinstance(node, ast.Constant) and node.value == name)
    ]
    return max(lines, default=None)


# Words ---------------------------------------------------------------------------------------------


def _reworded(error: Exception, file: Path) -> ConfigError:
    """The refusal of a locked or typed ConfigDict in our words, any other error in its own."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    if "ml_collections" not in Path(innermost.filename).parts:
        return ConfigError(_explained(error, file))
    place, source = _place(error, file)
    text = str(error.args[0] if error.args else "")
    if isinstance(error, (AttributeError, KeyError)):
        found = re.search(r'Key "(\w+)" does not exist', text) or re.search(r"(\w+)", text)
        name = _dotted(found[1], source) if found else text
        fix = hint(name, known_settings()) or "--show prints every setting"
        return ConfigError(f"{place}: no setting {name!r}", fix=fix)
    found = re.match(
        r"Could not override field '(\w+)' .*?\)\. (.*) is of original type (.*?) and", text
    )
    if not found:
        return ConfigError(_explained(error, file))
    name = near_setting(_dotted(found[1], source), known_settings()) or found[1]
    try:
        check(known_settings()[name], found[2] if "'str'" in found[3] else _literal(found[2]))
    except ConfigError as refusal:
        return ConfigError(f"{place}: {refusal.message}", fix=refusal.fix)
    return ConfigError(f"{place}: {name} cannot be {found[2]}")


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _dotted(last: str, source: str) -> str:
    """`last` with the groups that the source line spells before it: pth in c.data.pth is data.pth."""
    found = re.search(rf"\w+((?:\.\w+)*)\.{last}\b", source)
    return f"{found[1]}.{last}".removeprefix(".") if found else last


def _explained(error: Exception, file: Path) -> str:
    """FILE:LINE: what went wrong, in one line."""
    place, _ = _place(error, file)
    if isinstance(error, SyntaxError):
        return f"{error.filename or file}:{error.lineno or 1}: not Python: {error.msg}"
    text = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, ImportError):
        return f"{place}: {text[:1].lower()}{text[1:]}"
    return f"{place}: {type(error).__name__}: {text}"


def _place(error: Exception, file: Path) -> tuple[str, str]:
    """("FILE:LINE", the line) of the innermost frame in `file`, its folder or our own configs."""
    folders = (file.resolve().parent, config_folder().resolve())
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path == file or path.resolve().parent in folders:
            return f"{frame.filename}:{frame.lineno}", frame.line or ""
    return str(file), ""
