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

from llava_jax.configs import common, variants
from llava_jax.errors import ConfigError, LlavaError, did_you_mean
from llava_jax.setting import current
from llava_jax.settings import TRAINING, check, flat, parse
from llava_jax.train.names import check_name, hint, known_settings, split_stage

START = "start from llava_jax.configs.common.get_config()"


def load_config(name: str, overrides: list[str]) -> Any:
    """The locked ConfigDict of a config file with `--config.x=y` overrides applied.

    name: as `find_config` takes it. Raises ConfigError, naming the file and line, for a file that
    cannot be read, a mistyped name (with the nearest one) and a value of the wrong type.
    """
    file = find_config(name)
    variant = name in variants.VARIANTS and file == _variants_file()
    config = variants.get_config(name) if variant else run_file(file)
    check_config(config, file)
    if not variant and config.name in (*shipped_configs(), TRAINING["name"].default):
        config.name = file.stem  # the file sets no name: this one is of the config it starts from
    for override in overrides:
        set_override(config, override)
    fill_in_folder(config)
    for name, value in flat(config):
        row = known_settings().get(split_stage(name)[1])
        if row and current(row, value) is not value:
            _set(config, name, current(row, value))
    return common.lock(config)


def fill_in_folder(config: Any) -> None:
    """Puts the config's data_folder, if it has one, where its settings say {data_folder}.

    Not a FieldReference: to assign to a setting that is one changes all that depend on it.
    """
    for name, value in list(flat(config)) if "data_folder" in config else ():
        if name != "data_folder" and isinstance(value, str | tuple | list):
            one = isinstance(value, str)
            filled = [
                v.replace("{data_folder}", config.data_folder) if isinstance(v, str) else v
                for v in ([value] if one else value)
            ]
            _set(config, name, filled[0] if one else type(value)(filled))


def config_folder() -> Path:
    """Where the configs that come with the package are."""
    import llava_jax.configs

    return Path(str(llava_jax.configs.__file__)).parent


def shipped_configs() -> dict[str, str]:
    """{bare name: what it is, in a line} of the configs that come with the package: files, variants."""
    found = {}
    for path in sorted(config_folder().glob("*.py")):
        if path.stem not in ("__init__", "common", "variants"):
            words = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = words.partition("\n")[0]
    return found | {name: variant.words for name, variant in variants.VARIANTS.items()}


def _variants_file() -> Path:
    return config_folder() / "variants.py"


def find_config(name: str) -> Path:
    """The file called `name`: a path, or a file of the installed configs, both with or without .py.

    An installed one is asked for by its bare name, or as configs/NAME. Of a variant it is the file with
    their table. Raises ConfigError where there is none.
    """
    folder, bare = Path(name).parent, Path(name).name.removesuffix(".py")
    candidates = [Path(name), Path(f"{name}.py")]
    if folder in (Path(), Path("configs")):
        candidates.append(config_folder() / f"{bare}.py")
    for candidate in candidates:
        if candidate.is_file() and candidate != _variants_file():
            return candidate
    if name in variants.VARIANTS:
        return _variants_file()
    known = list(shipped_configs())
    fix = did_you_mean(bare, known, "{!r}") or f"one of {', '.join(known)}"
    raise ConfigError(f"no config file {name!r}", fix=fix)


def set_override(config: Any, override: str) -> None:
    """Applies one `--config.NAME=VALUE` to `config`.

    Raises ConfigError for an unknown name and for a text that is not a value of the setting's type.
    """
    name, _, text = override.removeprefix("--config.").partition("=")
    check_name(name, [n for n, _ in flat(config) if not n.startswith("stages.")], config.stages)
    row = known_settings()[split_stage(name)[1]]
    value = parse(row, text)
    check(row, value, name)
    _set(config, name, value)


def _set(config: Any, name: str, value: Any) -> None:
    """Sets a dotted name; a stage need not have the group yet."""
    *groups, last = name.split(".")
    with config.unlocked():
        for group in groups:
            if group not in config:
                config[group] = ConfigDict(type_safe=False)
            config = config[group]
        config[last] = value


# The file ------------------------------------------------------------------------------------------


def run_file(file: Path) -> Any:
    """What the get_config of `file` returns. Raises ConfigError for whatever goes wrong in it."""
    module = ModuleType("llava_jax_config_file")
    module.__file__ = str(file)
    try:
        code = compile(file.read_bytes(), str(file), "exec")
        exec(code, module.__dict__)  # noqa: S102, a config file is a program
        function = getattr(module, "get_config", None)
        if not callable(function):
            raise ConfigError(f"{file}: there is no function get_config", fix=START)
        config = function()
        if isinstance(config, ConfigDict):
            dict(flat(config))  # a value made of another one is computed here
            return config
    except LlavaError:
        raise
    except Exception as error:
        raise _reworded(error, file) from error
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", 1)
    what = "nothing" if config is None else f"a {type(config).__name__}"
    raise ConfigError(
        f"{file}:{line}: get_config returns {what}, not a ConfigDict", fix="end it with return c"
    )


def check_config(config: Any, file: Path) -> None:
    """Raises ConfigError for settings of `file` that are unknown or missing, and for wrong values."""
    known = known_settings()
    settings = {n: v for n, v in flat(config) if not n.startswith("stages.")}
    missing = [name for name in TRAINING if name not in settings]
    if missing or "stages" not in config:
        raise ConfigError(
            f"{file}: the config has no {', '.join(missing[:4] or ['stages'])}", fix=START
        )
    for stage, changes in config.stages.items():
        if not hasattr(changes, "items"):
            raise ConfigError(f"{file}: stages.{stage} is {changes!r}, not a group of settings")
    for name, value in flat(config):
        stage, setting = split_stage(name)
        try:
            check_name(name, settings if stage else known, config.stages)
            check(known[setting], value, name)
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


def _reworded(error: Exception, file: Path) -> ConfigError:
    """What went wrong in a config file, with FILE:LINE; the refusal of a locked name in our words.

    The line is of the innermost frame in `file`, its folder or our own configs.
    """
    place, source = str(file), ""
    folders = (file.resolve().parent, config_folder().resolve())
    frames = traceback.extract_tb(error.__traceback__)
    for frame in frames:
        path = Path(frame.filename)
        if path == file or path.resolve().parent in folders:
            place, source = f"{frame.filename}:{frame.lineno}", frame.line or ""
    text = " ".join(str(error.args[0] if error.args else error).split())
    if isinstance(error, SyntaxError):
        place = f"{error.filename or file}:{error.lineno or 1}"
        return ConfigError(f"{place}: not Python: {error.msg}")
    if isinstance(error, ImportError):
        return ConfigError(f"{place}: {text[:1].lower()}{text[1:]}")
    refused = "ml_collections" in Path(frames[-1].filename).parts
    found = re.search(r'Key "(\w+)" does not exist', text) or re.search(r"(\w+)", text)
    if not (refused and found and isinstance(error, (AttributeError, KeyError))):
        return ConfigError(f"{place}: {type(error).__name__}: {text}")
    name = found[1]
    # The error has the last part of the name only, the line those before it: c.data.pth is data.pth.
    if dotted := re.search(rf"\w+((?:\.\w+)*)\.{name}\b", source):
        name = f"{dotted[1]}.{name}".removeprefix(".")
    fix = hint(name, known_settings()) or "--show prints every setting"
    return ConfigError(f"{place}: no setting {name!r}", fix=fix)
